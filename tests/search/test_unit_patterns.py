"""Units beyond ``x + F(x)``, one toy each: what stands before the fork, after the sum, outside of the module, or in a
cache.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import revwire
from steps import TOLERANCE, assert_same_step, step, twin
from toys import Loop, Residual, X, block, noise, pre_norm, stack


def normed_at_the_head(self: Any, x: Tensor) -> Tensor:
    n = F.layer_norm(x, (8,))
    return n + self.drop(self.f(n)).tanh()


def activated_at_the_head(self: Any, x: Tensor) -> Tensor:
    n = F.silu(x)
    return n + self.f(n).tanh()


def normed_after_the_sum_in_calls(self: Any, x: Tensor) -> Tensor:
    x = x + self.drop(self.f(x))
    x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.g.bias.exp()


def dropped_after_the_sum(self: Any, x: Tensor) -> Tensor:
    return self.drop(x + self.f(x).tanh())


def dropped_after_the_sum_in_training_only(self: Any, x: Tensor) -> Tensor:
    x = F.layer_norm(x + self.f(x), (8,))
    return F.dropout(x, 0.3) if self.training else x


def two_sums_of_one_input(self: Any, x: Tensor) -> Tensor:
    """The first sum goes on in the second, its nearest follower, though the last one skips back to it too."""
    y = x + self.f(x).tanh()
    z = y + self.g(y).tanh()
    return z + self.f(z).sin()


def by_value(self: Any, x: Tensor) -> Tensor:
    return x + (self.f(x) if x.sum() > 1e9 else self.g(x)).tanh()


def projected_beside(self: Any, x: Tensor) -> Tensor:
    """A sum that is rejected (its shortcut changes shape) lies in the region of a good one with the same fork."""
    wide = x.mean(-1, keepdim=True) + self.f(x)
    return x + self.g(wide).tanh()


class Cached(nn.Module):
    """An attention bias, gathered once in eval mode and kept in an attribute or in a dict; `train` clears it."""

    def __init__(self, in_dict: bool) -> None:
        super().__init__()
        self.f, self.bias, self.in_dict = nn.Linear(8, 8), nn.Parameter(torch.randn(5)), in_dict
        self.register_buffer("places", torch.arange(8) % 5, persistent=False)
        self.kept: Any = {} if in_dict else None

    def train(self, mode: bool = True) -> Cached:
        super().train(mode)
        if mode:
            self.kept = {} if self.in_dict else None
        return self

    def gathered(self, x: Tensor) -> Tensor:
        if self.training:
            return self.bias[self.places]
        if self.in_dict:
            key = str(x.device)
            if key not in self.kept:
                self.kept[key] = self.bias[self.places]
            found: Tensor = self.kept[key]
            return found
        if self.kept is None:
            self.kept = self.bias[self.places]
        kept: Tensor = self.kept
        return kept

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.f(x) + self.gathered(x)).tanh()


def loop_of(make: Callable[[], nn.Module], depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Loop(make, depth).double()


def sequence_of_parts() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(Residual(), nn.Tanh(), nn.LayerNorm(8)) for _ in range(3))).double()


class TwoWays(nn.Module):
    """One list of blocks, through which two chains run, the second in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.between = nn.ModuleList(Residual() for _ in range(3)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for b in self.blocks:
            x = b(x)
        x = self.between(x)
        for b in reversed(self.blocks):
            x = b(x)
        return x


class Stages(nn.Module):
    """The blocks of both stages share one module, which is a part of theirs; the stages differ in what else they
    hold.
    """

    def __init__(self) -> None:
        super().__init__()
        shared = Residual()

        class Stage(nn.Module):
            def __init__(self, own: int) -> None:
                super().__init__()
                self.shared, self.own = shared, nn.ModuleList(Residual() for _ in range(own))

            def forward(self, x: Tensor) -> Tensor:
                x = self.shared(x)
                for o in self.own:
                    x = o(x)
                return x

        self.first, self.down, self.second = Stage(1), nn.Linear(8, 8), Stage(2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.down(self.first(x)))
        return out


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


@dataclass(frozen=True)
class Toy:
    """A model, and the patterns that its units must have."""

    make: Callable[[], nn.Module]
    patterns: tuple[str, ...]


TOYS = {
    "norm in many calls after the sum": Toy(lambda: stack(normed_after_the_sum_in_calls), ("block",) * 3),
    "follower outside of the module": Toy(sequence_of_parts, ("block",) * 3),
    "by value": Toy(lambda: stack(by_value), ("residual",) * 3),
    "a rejected sum beside": Toy(lambda: stack(projected_beside), ("residual",) * 3),
    # the first unit of a chain has no sum before it, so it may begin after the norm
    "norm before the fork": Toy(lambda: stack(normed_at_the_head), ("residual", "block", "block")),
    "activation before the fork": Toy(lambda: stack(activated_at_the_head), ("residual", "block", "block")),
    "one module in two chains": Toy(lambda: seeded(TwoWays), ("residual",) * 6),
    "one module in two stages": Toy(lambda: seeded(Stages), ("residual",) * 5),
    "nearest follower": Toy(lambda: stack(two_sums_of_one_input, depth=2), ("residual",) * 6),
    "dropout after the sum": Toy(lambda: stack(dropped_after_the_sum), ("block",) * 3),
}
each = pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS.keys())
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@each
@modes
def test_units_and_patterns(toy: Toy, training: bool) -> None:
    found = revwire.plan(toy.make().train(training), X)
    assert len(found.units) == len(toy.patterns)
    if training:
        assert tuple(u.pattern for u in found.units) == toy.patterns


@each
@modes
@pytest.mark.parametrize("coupling", ["bdia:1/16", "re2tal"])
def test_exact_in_both_modes_whichever_came_first(toy: Toy, training: bool, coupling: str) -> None:
    model = revwire.convert(toy.make().train(training), X, coupling=coupling)
    for mode in (training, not training, training):
        assert revwire.verify(model.train(mode), X).bit_exact


@each
@modes
def test_the_function_is_the_originals_in_both_modes(toy: Toy, training: bool) -> None:
    model, reference = twin(toy.make().train(training))
    for mode in (training, not training, training):
        assert_same_step(model.train(mode), reference.train(mode), X)


@each
def test_other_batches_and_sizes(toy: Toy) -> None:
    model, reference = twin(toy.make())
    for shape in ((1, 5, 8), (4, 3, 8), (2, 9, 8)):
        assert_same_step(model, reference, noise(*shape))


@each
@modes
def test_revert_is_bit_for_bit(toy: Toy, training: bool) -> None:
    model = toy.make().train(training)
    before = step(model, X)
    revwire.convert(model, X)
    step(model, X)
    step(model.train(not training), X)
    torch.testing.assert_close(step(revwire.revert(model.train(training)), X), before, rtol=0, atol=0)


# -- what is particular to one of them
# -----------------------------------------------------------------------------------


def test_the_parts_of_a_sequence_belong_to_the_sequence() -> None:
    assert revwire.plan(sequence_of_parts(), X).hosts == ("0", "1", "2")


def test_a_module_in_two_chains_has_a_larger_host() -> None:
    assert revwire.plan(seeded(TwoWays), X).hosts == ("",)
    assert revwire.plan(seeded(lambda: nn.Sequential(Residual(), Residual())), X).hosts == ("0", "1")


def test_a_rejected_sum_does_not_absorb_another() -> None:
    found = revwire.plan(stack(projected_beside), X)
    assert len(found.units) == 3
    assert not [s for s in found.skipped if "part of a sum" in s.reason]


def test_a_dropout_after_the_norm_after_the_sum_from_train_to_eval() -> None:
    model, reference = twin(stack(dropped_after_the_sum_in_training_only))
    for mode in (True, False, True):
        assert_same_step(model.train(mode), reference.train(mode), X)


@pytest.mark.xfail(
    strict=True,
    raises=UserWarning,
    reason="a unit that was converted with calls after its sum ends after as many, even where more lie before the "
    "end of its block",
)
def test_a_dropout_after_the_norm_after_the_sum_from_eval_to_train() -> None:
    model = revwire.convert(stack(dropped_after_the_sum_in_training_only).eval(), X)
    assert revwire.verify(model.train(), X).bit_exact


caches = pytest.mark.parametrize("in_dict", [False, True], ids=["attribute", "dict"])


def cached(in_dict: bool) -> nn.Module:
    return loop_of(lambda: Cached(in_dict))


def cache_of(b: Any) -> Tensor | None:
    found: Tensor | None = b.kept.get("cpu") if b.in_dict else b.kept
    return found


@caches
def test_a_cache_is_filled_once_and_then_read(in_dict: bool) -> None:
    model, reference = twin(cached(in_dict))
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    with torch.no_grad():
        want = reference.eval()(X)[0]
        torch.testing.assert_close(model.eval()(X)[0], want, **TOLERANCE)
        filled = [cache_of(b) for b in model.blocks]
        torch.testing.assert_close(model(X)[0], want, **TOLERANCE)
    assert None not in filled
    assert all(c is cache_of(b) for c, b in zip(filled, model.blocks, strict=True))
    assert_same_step(model.train(), reference.train(), X)


@caches
def test_a_cache_that_was_cleared_is_filled_with_the_new_weights(in_dict: bool) -> None:
    model, reference = twin(cached(in_dict))
    for shift in (0.0, 0.5, 1.0):
        for m in (model, reference):
            m.train()
            with torch.no_grad():
                for b in m.blocks:
                    b.bias.add_(shift)
            m.eval()
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(model(X)[0], reference(X)[0], **TOLERANCE)


@caches
@pytest.mark.parametrize("coupling", ["bdia:1/16", "re2tal"])
def test_a_model_with_a_cache_is_exact_and_goes_back(in_dict: bool, coupling: str) -> None:
    model = cached(in_dict)
    before = step(model, X)
    revwire.convert(model, X, coupling=coupling)
    assert revwire.verify(model, X).bit_exact
    with torch.no_grad():
        model.eval()(X)
    torch.testing.assert_close(step(revwire.revert(model).train(), X), before, rtol=0, atol=0)


@caches
def test_a_cache_that_is_empty_at_conversion_or_full(in_dict: bool) -> None:
    model = cached(in_dict).eval()
    assert len(revwire.plan(model, X).units) == 3
    assert all(cache_of(b) is None for b in model.blocks)
    with torch.no_grad():
        model(X)
    model, reference = twin(model)
    assert len(revwire.report(model).units) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(X)[0], reference(X)[0], **TOLERANCE)


@caches
def test_a_cache_that_is_filled_with_gradients_gives_its_weight_one(in_dict: bool) -> None:
    model, reference = twin(cached(in_dict))
    with revwire.stored_activations(model):
        got = step(model.eval(), X)
    torch.testing.assert_close(got, step(reference.eval(), X), **TOLERANCE)


class Remembers(nn.Module):
    """Keeps a part of its first input, and uses it ever after."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.kept = nn.Linear(8, 8), None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.kept is None:
            self.kept = x[:1] * 2
        return x + self.f(x if self.kept is None else x + self.kept).tanh()


def test_what_is_kept_of_an_input_with_its_gradient() -> None:
    model, reference = twin(loop_of(Remembers))
    given = X.clone().requires_grad_(), X.clone().requires_grad_()
    for m, one in zip((model.eval(), reference.eval()), given, strict=True):
        with revwire.stored_activations(model):
            (m(one)[0].sum() + m(2 * one)[0].sum()).backward()
        assert all(b.kept is not None and b.kept.requires_grad for b in m.blocks)
    torch.testing.assert_close(given[0].grad, given[1].grad, **TOLERANCE)
    torch.testing.assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)), **TOLERANCE)


class Memory(nn.Module):
    """A residual block whose branch writes what it saw to a tensor that the caller owns."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.f(x).tanh()
        if memory is not None:
            memory.mul_(0.5).add_(h.detach())
            h = h + memory
        return x + h


def test_a_write_to_foreign_memory_is_made_once_without_gradients() -> None:
    model, reference = twin(loop_of(Memory))
    with torch.no_grad():
        for m_ in (False, True, False):
            mine, theirs = torch.zeros_like(X), torch.zeros_like(X)
            got, want = model.train(m_)(X, memory=mine)[0], reference.train(m_)(X, memory=theirs)[0]
            torch.testing.assert_close(got, want, **TOLERANCE)
            torch.testing.assert_close(mine, theirs, **TOLERANCE)


def test_a_branch_that_writes_to_foreign_memory_keeps_its_activations() -> None:
    model, reference = twin(loop_of(Memory))
    mine, theirs = torch.zeros_like(X), torch.zeros_like(X)
    with pytest.warns(UserWarning, match="writes in place to a tensor from outside of it"):
        got = step(model, X, memory=mine)
    torch.testing.assert_close(got, step(reference, X, memory=theirs), **TOLERANCE)
    torch.testing.assert_close(mine, theirs, **TOLERANCE)


# -- whole models
# --------------------------------------------------------------------------------------------------------


def test_a_model_without_a_chain_is_returned_unchanged() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    before, attributes = step(model, X), set(vars(model))
    with pytest.warns(revwire.NothingToRewireWarning, match="the model runs as before: .* made no residual add"):
        assert revwire.convert(model, X) is model
    assert not revwire.report(model).chains
    assert revwire.report(model).coverage == 0
    assert "nothing is rewired" in str(revwire.report(model))
    assert "forward" not in {n for m in model.modules() for n in vars(m)}
    torch.testing.assert_close(step(model, X), before, rtol=0, atol=0)
    assert set(vars(revwire.revert(model))) == attributes
    with pytest.raises(revwire.ConversionError, match=r"strict=True.*no chain of residual units was found"):
        revwire.convert(model, X, strict=True)


class States(nn.Module):
    """Gives its hidden states out, when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(pre_norm)() for _ in range(4))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, hidden: bool = False) -> dict[str, Any]:
        states: tuple[Tensor, ...] = ()
        for b in self.blocks:
            if hidden:
                states += (x,)
            x = b(x)
        x = self.norm(x)
        return {"last": x, "states": (*states, x) if hidden else None}


@modes
def test_hidden_states_that_are_asked_for_after_conversion(training: bool) -> None:
    model, reference = twin(seeded(States).train(training))
    assert_same_step(model, reference, X)
    assert_same_step(model, reference, X, hidden=True)
    assert len(model(X, hidden=True)["states"]) == 5
    assert_same_step(model, reference, X)


@modes
def test_hidden_states_are_exact_too(training: bool) -> None:
    model = revwire.convert(seeded(States).train(training), X)
    assert revwire.verify(model, {"x": X, "hidden": True}).bit_exact


class Recurrent(nn.Module):
    """Keeps a state from call to call, as recurrent layers do for generation; the first call finds none."""

    def __init__(self, assigned_before: bool) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)
        if assigned_before:
            self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        state = getattr(self, "state", None)
        h = self.f(x) if state is None else self.f(x + state)
        self.state = h.mean(1, keepdim=True).detach()
        return h.tanh()


class Stateful(nn.Module):
    def __init__(self, assigned_before: bool) -> None:
        super().__init__()
        self.inner = Recurrent(assigned_before)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


@pytest.mark.parametrize("assigned_before", [True, False])
@pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/16"])
def test_a_state_that_a_branch_keeps_is_found_again_and_moves_on_once(assigned_before: bool, coupling: str) -> None:
    model = revwire.convert(loop_of(lambda: Stateful(assigned_before)), X, coupling=coupling)
    assert len(revwire.report(model).units) == 3
    reference = copy.deepcopy(model)
    for seed in range(3):
        got = step(model, noise(2, 5, 8, seed=seed))
        with revwire.stored_activations(reference):
            want = step(reference, noise(2, 5, 8, seed=seed))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        states = [b.inner.state for b in model.blocks], [b.inner.state for b in reference.blocks]
        torch.testing.assert_close(*states, rtol=0, atol=0)


class Heavy(nn.Module):
    """Weights of a megabyte, activations of a few hundred bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8192), nn.Linear(8192, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x[:, :1]).tanh())
        return x + y


def test_conversion_copies_no_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Heavy() for _ in range(3)))
    example = torch.randn(1, 2, 8)
    weights, storages = dict(model.named_parameters()), {n: p.data_ptr() for n, p in model.named_parameters()}
    keys = list(model.state_dict())

    def convert_and_back() -> None:
        revwire.revert(revwire.convert(model, example))

    peak = revwire.measure.peak_bytes(convert_and_back)
    assert peak < sum(p.nbytes for p in weights.values()) / 4
    revwire.convert(model, example)
    assert len(revwire.report(model).units) == 3
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(after[n] is p and p.data_ptr() == storages[n] for n, p in weights.items())
    assert list(model.state_dict()) == keys


def test_a_copy_of_the_original_gives_the_same_plan() -> None:
    for toy in TOYS.values():
        model = toy.make()
        assert revwire.plan(copy.deepcopy(model), X) == revwire.plan(model, X)


class Dropped(nn.Module):
    """Layer drop that comes late: what it left out was computed, and may serve as a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.drops = nn.Linear(8, 8), False
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).tanh()
        self.seen.append(h)
        return x if self.drops else x + h


class Late(nn.Module):
    """Such blocks, with residuals between them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Dropped() for _ in range(4)])
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.double()

    def forward(self, x: Tensor, drops: tuple[int, ...]) -> tuple[Tensor, ...]:
        for i, (b, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            b.seen.clear()
            b.drops = i in drops
            x = b(x)
            x = x + layer(x).tanh()
        return x, *(b.seen[0].square() for b in self.blocks)


@pytest.mark.filterwarnings("ignore:.*its activations are kept")  # where it is asked for fewer layers, and for more
def test_layers_that_were_left_out_at_conversion_compute_on_what_the_sum_before_gave() -> None:
    model, reference = twin(Late(), (X, (0, 2)), rewire="everywhere")
    assert len(revwire.report(model).units) == 6
    for drops in ((2,), (0, 2), (0, 2, 3), ()):
        assert_same_step(model, reference, X, drops)
