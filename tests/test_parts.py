"""Cores in parts: what a branch computes from products of activations runs head by head, or query by query, to the bit."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from revwire._convert import converted
from revwire._parts import parts_of
from revwire.measure import peak_bytes

WIDTH, HEADS, TOKENS = 16, 4, 48
INPUTS = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Self-attention that is spelled out; what lies between the scores and their softmax differs."""

    def __init__(self, p=0.0):
        super().__init__()
        self.mix, self.out, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(p)

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = self.drop(self.scores(q, k).softmax(-1))
        return self.out((a @ v).transpose(1, 2).flatten(2))

    def scores(self, q, k):
        return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5


class Biased(Attention):
    """With a learned bias for each head, and a mask for all."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * TOKENS - 1))
        self.register_buffer("mask", torch.ones(TOKENS, TOKENS).tril().log())

    def scores(self, q, k):
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
        return super().scores(q, k) + self.bias[:, distance] + self.mask


class InPlace(Attention):
    """Writes to its scores."""

    def scores(self, q, k):
        scores = super().scores(q, k)
        scores += torch.ones(TOKENS, TOKENS).tril().log()
        return scores.mul_(0.5)


class Scaled(Attention):
    """A learned temperature for each head."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEADS, 1, 1))

    def scores(self, q, k):
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale


class Merged(nn.Module):
    """Heads and samples in one dimension, by batched products; one key and value for two heads."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1)
        k, v = self.kv(x).unflatten(-1, (2, HEADS // 2, -1)).permute(2, 0, 3, 1, 4).repeat_interleave(2, 2).flatten(1, 2)
        a = F.softmax(torch.baddbmm(torch.zeros(1, 1, 1), q, k.mT), dim=-1)
        return self.out(torch.bmm(a, v).unflatten(0, (len(x), HEADS)).transpose(1, 2).flatten(2))


class Einsum(Attention):
    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        a = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", a, v).reshape(*x.shape))


class Masked(Biased):
    """The products are inside of one call, which makes the scores where the bias wants a gradient."""

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, distance]).transpose(1, 2).flatten(2))


class Sized(Attention):
    """Spells its sizes in the middle."""

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.mix(x).view(b, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        a = self.scores(q, k).view(1, b, HEADS, n, n).softmax(-1).view(b, HEADS, n, n)
        return self.out((a @ v).transpose(1, 2).reshape(b, n, -1))


class Block(nn.Module):
    def __init__(self, branch):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), branch

    def forward(self, x, *extras):
        return x + self.branch(self.norm(x), *extras)


class Net(nn.Module):
    def __init__(self, make=Attention, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(make()) for _ in range(depth))

    def forward(self, x, *extras):
        for block in self.blocks:
            x = block(x, *extras)
        return x


def net(make=Attention, chunks=2, x=INPUTS, depth=3, **options):
    return revwire.convert(Net(make, depth).train(), x, chunks=chunks, **options)


def parts(model):
    """By module: in how many parts its core runs."""
    return {p.forward.path: p.forward.parts for p in converted(model).parted}


def step(model, *inputs):
    """(outputs, gradients of the input and of all weights, the generator's state) of a step."""
    torch.manual_seed(7)
    x = inputs[0].clone().requires_grad_()
    y = model(x, *inputs[1:])
    out = y if isinstance(y, torch.Tensor) else y[0]
    weights = [p for p in model.parameters() if p.requires_grad]
    return y, torch.autograd.grad(out.square().sum(), [x, *weights], allow_unused=True), torch.get_rng_state()


def assert_equal(a, b):
    assert len(a[1]) == len(b[1])
    assert torch.equal(a[0], b[0])
    for one, other in zip(a[1], b[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert torch.equal(a[2], b[2])


KINDS = (Attention, Biased, InPlace, Scaled, Merged, Einsum, Masked, Sized, lambda: Attention(0.3))


@pytest.mark.parametrize("coupling", ["re2tal", "bdia"])
@pytest.mark.parametrize("make", KINDS)
def test_gradients_are_those_of_stored_activations(make, coupling):
    model = net(make, coupling=coupling)
    assert parts(model) == {f"blocks.{i}.branch": 2 for i in range(3)}
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))
    assert all(p.forward.programs for p in converted(model).parted)


@pytest.mark.parametrize("make", KINDS)
def test_float_streams_rebuild_what_goes_into_a_core_up_to_rounding(make):
    model = net(make, coupling="re2tal", exact=False)
    found = step(model, INPUTS)
    assert all(p.forward.programs for p in converted(model).parted)
    with revwire.stored_activations(model):
        y, gradients, _ = step(model, INPUTS)
    assert torch.equal(found[0], y)
    for g, stored in zip(found[1], gradients, strict=True):
        assert (g - stored).abs().max() <= 1e-4 * stored.abs().max()


@pytest.mark.parametrize("make", KINDS[:-1])
def test_the_function_is_that_of_whole_cores(make):
    model, whole = net(make), net(make, chunks=1)
    assert not parts(whole)
    for a, b in zip((step(model, INPUTS)[0], *step(model, INPUTS)[1]), (step(whole, INPUTS)[0], *step(whole, INPUTS)[1]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("make", [*KINDS, Merged])
def test_without_gradients_it_is_the_same_function(make):
    model = net(make).eval()
    with_gradients = model(INPUTS)
    with torch.no_grad():
        same = model(INPUTS)
    with torch.inference_mode():
        again = model(INPUTS)
    allowed = 1e-6 if make is Masked else 0  # its call takes another kernel
    assert (with_gradients - same).abs().max() <= allowed
    assert torch.equal(same, again)


@pytest.mark.parametrize(("chunks", "sizes"), [(2, [2, 2]), (3, [2, 2]), (4, [1] * 4), (8, [6] * 8), (100, [1] * TOKENS)])
def test_heads_come_before_queries(chunks, sizes):
    model = net(chunks=chunks)
    assert set(parts(model).values()) == {len(sizes)}
    found = step(model, INPUTS)
    program = next(iter(converted(model).parted[0].forward.programs.values()))
    call = next(v for v in vars(program)["compiled"].run.__globals__.values() if type(v).__name__ == "InParts")
    assert [length for _, length in call.border.parts(chunks)] == sizes
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


@pytest.mark.parametrize("size", [1, 2, 5, 7])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_parts_cover_all_and_are_no_more_than_asked(size, count):
    found = parts_of(size, count)
    assert [i for start, length in found for i in range(start, start + length)] == list(range(size))
    assert len(found) <= count


def test_a_branch_without_products_of_activations_has_no_core():
    model = net(lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()))
    assert not parts(model)


def test_a_core_that_is_smaller_than_its_inputs_stays_whole():
    x = INPUTS[:, :4]
    assert not parts(net(x=x))


class Maps(Attention):
    """Returns the scores at each stage, as large as all that it makes inside."""

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        a = scores.softmax(-1)
        return self.out((a @ v).transpose(1, 2).flatten(2)), scores, a


class OneMap(Attention):
    """Returns its map."""

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = self.drop(self.scores(q, k).softmax(-1) + 0.1)
        return self.out((a @ v).transpose(1, 2).flatten(2)), a


class WithMaps(Net):
    """Blocks whose branches return more than F(x)."""

    def forward(self, x):
        found = []
        for block in self.blocks:
            f, *maps = block.branch(block.norm(x))
            x = x + f
            found += maps
        return x, *found


def test_where_all_that_is_made_is_returned_nothing_is_gained():
    model = revwire.convert(WithMaps(Maps), INPUTS, chunks=2)
    assert not parts(model)


def test_what_is_returned_beside_the_result_has_its_gradient():
    model = revwire.convert(WithMaps(lambda: OneMap(0.1)), INPUTS, chunks=2)
    assert set(parts(model).values()) == {2}

    def gradients():
        torch.manual_seed(0)
        out, *maps = model(INPUTS)
        loss = out.sum() + sum((i + 1) * m.square().sum() for i, m in enumerate(maps))
        return torch.autograd.grad(loss, list(model.parameters()))

    found = gradients()
    with revwire.stored_activations(model):
        assert all(map(torch.equal, found, gradients()))


def test_a_batch_that_is_cut_leaves_the_rest_to_the_cores():
    x = torch.randn(2, TOKENS, WIDTH)
    model = net(chunks=8, x=x)
    assert {(u.chunks, u.parts) for u in revwire.report(model).units} == {(2, 4)}
    assert "3 in 2 (core in 4)" in str(revwire.report(model))
    found = step(model, x)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, x))


def test_other_shapes_are_cut_too():
    model = net(chunks=4)
    for n in (TOKENS, 24, 2, TOKENS):  # two tokens: no core that is worth it
        x = torch.randn(3, n, WIDTH)
        found = step(model, x)
        with revwire.stored_activations(model):
            assert_equal(found, step(model, x))
    forward = converted(model).parted[0].forward
    assert (len(forward.programs), len(forward.whole)) == (2, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    x = INPUTS.to(dtype)
    model = revwire.convert(Net().to(dtype), x, chunks=2)
    found = step(model, x)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, x))
    assert converted(model).parted[0].forward.programs


def test_autocast():
    model = net(lambda: Attention(0.2))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(INPUTS)
    y.float().square().sum().backward()  # outside, as usual
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with revwire.stored_activations(model):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            torch.manual_seed(0)
            stored = model(INPUTS)
        stored.float().square().sum().backward()
        torch.manual_seed(0)
    again = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        y = model(INPUTS)
    y.float().square().sum().backward()
    assert torch.equal(y, stored)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), again, strict=True))
    assert not all(map(torch.equal, found, again))  # other random numbers


def test_frozen_weights_and_inputs_without_gradient():
    model = net(Biased)
    for block in model.blocks:
        block.branch.mix.requires_grad_(False)
    model.blocks[0].requires_grad_(False)

    def gradients():
        weights = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(model(INPUTS).square().sum(), weights)

    found = gradients()
    with revwire.stored_activations(model):
        assert all(map(torch.equal, found, gradients()))


def test_a_retained_graph_and_several_forwards():
    model = net(lambda: Attention(0.2))
    torch.manual_seed(0)
    first, second = model(INPUTS), model(2 * INPUTS)
    weights = list(model.parameters())
    once = torch.autograd.grad(first.sum(), weights, retain_graph=True)
    other = torch.autograd.grad(second.sum(), weights)
    assert all(map(torch.equal, once, torch.autograd.grad(first.sum(), weights)))
    assert not all(map(torch.equal, once, other))


def test_a_double_backward_is_refused_and_possible_when_stored():
    model = net(memory_budget="1GB")
    assert {u.mode for u in revwire.report(model).units} == {"stored"}
    x = INPUTS.clone().requires_grad_()
    with pytest.raises(revwire.UnsupportedTransformError, match=r"create_graph=True.*stored_activations"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with revwire.stored_activations(model):
        (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), x)


def test_forward_mode_is_refused():
    model = net()
    with pytest.raises(revwire.UnsupportedTransformError):
        torch.func.jvp(model, (INPUTS,), (INPUTS,))


@pytest.mark.parametrize("mode", ["stored", "reversible"])
def test_another_mode_in_backward_is_an_error(mode):
    model = net(lambda: Attention(0.5), memory_budget="1GB" if mode == "stored" else None)
    assert {u.mode for u in revwire.report(model).units} == {mode}
    loss = model(INPUTS).sum()
    for block in model.blocks:
        block.branch.drop.eval()
    with pytest.raises(revwire.ReconstructionError, match="between forward and backward"):
        loss.backward()


def test_a_weight_that_is_written_to_is_an_error():
    model = net(Biased, memory_budget="1GB")
    loss = model(INPUTS).sum()
    with torch.no_grad():
        model.blocks[1].branch.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Deciding(Attention):
    """Looks at values."""

    def scores(self, q, k):
        return super().scores(q, k) * (2 if q.sum().item() > 0 else 1)


class Counting(Attention):
    """Keeps something in an attribute."""

    def forward(self, x):
        self.last = x.shape[1]
        return super().forward(x)


@pytest.mark.parametrize("make", [Deciding, Counting])
def test_a_module_that_cannot_be_captured_runs_whole(make):
    model = net(make)
    assert not parts(model)
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


class Sometimes(Attention):
    """Decides on values where it is told to."""

    decides = False

    def scores(self, q, k):
        return super().scores(q, k) * (2 if self.decides and q.sum().item() > 0 else 1)


def test_a_call_that_cannot_be_captured_runs_whole():
    model = net(Sometimes)
    assert parts(model)
    step(model, INPUTS)
    for block in model.blocks:
        block.branch.decides = True
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))
    forward = converted(model).parted[0].forward
    assert (len(forward.programs), len(forward.whole)) == (1, 1)


def test_hooks_on_the_module_run_and_those_inside_of_a_core_keep_it_whole():
    model, seen = net(), []
    model.blocks[0].branch.register_forward_hook(lambda *_: seen.append("attention"))
    model.blocks[1].branch.drop.register_forward_hook(lambda *_: seen.append("dropout"))
    found = step(model, INPUTS)
    assert seen.count("attention") >= 2
    assert seen.count("dropout") >= 2
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


def test_copies_and_pickles_run_in_parts_alike():
    model = net(chunks=4)
    found = step(model, INPUTS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(found, step(other, INPUTS))
        assert parts(other) == parts(model)
        mine = converted(other).parted[0].forward
        assert mine.module is other.blocks[0].branch
        assert mine.programs
        assert mine.parting.chain is converted(other).chains[0]


def test_revert_takes_it_off_and_names_stay():
    model = Net()
    names, kept = list(model.state_dict()), copy.deepcopy(model)
    revwire.convert(model, INPUTS, chunks=4)
    assert list(model.state_dict()) == names
    revwire.revert(model)
    assert not [m for m in model.modules() if "forward" in vars(m)]
    assert torch.equal(model(INPUTS), kept(INPUTS))


def test_a_plan_says_it_and_leaves_the_model():
    model = Net()
    plan = revwire.plan(model, INPUTS, chunks=4)
    assert [u.parts for u in plan.units] == [4, 4, 4]
    assert "3 whole (core in 4)" in str(plan)
    assert plan.to_dict()["chains"][0]["units"][0]["parts"] == 4
    assert not [m for m in model.modules() if "forward" in vars(m)]


def test_globs_choose_the_units():
    model = net(chunks={"blocks.1*": 4, "blocks.2*": 2})
    assert parts(model) == {"blocks.1.branch": 4, "blocks.2.branch": 2}


def long(**options):
    torch.manual_seed(0)
    x = torch.randn(1, 256, WIDTH)
    model = revwire.convert(Net(depth=4), x, coupling="re2tal", **options)

    def run():
        model(x).square().sum().backward()

    run()
    return model, run


def test_a_step_holds_the_scores_of_one_part():
    peaks = [peak_bytes(long(chunks=count)[1]) for count in (1, 2, 4, 16)]
    scores = 4 * HEADS * 256 * 256
    assert peaks[0] > 2 * scores
    assert peaks[1] < 0.6 * peaks[0]
    assert peaks[2] < 0.6 * peaks[1]
    assert peaks[3] < 0.6 * peaks[2]


def test_the_forward_holds_the_scores_of_one_part():
    def forward(chunks):
        model, _ = long(chunks=chunks)
        x = torch.randn(1, 256, WIDTH)
        with torch.no_grad():
            model(x)  # is captured
            return peak_bytes(lambda: model(x))

    assert forward(4) < 0.5 * forward(1)


def test_stored_units_keep_what_goes_into_a_core():
    scores = 4 * HEADS * 256 * 256
    model, run = long(chunks=4, memory_budget="1GB")
    assert {u.mode for u in revwire.report(model).units} == {"stored"}
    assert peak_bytes(run) < 2 * scores


def test_a_budget_below_what_whole_cores_need_is_met_in_parts():
    whole, _ = long(memory_budget="least", chunks=1)
    need = revwire.report(whole).forecast.peak_bytes
    model, run = long(memory_budget=need // 2)
    assert max(parts(model).values()) > 1
    assert peak_bytes(run) <= 1.02 * (need // 2)
    least, _ = long(memory_budget="least")
    assert revwire.report(least).forecast.peak_bytes < 0.3 * need


def test_a_budget_that_whole_cores_fit_leaves_them_whole():
    model, _ = long(memory_budget="1GB")
    assert not parts(model)
    assert not [m for m in model.modules() if type(vars(m).get("forward")).__name__ == "PartedForward"]


class Flat(nn.Module):
    """A block whose code holds the core itself, beside the residual add: it cannot be opened twice."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.mix(x).chunk(3, -1)
        return x + (q @ k.mT).softmax(-1) @ v


def test_a_core_in_the_code_of_the_host_stays_whole():
    model = revwire.convert(nn.Sequential(*(Flat() for _ in range(3))), INPUTS, chunks=2)
    assert not parts(model)
    assert [u.parts for u in revwire.report(model).units] == [1, 1, 1]


def test_whole_modules_have_cores_too():
    model = revwire.convert(Net(), INPUTS, whole="blocks.*", chunks=2)
    assert set(parts(model).values()) == {2}
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


def test_shared_attention_runs_in_parts_wherever_it_runs():
    shared = Attention()
    model = net(lambda: shared)
    found = step(model, INPUTS)
    assert list(parts(model).values()) == [2]
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


class Cached(Attention):
    """Appends its keys to a cache that it is given."""

    def forward(self, x, cache):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        k = cache.longer(k)
        return self.out(((q @ k.mT).softmax(-1)[..., : v.shape[-2]] @ v).transpose(1, 2).flatten(2))


class Cache:
    def __init__(self):
        self.keys = []

    def longer(self, k):
        self.keys.append(k)
        return torch.cat(self.keys[-1:], -2) if len(self.keys) < 4 else torch.cat(self.keys, -2)[:, :, :-1]


def test_looking_for_chunks_leaves_what_a_branch_writes_to():
    cache = Cache()
    model = revwire.convert(Net(Cached), (INPUTS, cache), chunks=2)
    assert not cache.keys
    assert model(INPUTS, Cache()).shape == INPUTS.shape
