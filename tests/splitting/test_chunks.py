"""Units in chunks: the function and its gradients are those of stored activations to the bit, and the memory is that of
one chunk.
"""

import copy
import pickle
from collections import UserList

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from cases import CASES, spread
from revwire._forwards.converted import chains_of
from revwire._runtime import run as runner
from revwire._runtime.chunks import Chunk, Cut
from revwire.measure import peak_bytes
from steps import training_step
from toys import KINDS, Blocks, inputs_of, stored, toy

WIDTH = 16
INPUTS = torch.randn(6, 12, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + F(x), for a branch that is given; and, behind it, a residual MLP."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x, *extras):
        x = x + self.branch(x, *extras)
        return x + self.mlp(x)


class Net(Blocks):
    """Blocks with such branches."""

    def __init__(self, make, depth=3):
        super().__init__(lambda: Block(make()), depth)


class Attention(nn.Module):
    """Self-attention with an optional bias for each sample."""

    def __init__(self, causal=False):
        super().__init__()
        self.mix, self.causal = nn.Linear(WIDTH, 3 * WIDTH), causal

    def forward(self, x, bias=None):
        q, k, v = self.mix(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal)


class Windows(nn.Module):
    """Attention within windows of four tokens."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x.unflatten(1, (-1, 4))).flatten(1, 2)


class ShiftedWindows(Windows):
    """Attention within windows of four tokens that are shifted by two, masked at the border; of four tokens: one
    window.
    """

    def forward(self, x):
        n = x.shape[1]
        if n <= 4:
            return self.attention(x)
        place = torch.arange(n).roll(-2)
        side = (place >= n - 2).long() + 2 * (place < 2)
        mask = torch.where(side[:, None] == side, 0.0, -100.0).unflatten(0, (-1, 4)).unflatten(-1, (-1, 4))
        mask = torch.stack([mask[i, :, i] for i in range(n // 4)])
        return self.attention(x.roll(-2, 1).unflatten(1, (-1, 4)), mask).flatten(1, 2).roll(2, 1)


class DroppedWindows(ShiftedWindows):
    """Whole samples are dropped; so are single results, with ``p``."""

    def __init__(self, p=0.0):
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        out = super().forward(x)
        return self.dropout(out * out.new_empty(len(x), 1, 1).bernoulli_(0.7)) if self.training else out


class DroppedBatch(nn.Linear):
    """All samples have the same fate."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        out = super().forward(x)
        return out * out.new_empty(1).bernoulli_(0.5) if self.training else out


class Positions(nn.Module):
    """Adds what depends on the place of a token, counted from the first that it is given."""

    def __init__(self):
        super().__init__()
        self.places, self.linear = nn.Parameter(torch.randn(12, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x + self.places[: x.shape[1]])


class Square(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)


class MeanOverBatch(Square):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class DroppedSamples(Square):
    """Stochastic depth: all tokens of a sample have the same fate."""

    def forward(self, x):
        out = super().forward(x)
        return out * (torch.rand(len(x), 1, 1) < 0.8) / 0.8 if self.training else out


class BatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(12)

    def forward(self, x):
        return self.norm(self.linear(x))


class Gated(nn.Module):
    """A linear layer, and beside it attention that begins as nothing."""

    def __init__(self):
        super().__init__()
        self.linear, self.attention, self.gate = nn.Linear(WIDTH, WIDTH), Attention(), nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return self.linear(x) + self.gate * self.attention(x)


class ZeroOut(Attention):
    """Attention whose output layer begins as zero."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        return self.out(super().forward(x))


class Constant(nn.Module):
    """Nothing can be learned from a branch that does not look at its input."""

    def forward(self, x):
        return torch.zeros_like(x)


def linear():
    return nn.Linear(WIDTH, WIDTH)


def causal():
    return Attention(causal=True)


def convolution():
    return nn.Sequential(Swapped(), nn.Conv1d(WIDTH, WIDTH, 3, padding=1), Swapped())


class Swapped(nn.Module):
    def forward(self, x):
        return x.mT


def dims_of(model):
    """For each unit of the first block, the dimensions along which it may be cut."""
    cuts = chains_of(model)[0].cuts
    return [() if cut is None else cut.dims for cut in cuts[:2]]


# -- what may be cut ---------------------------------------------------------------------------------------------------


DIMS = {
    linear: (0, 1),
    Attention: (0,),
    causal: (0,),
    Windows: (0,),
    Positions: (0,),
    convolution: (0,),
    DroppedSamples: (0, 1),
    Gated: (0,),
    ZeroOut: (0,),
    Constant: (),
    MeanOverBatch: (1,),
    BatchNorm: (),
}


@pytest.mark.parametrize(("make", "chunks"), spread([*DIMS], [2, 3]))
def test_a_branch_is_cut_where_it_treats_each_by_itself(make, chunks):
    model = revwire.convert(Net(make), INPUTS, chunks=chunks)
    assert dims_of(model) == [DIMS[make], (0, 1)]
    assert revwire.verify(model, INPUTS).bit_exact


def windows_of(model):
    """For each unit of the first block, the dimension along which it may be cut in windows, and where they end."""
    return [[] if cut is None else [(w.dim, w.ends) for w in cut.windows] for cut in chains_of(model)[0].cuts[:2]]


@pytest.mark.parametrize(
    ("make", "ends", "lengths"),
    [
        (Windows, (4, 8, 12), {2: [4, 4, 4], 3: [4, 4, 4]}),
        (ShiftedWindows, (2, 6, 10, 12), {2: [2, 4, 4, 2], 3: [2, 4, 4, 2]}),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_windows_of_one_clip_run_each_by_itself(make, ends, lengths, exact):
    whole = revwire.convert(Net(make), INPUTS[:1], exact=exact, coupling="re2tal")(INPUTS[:1])
    for count, expected in lengths.items():
        model = revwire.convert(Net(make), INPUTS[:1], chunks=count, exact=exact, coupling="re2tal")
        assert windows_of(model) == [[(1, ends)], []]
        cut = chains_of(model)[0].cuts[0]
        assert [c.length for c in cut.chunks_of((1, 12, WIDTH))] == expected
        assert revwire.verify(model, INPUTS[:1]).bit_exact or not exact
        torch.testing.assert_close(model(INPUTS[:1]), whole)
        assert revwire.verify(model, INPUTS).bit_exact or not exact  # there, the batch is cut


def test_windows_that_may_run_together_are_few_chunks():
    inputs = torch.randn(1, 32, WIDTH)
    model = revwire.convert(Net(Windows), inputs, chunks={"*.branch": 3, "*": 5})
    cut = chains_of(model)[0].cuts[0]
    assert cut.windows[0].ends == tuple(range(4, 33, 4))
    assert [c.length for c in cut.chunks_of(inputs.shape)] == [8, 8, 8, 8]
    assert revwire.verify(model, inputs).bit_exact


def test_windows_are_cut_at_the_sizes_of_the_example_only():
    """A clip of four tokens has one window, which is not shifted, so that cuts at 2 would change the function."""
    model = revwire.convert(Net(ShiftedWindows), INPUTS[:1], chunks=4)
    cut = chains_of(model)[0].cuts[0]
    assert [len(cut.chunks_of((1, n, WIDTH))) for n in (4, 8, 12, 16)] == [0, 0, 4, 0]
    for n in (4, 8, 12):
        x = INPUTS[:1, :n]
        assert revwire.verify(model, x).bit_exact
        torch.testing.assert_close(model(x), revwire.convert(Net(ShiftedWindows), x)(x))


def test_what_a_whole_sample_draws_is_drawn_again_in_each_chunk():
    for make, inputs, dim in ((DroppedWindows, INPUTS[:1], 1), (DroppedBatch, INPUTS, 0)):
        model = revwire.convert(Net(make).train(), inputs, chunks=3)
        plain = revwire.convert(Net(make).train(), inputs)
        chunks = chains_of(model)[0].cuts[0].chunks_of(inputs.shape)
        assert len(chunks) > 2
        assert {(c.dim, c.shares) for c in chunks} == {(dim, True)}
        assert revwire.verify(model, inputs).bit_exact
        for seed in range(8):
            ends = []
            for m in (model, plain):
                for grad in (True, False):
                    torch.manual_seed(seed)
                    with torch.set_grad_enabled(grad):
                        ends.append((m(inputs).detach(), torch.get_rng_state()))
            for out, state in ends[1:]:
                torch.testing.assert_close(out, ends[0][0])
                assert torch.equal(state, ends[0][1])


def test_numbers_that_are_drawn_where_they_cannot_be_seen_are_not_shared():
    """A branch may draw by other means than PyTorch's operators: only the generator tells."""

    class Hidden(DroppedWindows):
        def forward(self, x):
            out = super().forward(x)
            if not self.training:
                return out
            generator = torch.Generator()
            generator.set_state(torch.get_rng_state())
            mask = torch.rand(out.shape, generator=generator)
            torch.set_rng_state(generator.get_state())
            return out * (mask < 0.5)

    model = revwire.convert(Net(Hidden).train(), INPUTS[:1], chunks=3)
    assert windows_of(model) == [[], []]
    assert revwire.verify(model, INPUTS[:1]).bit_exact


def test_stored_chunks_can_be_differentiated_twice():
    model = revwire.convert(Net(linear, depth=2).double(), INPUTS.double(), chunks=3)
    x = INPUTS[:2, :3].double().requires_grad_()

    def twice(m):
        (g,) = torch.autograd.grad(m(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    whole = revwire.convert(Net(linear, depth=2).double(), INPUTS.double())
    with revwire.stored_activations(model), revwire.stored_activations(whole):
        torch.testing.assert_close(twice(model), twice(whole))


def test_dropout_of_single_results_keeps_windows_from_being_cut():
    model = revwire.convert(Net(lambda: DroppedWindows(0.2)).train(), INPUTS[:1], chunks=3)
    assert windows_of(model) == [[], []]
    assert revwire.verify(model, INPUTS[:1]).bit_exact


class Deciding(nn.Module):
    """Decides by the mean of all samples, which is far from where that matters on the example."""

    def __init__(self, training):
        super().__init__()
        self.linear, self.decides_in = nn.Linear(WIDTH, WIDTH), training

    def forward(self, x):
        if self.training is self.decides_in and x.detach().mean() > 50:
            return self.linear(x).tanh()
        return self.linear(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_with_a_module_that_decides_on_values_runs_whole(training):
    model = revwire.convert(Net(lambda: Deciding(training)).train(), INPUTS, chunks=2)
    found = {u.path: u.chunks for u in revwire.report(model).units}
    assert (found["blocks.0.branch"], found["blocks.0.mlp"]) == (1, 2)


def test_an_example_of_one_sample_tells_what_a_batch_may_do():
    model = revwire.convert(Net(Attention), INPUTS[:1], chunks=2)
    assert dims_of(model) == [(0,), (1,)]
    assert [u.chunks for u in revwire.report(model).units[:2]] == [
        1,
        2,
    ]  # the tokens of an MLP, and of attention nothing
    model = revwire.convert(Net(lambda: nn.Sequential(linear(), nn.Dropout(0.2))), INPUTS[:1], chunks=2)
    assert dims_of(model) == [(0,), (1,)]
    for inputs in (INPUTS[:1], INPUTS, INPUTS[:5, :7]):
        assert revwire.verify(model, inputs).bit_exact


def test_dropout_keeps_a_branch_from_being_cut_along_tokens():
    model = revwire.convert(Net(lambda: nn.Sequential(linear(), nn.Dropout(0.2))).eval(), INPUTS, chunks=2)
    assert dims_of(model) == [(0,), (0, 1)]
    assert revwire.verify(model.train(), INPUTS).bit_exact


def test_extra_inputs_of_each_sample_are_cut_with_it():
    bias = torch.randn(6, 12, 12, requires_grad=True)
    for extra, slices in ((bias, True), (bias[:1], False), (bias[0], False)):
        model = revwire.convert(Net(Attention), (INPUTS, extra), chunks=3)
        cut = chains_of(model)[0].cuts[0]
        assert (cut.count, cut.rank, cut.dims, cut.slices) == (3, 3, (0,), slices)
        assert revwire.verify(model, (INPUTS, extra)).bit_exact


def chunks_run(model, *inputs):
    """Into how many chunks the first unit is cut in this call."""
    seen, chain = [], chains_of(model)[0]
    before = chain.chunks
    chain.chunks = lambda *args: seen.append(before(*args)) or seen[-1]
    try:
        model(*inputs)
    finally:
        del chain.chunks
    return len(seen[0]) or 1


def test_extra_inputs_of_another_kind_than_in_the_example_let_a_unit_run_whole():
    """Six samples of six tokens: whether a size of six is the batch cannot be told, and a mask that the example had not
    may be anything.
    """
    bias = torch.randn(6, 12, 12)
    model = revwire.convert(Net(Attention), (INPUTS, bias[:1]), chunks=3)
    assert chunks_run(model, INPUTS, bias[:1]) == chunks_run(model, INPUTS[:3], bias[:1]) == 3
    square = INPUTS[:, :6]
    for inputs in ((INPUTS, bias), (square, torch.randn(6, 6)), (square, torch.randn(6, 6, 6))):
        assert chunks_run(model, *inputs) == 1
        assert revwire.verify(model, inputs).bit_exact
    model = revwire.convert(Net(Attention), INPUTS, chunks=3)
    assert chunks_run(model, INPUTS) == 3
    assert chunks_run(model, INPUTS, bias) == 1
    assert revwire.verify(model, (INPUTS, bias)).bit_exact


def test_a_unit_that_its_chain_runs_through_again_is_cut_each_time():
    class Shared(Net):
        def __init__(self):
            super().__init__(Attention, depth=1)

        def forward(self, x):
            for _ in range(3):
                x = self.blocks[0](x)
            return x

    model = revwire.convert(Shared(), INPUTS, chunks=3)
    assert [u.chunks for u in revwire.report(model).units] == [3] * 6
    check = revwire.verify(model, INPUTS)
    assert check.bit_exact
    assert len(check.units) == 18


def test_chains_inside_of_branches():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = Net(Attention, depth=2), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.out(self.inner(x[:, ::2]).repeat_interleave(2, 1))

    model = revwire.convert(Net(Inner, depth=2), INPUTS, chunks=2)
    assert revwire.verify(model, INPUTS).bit_exact


def test_a_unit_with_side_outputs_runs_whole():
    class Weights(Attention):
        def forward(self, x):
            return super().forward(x), self.mix(x).mean()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = Weights()

        def forward(self, x):
            f, side = self.branch(x)
            return x + f, side

    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Both() for _ in range(3))

        def forward(self, x):
            total = 0
            for block in self.blocks:
                x, side = block(x)
                total = total + side
            return x, total

    model = revwire.convert(Sides(), INPUTS, chunks=2)
    assert set(dims_of(model)) == {()}
    assert revwire.verify(model, INPUTS).bit_exact


def test_looking_leaves_the_model_as_it_was():
    model = Net(BatchNorm).train()
    model.blocks[1].eval()
    model.blocks[0].branch.linear.weight.grad = torch.ones(WIDTH, WIDTH)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    revwire.convert(model, INPUTS, chunks=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.blocks] == [True, False, True]
    assert torch.equal(model.blocks[0].branch.linear.weight.grad, torch.ones(WIDTH, WIDTH))
    assert model.blocks[0].mlp[1].weight.grad is None


# -- the engine --------------------------------------------------------------------------------------------------------


def cut_toy(case, branch, count=2, **options):
    model = toy(case, branch, **options)
    model.chain.cuts = (Cut(count, len(branch.shape), (0,), slices=False),) * model.chain.length
    return model


NAMES = ["pre-norm", "dropped", "linear", "weightless"]


@pytest.mark.parametrize(
    ("case", "name", "kind", "spacing"), spread(CASES, NAMES, ["residual", "block"], [None, 3], one_in=3), ids=str
)
def test_gradients_and_random_state_are_those_of_stored_activations(case, name, kind, spacing):
    model = cut_toy(case, KINDS[name], kind=kind)
    model.chain.set_anchors(spacing)
    x = inputs_of(model, case)

    def gradients():
        torch.manual_seed(3)
        out = model(x)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *model.parameters()]), torch.get_rng_state()]

    rebuilt = gradients()
    with stored(model):
        true = gradients()
    for a, b in zip(rebuilt, true, strict=True):
        assert torch.equal(a, b) if case.exact else (a - b).abs().amax() <= case.stored * max(1, b.abs().amax())


class Patches(nn.Module):
    """Tokens that lie transposed in memory, as a patch embedding leaves them."""

    def __init__(self):
        super().__init__()
        self.embed, self.net = nn.Conv2d(3, WIDTH, 4, 4), Net(Attention)

    def forward(self, images):
        return self.net(self.embed(images).flatten(2).mT)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("exact", [True, False])
def test_streams_that_lie_transposed_in_memory(batch, exact):
    images = torch.randn(batch, 3, 16, 16)
    model = revwire.convert(Patches(), images, coupling="re2tal", exact=exact, chunks=2)
    check = revwire.verify(model, images)
    assert check.bit_exact if exact else check.gradient_error < 1e-5


class Turned(nn.Module):
    """A branch that lies transposed in memory, and comes first in the sum."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        h = self.linear(x).transpose(1, 2).contiguous().transpose(1, 2)
        return h + x


def test_a_sum_that_lies_as_its_branch_is_not_made_in_chunks():
    plain = Blocks(Turned, 3)
    model = revwire.convert(copy.deepcopy(plain), INPUTS, rewire="everywhere", chunks=2)
    assert model(INPUTS).stride() == plain(INPUTS).stride() != INPUTS.stride()


class Rows(nn.Module):
    """Tokens beside each other in one dimension, then in the other, as grid attention has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Block(Attention), Block(Attention)
        self.first.branch, self.second.branch = Attention(), Attention()
        self.norm = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        x = self.norm(x).permute(0, 2, 3, 1)
        return self.second(self.first(x).swapaxes(1, 2)).swapaxes(1, 2).permute(0, 3, 1, 2)


def test_gradients_of_permuted_streams_lie_as_those_of_stored_activations():
    """Sums over a gradient round as its memory is laid out: a bias before the chain shows it."""
    inputs = torch.randn(1, WIDTH, 1, 49)
    model = revwire.convert(Rows(), inputs, chunks=4)
    assert max(u.chunks for u in revwire.report(model).units) == 4
    assert revwire.verify(model, inputs).bit_exact


def test_a_network_that_permutes_its_images():
    timm = pytest.importorskip("timm")
    images = torch.randn(2, 3, 32, 32)
    model = revwire.convert(timm.create_model("convnext_atto"), images, chunks=2)
    assert {u.chunks for u in revwire.report(model).units} == {2}
    assert revwire.verify(model, images).bit_exact


def test_images_in_channels_last_layout():
    images = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    branches = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(3)]

    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = nn.ModuleList(branches).to(memory_format=torch.channels_last)

        def forward(self, x):
            for branch in self.branches:
                x = x + branch(x)
            return x

    model = revwire.convert(Images(), images, chunks=2)
    assert [u.chunks for u in revwire.report(model).units] == [2, 2, 2]
    assert revwire.verify(model, images).bit_exact
    assert model(images).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("coupling", ["bdia", "bdia-random:1/2", "re2tal", "momentum:1/8"])
@pytest.mark.parametrize(("chunks", "parts"), [(2, 2), (4, 3), (64, 6)])
def test_couplings_and_counts(coupling, chunks, parts):
    """Six samples make four chunks of two, of which the last is empty, and no more than six."""
    model = revwire.convert(Net(Attention), INPUTS, coupling=coupling, chunks={"*.branch": chunks})
    check = revwire.verify(model, INPUTS)
    assert check.bit_exact
    assert len(check.units) == 3 * (parts + 1)


def test_autocast_and_half_precision():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert revwire.verify(model, INPUTS).bit_exact
    model = revwire.convert(Net(Attention).bfloat16(), INPUTS.bfloat16(), chunks=2)
    assert revwire.verify(model, INPUTS.bfloat16()).bit_exact


def test_float_streams():
    model = revwire.convert(Net(Attention), INPUTS, coupling="re2tal", exact=False, chunks=2)
    assert revwire.verify(model, INPUTS).gradient_error < 1e-5


def test_retained_graphs_and_several_forwards():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2)
    x = INPUTS.clone().requires_grad_()
    first, second = model(x).sum(), model(2 * x).sum()
    once = torch.autograd.grad(first, x, retain_graph=True)
    torch.autograd.grad(second, x)
    assert torch.equal(once[0], torch.autograd.grad(first, x)[0])
    with pytest.raises(revwire.ReconstructionError, match="retain_graph=True"):
        torch.autograd.grad(first, x)


def test_frozen_weights_and_an_input_without_gradient():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2)
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    assert revwire.verify(model, INPUTS).bit_exact
    model.blocks[2].requires_grad_(False)
    assert revwire.verify(model, INPUTS.clone().requires_grad_()).bit_exact


def test_a_forward_that_failed_between_two_chunks_leaves_nothing_behind():
    calls = UserList([0, 0])  # those made, and the one that fails: which no recompute puts back

    class Once(nn.Linear):
        def forward(self, x):
            calls[0] += 1
            if calls[0] == calls[1]:
                raise KeyboardInterrupt
            return super().forward(x)

    model = revwire.convert(Net(lambda: Once(WIDTH, WIDTH)), INPUTS, chunks=3)
    x = INPUTS.clone().requires_grad_()
    true = torch.autograd.grad(model(x).square().sum(), x)[0]
    calls[1] = calls[0] + 5  # the second chunk of the second block
    with pytest.raises(KeyboardInterrupt):
        model(x)
    assert torch.equal(torch.autograd.grad(model(x).square().sum(), x)[0], true)


def test_a_tape_goes_on_where_a_chunk_failed():
    case = next(c for c in CASES if c.exact)
    model = cut_toy(case, KINDS["linear"], count=3, depth=2)
    x, (one, two), chain = inputs_of(model, case), model.units, model.chain
    state, _ = runner.apply(chain, one, model.branches[0], x)

    def failing(host, part):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return host(part), ()

    calls, branch = [], two.branch
    object.__setattr__(two, "branch", failing)
    with pytest.raises(KeyboardInterrupt):
        runner.apply(chain, two, model.branches[1], state)
    object.__setattr__(two, "branch", branch)
    out, _ = runner.apply(chain, two, model.branches[1], state)
    with stored(model):
        true = torch.autograd.grad(model(x).sum(), x)[0]
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], true)


def test_faults_are_found_in_any_chunk():
    model = revwire.convert(Net(Attention), INPUTS, chunks=3)
    loss = model(INPUTS).sum()
    with torch.no_grad():
        model.blocks[1].branch.mix.weight.add_(1)
    with pytest.raises(revwire.ReconstructionError, match="modified in place"):
        loss.backward()

    calls = UserList([0, -1])

    class Moody(nn.Linear):
        def forward(self, x):
            calls[0] += 1
            return super().forward(x + (1e-3 if calls[0] == calls[1] else 0.0))

    model = revwire.convert(Net(lambda: Moody(WIDTH, WIDTH), depth=1), INPUTS, chunks=3)
    loss = model(INPUTS.clone().requires_grad_()).sum()
    calls[1] = calls[0] + 2  # the recompute of the second chunk
    with pytest.raises(
        revwire.ReconstructionError, match=r"its branch computed other values|its rebuilt input differs"
    ):
        loss.backward()
    with pytest.raises(revwire.ReconstructionError, match="retain_graph=True"):
        loss.backward()


def test_double_backward_is_refused():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2)
    x = INPUTS.clone().requires_grad_()
    with pytest.raises(revwire.UnsupportedTransformError, match="create_graph=True"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_without_gradients_it_is_the_same_function():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2).eval()
    true = model(INPUTS)
    with torch.no_grad():
        assert torch.equal(model(INPUTS), true)
    with torch.inference_mode():
        assert torch.equal(model(INPUTS), true)


def test_copies_and_pickles_are_cut_alike():
    model = revwire.convert(Net(Attention), INPUTS, chunks=2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert chains_of(twin)[0].cuts == chains_of(model)[0].cuts
        assert revwire.verify(twin, INPUTS).bit_exact


def test_chunks_of_a_permuted_state_are_dense():
    state = torch.randn(4, 6, 2).transpose(0, 1)
    for chunk in (Chunk(0, 1, 3), Chunk(1, 2, 2), Chunk(2, 0, 1)):
        part = chunk.of(state)
        assert torch.empty_like(part).stride() == part.stride()
        assert torch.equal(part, state.narrow(*chunk[:3]))


# -- what it saves -----------------------------------------------------------------------------------------------------


def test_a_backward_pass_holds_the_activations_of_one_chunk():
    inputs = torch.randn(16, 64, WIDTH)
    hidden = 4 * inputs.numel() * 4  # bytes of the widest activation of an MLP
    peaks = {}
    for chunks in (1, 2, 8):
        model = revwire.convert(Net(linear), inputs, chunks=chunks, rewire="everywhere")
        peaks[chunks] = peak_bytes(training_step(model, inputs))
    assert peaks[1] - peaks[2] > hidden
    assert peaks[1] - peaks[8] > 1.75 * hidden


def test_the_peak_does_not_grow_with_depth_but_for_the_kept_bits():
    inputs = torch.randn(16, 256, WIDTH)
    peaks = [
        peak_bytes(training_step(revwire.convert(Net(linear, depth), inputs, coupling="re2tal", chunks=4), inputs))
        for depth in (4, 16)
    ]
    assert peaks[1] < 1.05 * peaks[0]


def test_a_budget_below_what_whole_units_need_is_met_in_chunks():
    inputs = torch.randn(16, 64, WIDTH)
    model = Net(linear, 6)
    whole = revwire.plan(model, inputs, memory_budget="least", chunks=1).forecast.peak_bytes
    budget = int(0.8 * whole)
    with pytest.raises(revwire.BudgetError, match="expected at least"):
        revwire.convert(model, inputs, memory_budget=budget, chunks=1)
    revwire.convert(model, inputs, memory_budget=budget)
    plan = revwire.report(model)
    assert {u.chunks for u in plan.units} != {1}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert peak_bytes(training_step(model, inputs)) <= budget
    assert revwire.verify(model, inputs).bit_exact
    assert "in 2" in str(plan)
    assert plan.to_dict()["chains"][0]["units"][0]["chunks"] == plan.units[0].chunks


class Stages(nn.Module):
    """Blocks on all tokens, and on a fourth of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Net(linear, 3), Net(linear, 3)

    def forward(self, x):
        return self.second(self.first(x)[:, ::4])


@pytest.mark.parametrize("budget", [0.7, "least"])
def test_only_units_that_need_it_are_cut_for_a_budget(budget):
    inputs = torch.randn(16, 128, WIDTH)
    model = Stages()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    whole = revwire.plan(model, inputs, memory_budget="least", chunks=1).forecast.peak_bytes
    revwire.convert(
        model, inputs, memory_budget=budget if budget == "least" else int(budget * whole), coupling="re2tal"
    )
    first, second = ([u.chunks for u in chain.units] for chain in revwire.report(model).chains)
    assert min(first) < max(first) or min(first) > 1
    assert max(first) > max(second)
    assert min(second) == 1
    predicted = revwire.report(model).forecast.peak_bytes
    assert peak_bytes(training_step(model, inputs)) == pytest.approx(predicted, rel=0.05)
    assert revwire.verify(model, inputs).bit_exact


@pytest.mark.parametrize("share", [1.0, 1.5, 3.0])
def test_peaks_of_mixes_in_chunks_come_as_predicted(share):
    inputs = torch.randn(16, 64, WIDTH)
    model = Net(Attention, 6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    least = revwire.plan(model, inputs, memory_budget="least", chunks=4).forecast.peak_bytes
    revwire.convert(model, inputs, memory_budget=int(least * share), chunks=4)
    predicted = revwire.report(model).forecast.peak_bytes
    assert peak_bytes(training_step(model, inputs)) == pytest.approx(predicted, rel=0.15)
    assert revwire.verify(model, inputs).bit_exact


# -- the door ----------------------------------------------------------------------------------------------------------


def test_globs_name_units_or_hosts():
    model = revwire.convert(Net(Attention), INPUTS, chunks={"*.mlp": 3, "blocks.1": 2})
    assert [u.chunks for u in revwire.report(model).units] == [1, 3, 2, 3, 1, 3]
    assert "4 whole" not in str(revwire.report(model))
    assert "3 in 3, 1 in 2, 2 whole" in str(revwire.report(model))
    assert [u.chunks for u in revwire.plan(revwire.revert(model), INPUTS, chunks=2).units] == [2] * 6
    assert "chunks" not in str(revwire.plan(model, INPUTS))


@pytest.mark.parametrize("chunks", [0, -1, 2.0, True, "two", {"*": 0}])
def test_what_is_no_number_of_chunks_is_refused(chunks):
    with pytest.raises(revwire.ConversionError, match=r"chunks: got .*; expected a number of chunks from 1"):
        revwire.convert(Net(linear), INPUTS, chunks=chunks)


def test_a_glob_that_matches_nothing_is_refused_and_the_model_stays():
    model = Net(linear)
    with pytest.raises(revwire.ConversionError, match=r"chunks: got the glob 'layers.\*'"):
        revwire.convert(model, INPUTS, chunks={"layers.*": 2})
    assert "forward" not in vars(model.blocks[0])
    revwire.convert(model, INPUTS)


def test_a_model_that_cannot_run_in_eval_mode_says_so():
    class TrainOnly(Net):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("no inference here")
            return super().forward(x)

    model = TrainOnly(linear)
    with pytest.raises(revwire.ConversionError, match=r"chunks= looks at the model in eval mode.*no inference here"):
        revwire.convert(model, INPUTS, chunks=2)
    revwire.convert(model, INPUTS, memory_budget="least")
    assert {u.chunks for u in revwire.report(model).units} == {1}


def test_a_model_that_cannot_run_in_train_mode_is_cut_along_the_batch():
    class EvalOnly(Net):
        def forward(self, x):
            if self.training:
                raise RuntimeError("wants labels")
            return super().forward(x)

    model = revwire.convert(EvalOnly(linear).eval(), INPUTS, chunks=2)
    assert dims_of(model) == [(0,), (0,)]


def test_the_first_call_may_be_the_example():
    model = revwire.convert(Net(Attention), chunks=2)
    model(INPUTS)
    assert {u.chunks for u in revwire.report(model).units} == {2}
    assert revwire.verify(model, INPUTS).bit_exact
