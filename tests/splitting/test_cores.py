"""Cores in parts: what a branch computes from products of activations runs head by head, or query by query, to the
bit.
"""

import copy
import pickle
from collections import UserList

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import revwire
from cases import spread
from revwire._forwards.converted import converted
from revwire._splitting import core_relations
from revwire._splitting import core_search as cores
from revwire._splitting.core_function import parts_of
from revwire.measure import peak_bytes
from toys import Blocks

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
        k, v = (
            self.kv(x).unflatten(-1, (2, HEADS // 2, -1)).permute(2, 0, 3, 1, 4).repeat_interleave(2, 2).flatten(1, 2)
        )
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
        return self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, distance]).transpose(1, 2).flatten(2)
        )


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


class Net(Blocks):
    def __init__(self, make=Attention, depth=3):
        super().__init__(lambda: Block(make()), depth)


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


@pytest.mark.parametrize(("make", "coupling"), spread(KINDS, ["re2tal", "bdia"]))
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
    for a, b in zip(
        (step(model, INPUTS)[0], *step(model, INPUTS)[1]),
        (step(whole, INPUTS)[0], *step(whole, INPUTS)[1]),
        strict=True,
    ):
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


@pytest.mark.parametrize(
    ("chunks", "sizes"), [(2, [2, 2]), (3, [2, 2]), (4, [1] * 4), (8, [6] * 8), (100, [1] * TOKENS)]
)
def test_heads_come_before_queries(chunks, sizes):
    model = net(chunks=chunks)
    assert set(parts(model).values()) == {len(sizes)}
    found = step(model, INPUTS)
    program = next(iter(converted(model).parted[0].forward.programs.values()))
    call = next(v for v in vars(program)["compiled"].run.__globals__.values() if type(v).__name__ == "InParts")
    assert [length for _, length in parts_of(call.border.size, chunks)] == sizes
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


class ScaledMap(Attention):
    """As most of Hugging Face's: scores, their scaling, and a map that is returned, without dropout."""

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = F.dropout((torch.matmul(q, k.transpose(2, 3)) * 0.5).softmax(-1), 0.0, self.training)
        return self.out((a @ v).transpose(1, 2).flatten(2)), a


def test_a_map_that_is_returned_and_dropped_leaves_a_core():
    class Dropping(Attention):
        def __init__(self):
            super().__init__()
            self.inner = ScaledMap()

        def forward(self, x):
            return self.inner(x)[0]

    model = net(Dropping)
    assert set(parts(model)) == {f"blocks.{i}.branch.inner" for i in range(3)}
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


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
def test_another_mode_in_backward_does_not_matter(mode):
    model = net(lambda: Attention(0.5), memory_budget="1GB" if mode == "stored" else None)
    assert {u.mode for u in revwire.report(model).units} == {mode}
    torch.manual_seed(0)
    expected = torch.autograd.grad(model(INPUTS).sum(), list(model.parameters()))
    torch.manual_seed(0)
    loss = model(INPUTS).sum()
    for block in model.blocks:
        block.branch.drop.eval()
    assert all(map(torch.equal, expected, torch.autograd.grad(loss, list(model.parameters()))))


def test_a_core_that_computes_other_values_in_backward_is_an_error(monkeypatch):
    model = net(memory_budget="1GB")
    loss = model(INPUTS).sum()
    forward = converted(model).parted[1].forward
    (program,) = forward.programs.values()
    (call,) = [v for v in program.compiled.run.__globals__.values() if type(v).__name__ == "InParts"]
    monkeypatch.setattr(
        call, "run", lambda module, size, *inputs, run=call.run: tuple(2 * out for out in run(module, size, *inputs))
    )
    with pytest.raises(revwire.ReconstructionError, match="a core in parts computed other values"):
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
    model, seen = net(), UserList()  # no recompute puts it back
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


# -- what is told apart by comparing with whole cores ------------------------------------------------------------------


def assert_as_whole(make, chunks, x=INPUTS, before=lambda model: None, runs=True, allowed=1e-5, repeats=True):
    """The step of a converted model is that of one with whole cores, and to the bit that of stored activations."""
    whole, model = (
        revwire.convert(Net(make).to(x.dtype).train(), x, chunks=count, coupling="re2tal") for count in (1, chunks)
    )
    for m in (whole, model):
        before(m)
    found, expected = step(model, x), step(whole, x)
    for a, b in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        assert (a - b).abs().max() <= allowed * b.abs().max()
    ran = [bool(p.forward.programs) for p in converted(model).parted]
    assert ran == [True] * 3 if runs else not any(ran)
    with revwire.stored_activations(model):
        if repeats:
            assert_equal(found, step(model, x))
    return model


def scored(scores, init=lambda module: None):
    """Attention with other scores."""

    class Scored(Attention):
        def __init__(self):
            super().__init__()
            init(self)

        def scores(self, q, k):
            return scores(self, super().scores(q, k))

    return Scored


def with_module(make, factor=1.0):
    return scored(lambda self, a: self.inner(a * factor), lambda self: setattr(self, "inner", make()))


def places(_=None):
    return torch.arange(TOKENS)


INTEGERS = {
    "flip": lambda _, a: a - 0.1 * (places().flip(0)[:, None] - places()).abs(),
    "roll": lambda _, a: a + torch.arange(HEADS).roll(1)[:, None, None] * places() * 0.1,
    "index": lambda _, a: a - 0.1 * (places().mul(2)[places().mul(7).remainder(TOKENS)][:, None] - places()).abs(),
    "cumsum": lambda _, a: a + 0.1 * (a.mean(-1) > 0).long().cumsum(-1)[..., None],
    "tril": lambda _, a: a.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.long).tril() == 0, float("-inf")),
    "sort": lambda _, a: a + 0.01 * a.mean(-1).argsort(-1)[..., None],
}


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_cut_where_each_part_stands_alone(name, chunks):
    model = assert_as_whole(scored(INTEGERS[name]), chunks)
    assert set(parts(model).values()) == {chunks if name not in ("cumsum", "sort") else min(chunks, HEADS)}


class Softmax(nn.Module):
    """What its repr does not say: the dimension."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, a):
        return a.softmax(self.dim)


def test_modules_that_look_alike_are_told_apart():
    dims = iter((-1, 1, 1) * 2)
    model = assert_as_whole(with_module(lambda: Softmax(next(dims))), 2)
    assert model(INPUTS).shape == INPUTS.shape


def test_what_is_changed_below_a_module_after_a_step_counts():
    def change(model):
        step(model, INPUTS)
        for block in model.blocks:
            block.branch.inner[0].dim = 1

    assert_as_whole(with_module(lambda: nn.Sequential(Softmax(-1), nn.Identity())), 2, before=change)


def test_hooks_below_a_module_after_a_step_see_the_whole():
    def hook(model):
        step(model, INPUTS)
        for block in model.blocks:
            block.branch.inner[0].register_forward_hook(lambda m, args, out: out / out.max())

    assert_as_whole(with_module(lambda: nn.Sequential(Softmax(-1), nn.Identity())), 2, before=hook, allowed=1e-4)


class Held(nn.Module):
    """Uses a weight that it did not register."""

    weight = nn.Parameter(torch.tensor([1.3]))

    def __init__(self):
        super().__init__()
        self.held = [self.weight]

    def forward(self, a):
        return a * self.held[0]


def test_weights_that_are_not_registered_get_their_gradient():
    model = net(with_module(Held))

    def gradient():
        return torch.autograd.grad(model(INPUTS).square().sum(), Held.weight)[0]

    found = gradient()
    with revwire.stored_activations(model):
        assert torch.equal(found, gradient())


class WriteAfterRead(Attention):
    """Reads a statistic of the step before, by a longer way than that by which it writes the new one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stat", torch.full((), 5.0))

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = self.scores(q, k).softmax(-1)
        with torch.no_grad():
            energy = a.detach().square().sum()
            read = energy.log().exp().mul(2).sub(energy) * self.stat
            self.stat.copy_(energy)
        return self.out((a @ v).transpose(1, 2).flatten(2)) + read / 100


def test_reads_stay_before_writes():
    assert_as_whole(WriteAfterRead, 4, repeats=False)


class Clipped(nn.Module):
    def forward(self, a):
        return a * (6 / a.abs().max()) if a.abs().max().item() > 6 else a


class Scaling(nn.Module):
    """Acts on the gradient by a hook."""

    def forward(self, a):
        if a.requires_grad:
            a.register_hook(lambda g: g / g.norm())
        return a


@pytest.mark.parametrize(("make", "factor"), [(Clipped, 10.0), (Scaling, 1.0)])
def test_modules_whose_code_does_more_stay_whole(make, factor):
    assert_as_whole(with_module(make, factor), 2, runs=False)


class Saving(nn.Module):
    """Keeps what it was given, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, a):
        self.map = a.detach()
        self.seen.append(a.shape)
        return a * 2


def test_looking_for_cores_calls_no_module():
    model = net(with_module(Saving))
    assert not model.blocks[0].branch.inner.seen
    model(INPUTS)
    assert model.blocks[0].branch.inner.map.shape == (1, HEADS, TOKENS, TOKENS)
    assert set(model.blocks[0].branch.inner.seen) == {(1, HEADS, TOKENS, TOKENS)}


class Averaging(Attention):
    """Keeps a moving average of what its map holds, detached."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stat", torch.zeros(()))

    def forward(self, x):
        q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        a = self.scores(q, k).softmax(-1)
        self.stat.mul_(0.9).add_(a.detach().amax(), alpha=0.1)
        return self.out((a @ v).transpose(1, 2).flatten(2))


def test_what_needs_no_gradient_inside_needs_none_outside():
    model = net(Averaging)
    for _ in range(2):
        model(INPUTS).sum().backward()
        assert not model.blocks[0].branch.stat.requires_grad
    copy.deepcopy(model)


def test_statistics_of_all_heads_are_not_those_of_each():
    def norm(self, a):
        return 8 * F.group_norm(a * torch.tensor([1.0, 4, 16, 64], dtype=a.dtype)[:, None, None], 1)

    x = torch.randn(1, 128, WIDTH)
    assert_as_whole(scored(norm), 4, x, runs=False)
    assert_as_whole(scored(norm), 4, x.bfloat16(), runs=False, allowed=0)


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize(
    "scores",
    [
        lambda _, a: a**2,
        lambda _, a: a - a.max(-1, keepdim=True).values,
        lambda _, a: a - a.topk(3, -1).values[..., -1:],
        lambda _, a: torch.cat(a.chunk(2, -1)[::-1], -1),
        lambda _, a: a - a.detach().logsumexp(-1, keepdim=True),
    ],
    ids=["power", "max", "topk", "chunks", "logsumexp"],
)
def test_calls_with_several_results_and_operators_belong_to_a_core(scores, chunks):
    assert_as_whole(scored(scores), chunks)


def test_a_statistic_of_all_that_goes_in_again_leaves_less_or_nothing_of_a_core():
    model = assert_as_whole(scored(lambda _, a: a / (a.std() + 1)), 2, runs=False)
    assert not parts(model)


def test_a_weight_that_is_used_outside_too_has_the_gradient_of_stored_activations():
    class Tempered(Attention):
        def __init__(self):
            super().__init__()
            self.t = nn.Parameter(torch.full((1,), 1.7))

        def scores(self, q, k):
            return super().scores(q, k) * self.t

        def forward(self, x):
            return super().forward(x) * self.t

    for chunks in (4, 8, 16):
        assert_as_whole(Tempered, chunks)


def test_one_input_may_be_cut_along_two_dimensions():
    def scores(self, a):
        d = self.distance.sin()
        return a + d.unsqueeze(0) + d.T.unsqueeze(0)

    def init(module):
        module.register_buffer("distance", torch.randn(TOKENS, TOKENS))

    assert_as_whole(scored(scores, init), 8)


def test_dropout_inside_of_a_call_does_not_hide_how_it_may_be_cut():
    class Fused(Masked):
        def forward(self, x):
            q, k, v = self.mix(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
            f = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias[:, distance], dropout_p=0.2)
            return self.out(f.transpose(1, 2).flatten(2))

    model = net(Fused)
    assert parts(model)
    found = step(model, INPUTS)
    with revwire.stored_activations(model):
        assert_equal(found, step(model, INPUTS))


def test_many_products_are_looked_through_in_no_time(monkeypatch):
    class Iterating(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            q = self.q(x)
            a = (q @ q.mT).softmax(-1)
            for _ in range(16):
                a = 0.25 * a @ (13 * torch.eye(a.shape[-1]) - a @ a)
            return a @ q

    grown, original = [], cores.CoreSearch.grown
    monkeypatch.setattr(cores.CoreSearch, "grown", lambda self, *args: grown.append(args) or original(self, *args))
    revwire.plan(Net(Iterating), INPUTS, chunks=2)
    assert len(grown) <= 3 * 34 * 2


def test_a_module_whose_code_stands_in_its_hosts_program_is_no_part():
    """The residual add lies inside of the attention, so the block's program holds its code."""

    class Adding(Attention):
        def forward(self, x, residual):
            return residual + super().forward(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(WIDTH), Adding()

        def forward(self, x):
            return self.attention(self.norm(x), x)

    model = revwire.convert(nn.Sequential(*(Outer() for _ in range(3))), INPUTS, chunks=2)
    assert not parts(model)
    assert {u.parts for u in revwire.report(model).units} == {1}


def test_shorter_inputs_without_gradients_run_whole():
    model = net(chunks=8).eval()
    model(INPUTS).sum().backward()
    forward = converted(model).parted[0].forward
    with torch.no_grad():
        for n in (5, 6, 7):
            model(INPUTS[:, :n])
        assert len(forward.programs) == 1
        model(INPUTS)
    assert len(forward.programs) == 2


def test_what_is_known_of_calls_is_bounded(monkeypatch):
    monkeypatch.setattr(core_relations, "_MOST_KNOWN", 10)
    model = net(chunks=2)
    for n in (20, 21, 22):
        step(model, torch.randn(1, n, WIDTH))
    assert len(converted(model).parted[0].forward.known) <= 10


def test_a_program_that_gives_something_else_is_not_kept(monkeypatch):
    """The last line of defence: relations that do not hold."""
    monkeypatch.setattr(core_relations, "alike", lambda part, whole: part.shape == whole.shape)
    scores = scored(lambda _, a: a.cumsum(1).flip(1))
    model = net(scores)
    assert parts(model)
    found = step(model, INPUTS)
    assert not any(p.forward.programs for p in converted(model).parted)
    assert torch.equal(found[0], step(net(scores, chunks=1), INPUTS)[0])


def test_rows_that_see_nothing_are_alike():
    def scores(_, a):
        mask = torch.ones(TOKENS, TOKENS).triu() == 1  # the first query sees nothing
        return a.masked_fill(mask, float("-inf"))

    class Blind(scored(scores)):
        def forward(self, x):
            return super().forward(x).nan_to_num(0.0)

    model, whole = net(Blind, 8), net(Blind, 1)
    with torch.no_grad():
        assert torch.allclose(model(INPUTS), whole(INPUTS), atol=1e-5)
    assert converted(model).parted[0].forward.programs


@pytest.mark.parametrize("chunks", [4, 8])
def test_a_core_by_queries_takes_in_no_view_whose_gradient_would_be_larger(chunks):
    model = net(chunks=chunks)
    step(model, INPUTS)
    (program,) = converted(model).parted[0].forward.programs.values()
    (call,) = [v for v in program.compiled.run.__globals__.values() if type(v).__name__ == "InParts"]
    sizes = sorted(shape.numel() for shape in call.border.shapes)
    assert sizes == ([3 * TOKENS * WIDTH] if chunks == 4 else [TOKENS * WIDTH] * 3)
