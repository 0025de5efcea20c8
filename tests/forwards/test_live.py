"""The own code of a host runs in each call: what it reads, does, draws and decides is its own, and happens once."""

import contextlib
import copy
import gc
import pickle
import random
import warnings
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import revwire
from steps import TOLERANCE, assert_same_step, step, twin
from toys import Loop, Plain, X, block, stack

EXACT = ("bdia:1/2", "re2tal")


def grads_both_ways(model, *args, seed=0):
    """What a reversible step, and one with stored activations, leave behind: gradients and buffers."""
    before, found = {n: b.clone() for n, b in model.named_buffers()}, []
    for stored in (False, True):
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        with revwire.stored_activations(model) if stored else contextlib.nullcontext():
            found.append(step(model, *args, seed=seed)[1])
    return found


def assert_to_the_bit(model, *args):
    """The reversible gradients are those of stored activations, to the bit."""
    got, want = grads_both_ways(model, *args)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def rewound(forward, init=None, example=X, coupling="bdia:1/2"):
    """A stack of blocks with this forward, converted exactly."""
    model = stack(forward) if init is None else stack(forward, init)
    return revwire.convert(model, example, coupling=coupling)


# -- reads ------------------------------------------------------------------------------------------------------------


class Gained(nn.Module):
    gain = 1.0

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.f.scale = 1.0
        self.settings = SimpleNamespace(deep=SimpleNamespace(scale=1.0))

    def forward(self, x):
        return x + self.f(x) * self.gain * self.f.scale * self.settings.deep.scale


@pytest.mark.parametrize(
    "change",
    [
        lambda b, patch: patch.setattr(Gained, "gain", 0.5),
        lambda b, patch: setattr(b.f, "scale", 0.5),
        lambda b, patch: setattr(b.settings.deep, "scale", 0.5),
    ],
    ids=["class", "child", "nested setting"],
)
def test_what_the_code_reads_has_its_present_value(change, monkeypatch):
    model, reference = twin(Loop(Gained).double())
    assert_same_step(model, reference, X)
    for b in (*model.blocks, *reference.blocks):
        change(b, monkeypatch)
    assert_same_step(model, reference, X)


def test_a_child_that_is_exchanged_later():
    model, reference = twin(stack(lambda self, x: x + self.f(x).tanh()))
    for m in (model, reference):
        torch.manual_seed(1)
        for b in m.blocks:
            b.f = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).double()
    assert_same_step(model, reference, X)
    revwire.revert(model)
    revwire.convert(model, X, coupling="bdia:1/2")
    for b in model.blocks:
        b.f = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5), nn.Dropout(0.3)).double()
    assert_to_the_bit(model, X)


# -- effects ----------------------------------------------------------------------------------------------------------


def test_losses_that_are_handed_out_keep_their_gradients():
    losses = []

    def forward(self, x):
        gate = self.g(x).softmax(-1)
        losses.append(gate.square().sum(-1).mean())
        return x + self.f(x) * gate

    model = rewound(forward)
    found = []
    for stored in (False, True):
        model.zero_grad()
        losses.clear()
        if stored:
            with revwire.stored_activations(model):
                out = model(X)[0]
        else:
            out = model(X)[0]
        assert len(losses) == 3
        (out.sum() + sum(losses)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_what_the_code_counts_is_counted_once():
    def forward(self, x):
        self.calls += 1
        self.last = x.detach().mean()
        return x + self.f(x)

    model = rewound(forward, lambda self: setattr(self, "calls", 0))
    assert [b.calls for b in model.blocks] == [0] * 3
    model(X)[0].sum().backward()
    assert [b.calls for b in model.blocks] == [1] * 3


def test_batch_statistics_in_the_own_code_count_once():
    def forward(self, x):
        h = F.batch_norm(self.f(x).transpose(1, 2), self.mean, self.var, training=True)
        return x + h.transpose(1, 2)

    def init(self):
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    model, reference = twin(stack(forward, init))
    assert_same_step(model, reference, X)
    model = revwire.convert(revwire.revert(model), X, coupling="bdia:1/2")
    assert_to_the_bit(model, X)


# -- draws ------------------------------------------------------------------------------------------------------------


def test_numbers_that_the_code_draws_between_the_calls_of_a_branch():
    def forward(self, x):
        first = torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        h = self.drop(self.f(x)) * first
        second = torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        return x + F.dropout(h, 0.2, self.training) * second

    model, reference = twin(stack(forward, lambda self: setattr(self, "drop", nn.Dropout(0.3))))
    assert_same_step(model, reference, X)
    model = revwire.convert(revwire.revert(model), X, coupling="bdia:1/2")
    assert_to_the_bit(model, X)


def dropped_twice_alike(self, x):
    h, state = self.f(x), torch.get_rng_state()
    h = F.dropout(h, 0.5)
    torch.set_rng_state(state)
    return x + F.dropout(h, 0.5)


def dropped_in_a_fork(self, x):
    h = self.f(x)
    with torch.random.fork_rng(devices=[]):
        h = F.dropout(h, 0.5)
    return x + self.g(h)


@pytest.mark.parametrize("forward", [dropped_twice_alike, dropped_in_a_fork])
def test_a_generator_that_the_code_sets_back(forward):
    model = rewound(forward)
    for _ in range(2):
        assert_to_the_bit(model, X)


def test_a_generator_of_its_own_in_the_code():
    def forward(self, x):
        mask = torch.rand(x.shape, generator=self.generator, dtype=x.dtype) > 0.3
        return x + self.f(x) * mask

    model = rewound(forward, lambda self: setattr(self, "generator", torch.Generator()))
    found = []
    for stored in (False, True):
        for b in model.blocks:
            b.generator.manual_seed(3)
        if stored:
            with revwire.stored_activations(model):
                found.append(step(model, X)[1])
        else:
            found.append(step(model, X)[1])
    torch.testing.assert_close(*found, rtol=0, atol=0)


GENERATOR, CALLS = torch.Generator(), []


class Noisy(torch.autograd.Function):
    """Draws from all generators in its forward, and counts its calls."""

    @staticmethod
    def forward(ctx, h):
        CALLS.append(len(CALLS))
        own, shared = torch.rand(h.shape, generator=GENERATOR, dtype=h.dtype), torch.rand_like(h)
        ctx.factor = own * shared.tanh() * random.random() * CALLS[-1]
        return h * ctx.factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor


class Through(torch.autograd.Function):
    """Runs a module that it is given."""

    @staticmethod
    def forward(ctx, h, module):
        return h + module(h)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_a_custom_function_that_is_given_a_module():
    model = rewound(
        lambda self, x: x + Through.apply(self.f(x), self.norm),
        lambda self: setattr(self, "norm", nn.BatchNorm1d(5)),
    )
    assert_to_the_bit(model, X)


def test_a_custom_function_that_draws_and_counts():
    model = rewound(lambda self, x: x + self.g(Noisy.apply(self.f(x))) * torch.rand(()))
    found = []
    for stored in (False, True):
        random.seed(0)
        GENERATOR.manual_seed(0)
        CALLS.clear()
        with revwire.stored_activations(model) if stored else contextlib.nullcontext():
            found.append(step(model, X)[1])
        assert len(CALLS) == len(model.blocks)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_custom_functions_that_are_made_anew_in_each_call_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("revwire._forwards.host._MOST_OPAQUE", 2)
    made = []

    def forward(self, x):
        class Doubled(torch.autograd.Function):
            @staticmethod
            def forward(ctx, h):
                return 2 * h

            @staticmethod
            def backward(ctx, gradient):
                return 2 * gradient

        made.append(weakref.ref(Doubled))
        return x + self.g(Doubled.apply(self.f(x)).tanh())

    model = rewound(forward)
    assert_to_the_bit(model, X)
    for _ in range(8):
        model(X)[0].sum().backward()
    gc.collect()
    assert len(made) > 8 * len(model.blocks)
    assert sum(one() is not None for one in made) <= 2 * len(model.blocks)


# -- decisions --------------------------------------------------------------------------------------------------------


class LayerDrop(nn.Module):
    """Leaves out blocks by chance, in its loop."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for b in self.blocks:
            if not (self.training and torch.rand(()) < 0.5):
                x = b(x)
        return x


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_are_left_out_by_chance(training):
    torch.manual_seed(0)
    model = LayerDrop(stack(lambda self, x: x + self.f(x).tanh(), depth=6).blocks).double().train(training)
    model, reference = twin(model)
    assert len(revwire.report(model).units) == 6
    for seed in range(4):
        assert_same_step(model.train(), reference.train(), X, seed=seed)
    model = revwire.convert(revwire.revert(model), X, coupling="bdia:1/2").train()
    for seed in range(4):
        got, want = grads_both_ways(model, X, seed=seed)
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("coupling", EXACT)
def test_blocks_that_are_left_out_in_the_loop_that_holds_the_adds(coupling):
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

        def forward(self, x, skipped=()):
            for i, layer in enumerate(self.layers):
                if i not in skipped:
                    x = x + layer(x).tanh()
            return x

    torch.manual_seed(0)
    model, reference = twin(Looping().double())
    for skipped in ((), (1,), (0, 3), (4,), (0, 1, 2, 3, 4)):
        assert_same_step(model, reference, X, skipped)
    model = revwire.convert(revwire.revert(model), X, coupling=coupling)
    for skipped in ((), (1,), (0, 3), (4,)):
        assert_to_the_bit(model, X, skipped)


def test_an_unfinished_unit_keeps_its_gradient():
    def forward(self, x, early=False):
        h = self.f(x).tanh()
        if early:
            return h * 2
        return x + self.g(h)

    model, reference = twin(stack(forward))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert_same_step(model, reference, X, True)
        assert_same_step(model, reference, X, True)
    assert sum("did not come to its residual add" in str(w.message) for w in seen) == 3  # once for each place
    model = revwire.convert(revwire.revert(model), X, coupling="bdia:1/2")
    with pytest.warns(UserWarning, match="did not come to its residual add|something between two units"):
        assert_to_the_bit(model, X, True)


def test_decisions_on_values_in_exact_streams():
    def forward(self, x):
        return x + (self.f(x) if x.sum() > 0 else self.g(x).tanh())

    model = rewound(forward)
    for example in (X, -X):
        assert_to_the_bit(model, example)


def test_no_call_is_captured_anew():
    model = rewound(lambda self, x, t: x + self.f(x) * t, example=(X, 0.5))
    for t in (0.1, 0.2, 0.3):
        assert_to_the_bit(model, X, t)
    assert not any(b.forward.programs for b in model.blocks)


def test_more_and_fewer_steps_than_in_the_example():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block(lambda self, x: x + self.f(x).tanh())()

        def forward(self, x, steps=3):
            for _ in range(steps):
                x = self.block(x)
            return x

    torch.manual_seed(0)
    model, reference = twin(Recurrent().double())
    for steps in (3, 1, 5):
        assert_same_step(model, reference, X, steps)


# -- what a branch is given -------------------------------------------------------------------------------------------


@dataclass
class Condition:
    scale: torch.Tensor


def test_a_gradient_inside_of_an_object():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(8, 8)
            self.blocks = stack(lambda self, x, c: x + self.f(x).tanh() * c.scale).blocks

        def forward(self, x):
            c = Condition(self.c(x))
            for b in self.blocks:
                x = b(x, c)
            return x

    torch.manual_seed(0)
    model = revwire.convert(Conditioned().double(), X, coupling="bdia:1/2")
    assert len(revwire.report(model).units) == 3
    assert_to_the_bit(model, X)


def test_an_attribute_of_a_tensor():
    def forward(self, x, mask):
        h = self.f(x)
        return x + (h * mask if getattr(mask, "use", False) else h)

    mask = torch.zeros_like(X)
    model, reference = twin(stack(forward), (X, mask))
    assert_same_step(model, reference, X, mask)
    mask.use = True
    torch.testing.assert_close(model(X, mask)[0], X, **TOLERANCE)


class Given:
    """An object with slots, which holds tensors in containers, and counts."""

    __slots__ = ("calls", "tensors")

    def __init__(self, t):
        self.calls, self.tensors = 0, [t, {"more": t * 2}]

    def factor(self):
        self.calls += 1
        return (self.tensors[0] + self.tensors[1]["more"]) * self.calls


class Reader(nn.Module):
    """A leaf that reads attributes of a tensor, and an object that it is given."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x, mask, given):
        return self.f(x).tanh() * mask * mask.gain * mask.table["gain"] * given.factor()


def test_what_a_leaf_reads_of_tensors_and_objects_that_it_is_given():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            init = lambda self: setattr(self, "leaf", Reader())  # noqa: E731
            self.c, self.blocks = nn.Linear(8, 8), stack(lambda s, x, m, g: x + s.leaf(x, m, g), init).blocks

        def forward(self, x):
            mask, given = torch.ones_like(x), Given(self.c(x))
            mask.gain, mask.table = torch.tensor(0.3), {"gain": 0.2}
            for b in self.blocks:
                x = b(x, mask, given)
            assert given.calls == len(self.blocks)
            return x

    torch.manual_seed(0)
    model = revwire.convert(Reads().double(), X, coupling="bdia:1/2")
    assert len(revwire.report(model).units) == 3
    assert_to_the_bit(model, X)


# -- parts that are no unit -------------------------------------------------------------------------------------------


def test_parts_without_gradients_before_the_rest_of_a_branch():
    def forward(self, x):
        with torch.no_grad():
            gate = self.g(x).sigmoid()
        return x + self.f(x) * gate

    model = rewound(forward)
    assert_to_the_bit(model, X)


def test_blocks_that_checkpoint_themselves_and_give_something_else_besides():
    class Sided(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.side = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, y):
            return x + self.f(x).tanh() * y, self.side(y).tanh()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Sided() for _ in range(4))

        def forward(self, x, y):
            for b in self.blocks:
                x, y = checkpoint(b, x, y, use_reentrant=False)
            return x, y

    torch.manual_seed(0)
    y = torch.randn_like(X)
    model = revwire.convert(Model().double(), (X, y), coupling="bdia:1/2")
    assert_to_the_bit(model, X, y.clone().requires_grad_())


def test_a_write_to_what_an_unfinished_unit_saved_is_seen():
    held = []

    def forward(self, x, early=False):
        h = self.f(x)
        if early:
            held.append(h)
            return h.square()
        return x + h

    model = rewound(forward)
    with pytest.warns(UserWarning, match="did not come to its residual add|something between two units"):
        out = model(X, True)[0]
    with torch.no_grad():
        held[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# -- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_run_on_their_own_modules(copied):
    torch.manual_seed(0)
    model = revwire.convert(Loop(Gained).double(), X, coupling="bdia:1/2")
    model(X)
    other = copied(model)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    torch.testing.assert_close(other(X)[0], X, rtol=1e-6, atol=1e-6)
    other(X)[0].sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_nothing_of_it_stays_after_going_back():
    model = Loop(Gained).double()
    before = [set(vars(m)) for m in model.modules()]
    revwire.convert(model, X)
    model(X)
    revwire.revert(model)
    assert [set(vars(m)) for m in model.modules()] == before


def test_a_model_of_python_random_numbers_draws_what_it_would():
    def forward(self, x):
        return x + self.f(x) * self.random.random()

    model, reference = twin(stack(forward, lambda self: setattr(self, "random", random.Random(5))))
    for b in (*model.blocks, *reference.blocks):
        b.random.seed(5)
    with revwire.stored_activations(model):
        got = step(model, X)
    torch.testing.assert_close(got, step(reference, X), **TOLERANCE)


# -- sums in place -----------------------------------------------------------------------------------------------------


def written(self, x):
    h = self.f(x)
    h.add_(x)
    return h


def under_another_name(self, x):
    y = h = self.f(x)
    h += x
    return y


def kept_elsewhere(self, x):
    self.seen = h = self.f(x)
    h += x
    return h


@pytest.mark.parametrize("forward", [written, under_another_name, kept_elsewhere])
def test_a_sum_that_is_written_over_its_branch_is_found_by_every_name(forward):
    model, reference = twin(stack(forward))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    if forward is kept_elsewhere:
        model(X), reference(X)
        for mine, theirs in zip(model.blocks, reference.blocks, strict=True):
            torch.testing.assert_close(mine.seen, theirs.seen, **TOLERANCE)
            assert mine.seen.requires_grad
    assert_to_the_bit(rewound(forward), X)


class Forking(nn.Module):
    """Draws from a generator that it sets back."""

    def forward(self, x):
        with torch.random.fork_rng(devices=[]):
            return F.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    "forward", [lambda self, x: x + self.fork(self.f(x)), lambda self, x: x + self.fork(self.f(x)) * float(x.dim())]
)
def test_a_module_that_sets_the_generator_back_after_it_drew(forward):
    def make(self):
        self.fork = Forking()

    for example in (X, X):
        assert_to_the_bit(rewound(forward, make), example)
    model = rewound(forward, make)
    for _ in range(3):
        assert_to_the_bit(model, X)


class Checkpointing(nn.Module):
    """Its own code holds the sums, inside of its own checkpointing, and something behind them."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        def part(x):
            for f in self.f:
                x = x + f(x).tanh()
            return x.tanh() * x.sigmoid()

        return checkpoint(part, x, use_reentrant=False)


def test_a_hosts_own_checkpointing_around_its_sums():
    torch.manual_seed(0)
    model, reference = twin(Checkpointing().double())
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    torch.manual_seed(0)
    got, want = grads_both_ways(revwire.convert(Checkpointing().double(), X, coupling="bdia:1/2"), X)
    torch.testing.assert_close(got, want, **TOLERANCE)  # sums of gradients have another order there


SEEN: list[int] = []


class Halved(nn.Linear):
    """Does something before its call, and after it, in a ``__call__`` of its own."""

    def __call__(self, x):
        SEEN.append(len(x))
        return super().__call__(x).tanh() * 0.5


def calls_its_own(self, x):
    return x + self.own(self.f(x))


def test_what_a_call_of_its_own_does_happens_once():
    model = stack(calls_its_own, lambda self: setattr(self, "own", Halved(8, 8)))
    revwire.convert(model, X, coupling="bdia:1/2", rewire="everywhere")
    assert len(revwire.report(model).units) == 3
    SEEN.clear()
    assert_to_the_bit(model, X)
    assert len(SEEN) == 6  # three blocks in two steps: a recompute does not go through it


def test_a_straight_line_does_not_hide_a_call_of_its_own():
    model = stack(calls_its_own, lambda self: setattr(self, "own", Halved(8, 8)))
    want = model(X)[0]
    revwire.convert(model, X, coupling=Plain(), exact=False, rewire="everywhere")
    with revwire.stored_activations(model):
        torch.testing.assert_close(model(X)[0], want, rtol=0, atol=0)


def packs(self, x, lengths):
    packed = nn.utils.rnn.pack_padded_sequence(self.f(x), lengths, batch_first=True, enforce_sorted=False)
    out, _ = nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=x.shape[1])
    return x + out


def test_packed_sequences_are_followed():
    model = stack(packs, lambda self: setattr(self, "cell", nn.GRU(8, 8, batch_first=True)))
    lengths = torch.tensor([3, 5])
    revwire.convert(model, (X, lengths), coupling="bdia:1/2", rewire="everywhere")
    assert_to_the_bit(model, X, lengths)
