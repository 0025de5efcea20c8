"""Attention in windows of a picture, or a clip: from the windows that go in to those that come out, it runs window by
window, shifted ones too, to the bit.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from revwire._forwards.converted import converted
from revwire.measure import peak_bytes
from steps import step
from toys import Blocks

WIDTH, HEADS, WINDOW = 16, 2, 4
PADDED = torch.randn(1, 14, 15, WIDTH, generator=torch.Generator().manual_seed(0))  # to 16 x 16: 16 windows
FITTING = torch.randn(1, 12, 8, WIDTH, generator=torch.Generator().manual_seed(0))


def partitioned(x):
    """(windows, tokens of each, channels) of (batch, height, width, channels)."""
    x = x.unflatten(1, (-1, WINDOW)).unflatten(3, (-1, WINDOW))
    return x.transpose(2, 3).reshape(-1, WINDOW**2, x.shape[-1])


def put_together(windows, height, width):
    x = windows.view(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, windows.shape[-1])
    return x.transpose(2, 3).reshape(len(x), height, width, -1)


def mask_of(height, width, shift):
    """(windows, tokens, tokens): what came together by rolling around the border stays apart."""
    rows, columns = (
        (torch.arange(size) >= size - WINDOW).long() + (torch.arange(size) >= size - shift) for size in (height, width)
    )
    regions = partitioned((3 * rows[:, None] + columns)[None, :, :, None].float())[..., 0]
    return (regions[:, None] != regions[:, :, None]) * -100.0


class Attention(nn.Module):
    """Among the tokens of each window, under a mask for each, and a bias for each head."""

    def __init__(self, p=0.0):
        super().__init__()
        self.mix, self.out, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(p)
        self.bias = nn.Parameter(torch.randn(HEADS, WINDOW**2, WINDOW**2))

    def forward(self, x, mask=None):
        q, k, v = self.mix(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        a = self.scores(q, k) + self.bias
        if mask is not None:
            a = a.view(-1, len(mask), *a.shape[1:]) + mask.unsqueeze(1).unsqueeze(0)
            a = a.view(-1, *a.shape[2:])
        return self.out((self.drop(a.softmax(-1)) @ v).transpose(1, 2).reshape(x.shape))

    def scores(self, q, k):
        return q @ k.mT / 4


class Fused(Attention):
    """All in one call of PyTorch's."""

    def forward(self, x, mask=None):
        q, k, v = self.mix(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        bias = self.bias[None] if mask is None else self.bias + mask[:, None]
        return self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(x.shape))


class Windowed(nn.Module):
    """Pads, rolls, and runs an attention on windows."""

    def __init__(self, attention, shift):
        super().__init__()
        self.attention, self.shift = attention, shift

    def forward(self, x):
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        mask = mask_of(*x.shape[1:3], self.shift) if self.shift else None
        x = put_together(self.attended(partitioned(x), mask), *x.shape[1:3])
        return torch.roll(x, (self.shift, self.shift), (1, 2))[:, :height, :width].contiguous()

    def attended(self, windows, mask):
        return self.attention(windows, mask)


class Spelled(Windowed):
    """Holds the code of the attention itself, and calls for its weights by functions."""

    def attended(self, windows, mask):
        own = self.attention
        q, k, v = F.linear(windows, own.mix.weight, own.mix.bias).unflatten(-1, (3, HEADS, -1)).unbind(2)
        a = torch.einsum("wqhd,wkhd->whqk", q, k) + own.bias
        a = a if mask is None else a + mask.unsqueeze(1)
        return F.linear(torch.einsum("whqk,wkhd->wqhd", a.softmax(-1), v).flatten(2), own.out.weight, own.out.bias)


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x):
        return x + self.branch(self.norm(x))


class Net(Blocks):
    """Every second block shifts its windows."""

    def __init__(self, windowed=Windowed, make=Attention):
        shifts = iter((0, WINDOW // 2) * 2)
        super().__init__(lambda: Block(windowed(make(), next(shifts))), 4)


def net(x, chunks, windowed=Windowed, make=Attention, **options):
    torch.manual_seed(0)
    return revwire.convert(Net(windowed, make).train(), x, chunks=chunks, **options)


def cores(model):
    """The cores that ran, by module: (the shapes of what went in, along which dimension it was cut)."""
    found = {}
    for parted in converted(model).parted:
        for program in parted.forward.programs.values():
            (call,) = [v for v in program.compiled.run.__globals__.values() if type(v).__name__ == "InParts"]
            found[parted.forward.path] = dict(zip(call.border.shapes, call.border.dims, strict=True))
    return found


def equals_stored(model, x):
    """Whether a step is, to the bit, that of the same chunks with stored activations."""
    (out,), found = step(model, x)
    with revwire.stored_activations(model):
        (same,), stored = step(model, x)
    return (
        torch.equal(out, same)
        and found.keys() == stored.keys()
        and all(map(torch.equal, found.values(), stored.values()))
    )


def assert_close(a, b):
    """Two steps that differ in the sizes of their products, which round otherwise."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x", [PADDED, FITTING], ids=["padded", "fitting"])
@pytest.mark.parametrize(
    ("windowed", "make"),
    [(Windowed, Attention), (Windowed, Fused), (Spelled, Attention), (Windowed, lambda: Attention(0.3))],
    ids=["modules", "fused", "functions", "dropout"],
)
def test_windows_run_in_parts_as_with_stored_activations(windowed, make, x):
    model = net(x, 4, windowed, make)
    assert equals_stored(model, x)
    windows = (x.shape[1] + 3) // 4 * ((x.shape[2] + 3) // 4)
    ran = cores(model)
    assert {"blocks.1", "blocks.3"} <= {path.split(".branch")[0] for path in ran}  # the shifted ones
    for inputs in ran.values():
        assert inputs[windows, WINDOW**2, WIDTH] == 0  # the windows go in
        assert inputs[3 * WIDTH, WIDTH] is None  # and the weights, for all parts


@pytest.mark.parametrize(("windowed", "make"), [(Windowed, Attention), (Windowed, Fused), (Spelled, Attention)])
def test_windows_in_parts_give_what_the_whole_gives(windowed, make):
    model, whole = (net(PADDED, chunks, windowed, make, coupling="re2tal", rewire="everywhere") for chunks in (4, 1))
    assert_close(step(model, PADDED), step(whole, PADDED))


def test_verify_finds_windows_exact():
    assert revwire.verify(net(PADDED, 4), PADDED).bit_exact


def test_a_step_holds_one_part_of_the_windows():
    x = torch.randn(1, 64, 64, WIDTH)
    whole, parts = (net(x, n, coupling="re2tal", rewire="everywhere") for n in (1, 8))
    assert peak_bytes(lambda: parts(x).sum().backward()) < 0.6 * peak_bytes(lambda: whole(x).sum().backward())


def test_windows_come_before_heads_where_more_is_gained():
    model = net(FITTING, 2)
    assert step(model, FITTING)
    assert cores(model)["blocks.1.branch.attention"][6, WINDOW**2, WIDTH] == 0


class Crossed(Attention):
    """Each window knows of all others."""

    def scores(self, q, k):
        a = super().scores(q, k)
        return a - a.mean(0)


class Counted(Attention):
    """Each window has a number."""

    def scores(self, q, k):
        return super().scores(q, k) * torch.arange(1, len(q) + 1).log2().view(-1, 1, 1, 1)


def test_windows_that_look_at_each_other_are_never_cut_apart():
    model, whole = (net(PADDED, n, Windowed, Crossed, coupling="re2tal", rewire="everywhere") for n in (4, 1))
    assert_close(step(model, PADDED), step(whole, PADDED))
    assert all((16, WINDOW**2, WIDTH) not in inputs for inputs in cores(model).values())


def test_windows_are_cut_with_their_numbers():
    model, whole = (net(PADDED, n, Windowed, Counted, coupling="re2tal", rewire="everywhere") for n in (4, 1))
    assert_close(step(model, PADDED), step(whole, PADDED))
    assert cores(model)["blocks.1.branch.attention"][16, WINDOW**2, WIDTH] == 0
    assert equals_stored(model, PADDED)


@pytest.mark.parametrize("early", [True, False])
def test_hooks_on_a_projection_see_all_windows(early):
    """It stays outside of the core, or leaves it at the next step."""
    seen = []

    def hooked(model):
        for block in model.blocks[1::2]:  # those that are not cut along the height, as they shift
            block.branch.attention.mix.register_forward_hook(
                lambda m, args, out: seen.append(len(out)) or out / out.max()
            )

    models = []
    for chunks in (4, 1):
        torch.manual_seed(0)
        model = Net().train()
        if early:
            hooked(model)
        models.append(revwire.convert(model, PADDED, chunks=chunks, coupling="re2tal", rewire="everywhere"))
        if not early:
            step(model, PADDED)
            hooked(model)
    seen.clear()
    found = step(models[0], PADDED)
    assert set(seen) == {16}
    assert_close(found, step(models[1], PADDED))


def test_another_projection_takes_the_place_of_the_first():
    model, whole = (net(PADDED, n, coupling="re2tal", rewire="everywhere") for n in (4, 1))
    step(model, PADDED)
    for m in (model, whole):
        torch.manual_seed(1)
        m.blocks[1].branch.attention.mix = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    assert_close(step(model, PADDED), step(whole, PADDED))


def test_frozen_weights_and_autocast():
    x = torch.randn(1, 32, 32, WIDTH)
    model = net(x, 4)
    for block in model.blocks:
        block.branch.attention.out.requires_grad_(False)
        block.branch.attention.mix.weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert equals_stored(model, x)
    assert cores(model)


def test_several_samples_are_cut_before_their_windows():
    x = torch.cat([PADDED, -PADDED])
    model = net(x, 4)
    assert equals_stored(model, x)
    assert [u.chunks for u in revwire.report(model).units][1::2] == [2] * 2  # those that shift
