"""Modules outside of chains under activation checkpointing: which, what it saves, that gradients and statistics stay,
what is refused.
"""

import copy
import pickle
import random
from collections import UserList

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import revwire
from revwire._forwards.checkpointed import checkpointed_of
from revwire.measure import peak_bytes, saved_bytes
from steps import same, training_step

X = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block with batch normalisation and dropout; with another width or stride, and a shortcut that is
    computed.
    """

    def __init__(self, width, out=None, stride=1):
        super().__init__()
        out = out or width
        self.one, self.norm = nn.Conv2d(width, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.dropout, self.two = nn.Dropout(0.1), nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, out, 1, stride) if (width, 1) != (out, stride) else None

    def forward(self, x):
        y = self.two(self.dropout(torch.relu(self.norm(self.one(x)))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Stages(nn.Module):
    def __init__(self, width=8, block=Block, stride=2):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(8, width, 3, padding=1)
        self.one = nn.Sequential(*(Block(width) for _ in range(3)))
        self.two = nn.Sequential(block(width, 2 * width, stride), *(Block(2 * width) for _ in range(3)))
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))).mean((2, 3)))


WIDE = torch.randn(8, 8, 16, 16, generator=torch.Generator().manual_seed(0))


def wide():
    """The second stage is the wider one: what its first block keeps is there at the peak."""
    return Stages(stride=1)


def results(model, x=X):
    """Output, gradients, buffers and random state after a step."""
    torch.manual_seed(3)
    out = model(x)
    grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    return [out, *grads, *(b.clone() for b in model.buffers()), torch.get_rng_state()]


@pytest.mark.parametrize(
    ("wish", "names"),
    [
        (None, ()),
        ("stays", ("two.0",)),
        ([], ()),
        ("stem", ("stem",)),
        (["stem", "stays"], ("stem", "two.0")),
        ("two.0.*", None),
    ],
)
def test_what_is_named_is_checkpointed_and_computes_the_same(wish, names):
    names = ("two.0.one", "two.0.norm", "two.0.dropout", "two.0.two", "two.0.shortcut") if names is None else names
    plain = revwire.convert(Stages(), X, rewire="everywhere")
    model = revwire.convert(Stages(), X, checkpoint=wish, rewire="everywhere")
    assert (
        set(revwire.report(model).checkpointed)
        == set(revwire.plan(Stages(), X, checkpoint=wish, rewire="everywhere").checkpointed)
        == set(names)
    )
    assert {n for n, m in model.named_modules() if checkpointed_of(m)} == set(names)
    assert same(results(model), results(plain))
    assert same(results(model), results(plain))  # a second step, from the statistics of the first
    twin = copy.deepcopy(model)
    with revwire.stored_activations(twin):
        assert same(results(model), results(twin))


def test_the_plan_names_them():
    text = str(revwire.plan(Stages(), X, checkpoint="stays", rewire="everywhere"))
    assert "checkpointed outside of chains: 1 modules (two.0)" in text
    assert "(a projection shortcut)" in text


def test_it_keeps_less():
    model, other = (
        revwire.convert(wide(), WIDE, rewire="everywhere"),
        revwire.convert(wide(), WIDE, checkpoint="stays", rewire="everywhere"),
    )
    inside, block = torch.randn(8, 8, 16, 16, requires_grad=True), wide().two[0]
    activations = saved_bytes(lambda: block(inside)) - 2 * inside.nbytes  # its output is there in any case
    assert (
        abs(saved_bytes(lambda: model(WIDE)) - saved_bytes(lambda: other(WIDE)) - activations) < 8192
    )  # random state is kept


def test_the_outermost_module_is_taken_and_none_that_holds_or_is_a_part_of_a_chain():
    model = Stages()
    with pytest.raises(
        revwire.ConversionError,
        match=r"checkpoint: got the glob 'one\*', under which no module can be checkpointed; expected modules",
    ):
        revwire.convert(model, X, checkpoint="one*", rewire="everywhere")
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.report(model)
    assert revwire.plan(model, X, checkpoint=["two.*"], rewire="everywhere").checkpointed == ("two.0",)
    assert revwire.plan(model, X, checkpoint="*", rewire="everywhere").checkpointed == ("stem", "two.0", "head")


def test_what_the_caller_excludes_stays_as_it_is():
    assert revwire.plan(Stages(), X, checkpoint="stays", exclude="one.*", rewire="everywhere").checkpointed == (
        "two.0",
    )
    assert revwire.plan(
        Stages(), X, checkpoint=["stays", "one.1"], exclude="one.*", rewire="everywhere"
    ).checkpointed == ("two.0", "one.1")


class Moody(Block):
    """Draws from Python's generator, which a recompute would not find as it was."""

    def forward(self, x):
        return super().forward(x) * (1 + random.random())


def test_what_cannot_be_run_twice_is_left_alone():
    assert revwire.plan(Stages(block=Moody), X, checkpoint="stays", rewire="everywhere").checkpointed == ()
    with pytest.raises(revwire.ConversionError, match="under which no module can be checkpointed"):
        revwire.convert(Stages(block=Moody), X, checkpoint="two.0", rewire="everywhere")


def test_reverted_and_copied():
    model = Stages()
    model.two[0].forward = forward = model.two[0].forward  # an attribute of the instance, as some libraries leave one
    before = results(copy.deepcopy(model))
    revwire.convert(model, X, checkpoint="stays", rewire="everywhere")
    twin, loaded = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere"))),
    )
    assert checkpointed_of(twin.two[0]).module is twin.two[0]
    assert checkpointed_of(loaded.two[0]).module is loaded.two[0]
    with pytest.raises(revwire.ConversionError, match="converted already"):
        revwire.convert(model, X, rewire="everywhere")
    expected = results(model)
    assert same(expected, results(loaded))
    revwire.revert(model)
    assert model.two[0].forward is forward
    revwire.revert(loaded)
    assert "forward" not in vars(loaded.two[0])
    fresh = Stages()
    fresh.load_state_dict(Stages().state_dict())
    assert same(before, results(fresh))


def test_without_gradients_nothing_is_kept_or_run_twice():
    model, runs = revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere").eval(), UserList()
    model.two[0].one.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(X)
    assert len(runs) == 1
    runs.clear()
    model(X).sum().backward()
    assert len(runs) == 2


def test_a_weight_that_was_written_to_is_an_error():
    model = revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere")
    loss = model(X).sum()
    with torch.no_grad():
        model.two[0].norm.weight.add_(1)
    with pytest.raises(
        revwire.ReconstructionError,
        match=r"two\.0 \(checkpointed\): between forward and backward, its weight 'norm.weight'",
    ):
        loss.backward()


def test_weights_that_were_lent_are_those_of_the_recompute():
    model, plain = revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere"), Stages()
    lent = {n: (1.5 * p.detach()).requires_grad_() for n, p in model.named_parameters()}
    grads = []
    for m in (model, revwire.convert(plain, X, rewire="everywhere")):
        torch.manual_seed(0)
        loss = torch.func.functional_call(m, lent, (X,)).square().sum()
        grads.append(torch.autograd.grad(loss, list(lent.values())))
    assert same(*grads)


def test_buffers_that_are_read_and_written_are_those_of_the_forward():
    def make():
        model = Stages()
        spectral_norm(model.two[0].two)
        return model

    model, plain = (
        revwire.convert(make(), X, checkpoint="stays", rewire="everywhere"),
        revwire.convert(make(), X, rewire="everywhere"),
    )
    for _ in range(3):
        assert same(results(model), results(plain))


def test_a_retained_backward_can_be_repeated():
    model = revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere")
    torch.manual_seed(3)
    loss = model(X).square().sum()
    once = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert same(once, torch.autograd.grad(loss, list(model.parameters())))


class Around(nn.Module):
    """Two chains, and between them a module that is called in the way of ``call``."""

    def __init__(self, middle, call):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = (nn.Sequential(*(Add() for _ in range(2))) for _ in range(2))
        self.middle, self.call = middle, call

    def forward(self, x):
        return self.after(self.call(self.middle, self.before(x)))


class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = 1.0
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=None, more=()):
        y = torch.tanh(self.linear(x)) * self.factor * (2 if self.training else 1)
        return y * (1 if scale is None else scale) * (more[0] if more else 1)


class InDict(Scale):
    def forward(self, d):
        return {"x": super().forward(d["x"])}


class EverySecond(nn.Module):
    """Follows its input with a mean that it reads, and writes every second time only."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.linear(x)
        if self.training:
            with torch.no_grad():
                self.count += 1
                if self.count % 2 == 0:
                    self.mean.lerp_(y.mean(0), 0.5)
        return torch.tanh(y - self.mean.clone())


class Counter(nn.Module):
    """Counts what is positive by channel, in whatever mode."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("positive", torch.zeros(8, dtype=torch.long))

    def forward(self, x):
        y = self.linear(x)
        self.positive += (y > 0).sum(0)
        return torch.tanh(y)


class Table(nn.Module):
    """Holds a large table of integers, which it reads."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("table", torch.arange(100_000))

    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.table[:8]


def test_no_copy_is_made_of_a_table_that_the_forward_only_reads():
    x = torch.randn(4, 8)
    model = revwire.convert(Around(Table(), lambda m, x: m(x)), x, checkpoint="middle", rewire="everywhere")
    assert checkpointed_of(model.middle) is not None
    assert peak_bytes(lambda: model(x).sum().backward()) < model.middle.table.nbytes


def twice(middle, x):
    d = {"x": x}
    for _ in range(2):
        d["x"] = middle(d)["x"]
    return d["x"]


@pytest.mark.parametrize(
    ("middle", "call"),
    [
        (Scale, lambda m, x: m(x)),
        (Scale, lambda m, x: m(x, more=[x])),
        (InDict, twice),
        (EverySecond, lambda m, x: m(x)),
        (Counter, lambda m, x: m(x)),
    ],
    ids=["plain", "list", "dict that goes on", "every second time", "counter"],
)
def test_modules_of_many_kinds_have_the_gradients_of_stored_activations(middle, call):
    x = torch.randn(4, 8)
    models = [
        revwire.convert(Around(middle(), call), x, checkpoint=wish, rewire="everywhere") for wish in ("middle", None)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for _ in range(5):
        assert same(*(results(m, x) for m in models))


def scale_later(model, x):
    scale = torch.ones(8)
    out = model.middle(x, scale=scale)
    scale.mul_(3)
    return out


def list_later(model, x):
    more = [torch.ones(8)]
    out = model.middle(x, more=more)
    more[0].mul_(3)
    return out


def changed(change):
    def run(model, x):
        out = model.middle(x)
        change(model.middle)
        return out

    return run


@pytest.mark.parametrize(
    "run",
    [
        scale_later,
        list_later,
        changed(lambda m: setattr(m.linear.weight, "data", m.linear.weight.data * 2)),
        changed(lambda m: setattr(m.linear, "weight", nn.Parameter(m.linear.weight.detach() * 2))),
    ],
    ids=["keyword", "list", "data", "parameter"],
)
def test_what_changes_before_backward_is_an_error(run):
    x = torch.randn(4, 8)
    model = revwire.convert(Around(Scale(), lambda m, x: m(x)), x, checkpoint="middle", rewire="everywhere")
    loss = run(model, x.requires_grad_()).square().sum()
    with pytest.raises(
        (revwire.ReconstructionError, RuntimeError), match=r"computed other values|modified by an inplace operation"
    ):
        loss.backward()


@pytest.mark.parametrize("change", [lambda m: m.eval(), lambda m: setattr(m, "factor", 2.0)], ids=["mode", "attribute"])
def test_settings_that_change_before_backward_are_again_those_of_the_forward(change):
    x = torch.randn(4, 8)
    model = revwire.convert(Around(Scale(), lambda m, x: m(x)), x, checkpoint="middle", rewire="everywhere")

    def gradients(run):
        return torch.autograd.grad(run(model, x).square().sum(), [*model.middle.parameters()])

    true = gradients(lambda model, x: model.middle(x))
    assert all(map(torch.equal, gradients(changed(change)), true))


# -- under a memory budget
# -------------------------------------------------------------------------------------------------


def test_the_planner_checkpoints_what_stays_where_that_is_what_it_takes():
    least = revwire.convert(wide(), WIDE, memory_budget="least")
    without = revwire.plan(wide(), WIDE, memory_budget="least", checkpoint=[])
    plan = revwire.report(least)
    assert plan.checkpointed == ("two.0",)
    assert without.checkpointed == ()
    assert plan.forecast.peak_bytes < 0.98 * without.forecast.peak_bytes
    training_step(least, WIDE)()
    assert peak_bytes(training_step(least, WIDE)) == pytest.approx(plan.forecast.peak_bytes, rel=0.05)
    assert revwire.verify(least, WIDE).bit_exact


def test_a_budget_takes_no_more_than_it_needs():
    low, high = (
        revwire.plan(wide(), WIDE, memory_budget="least", checkpoint=wish, chunks=1).forecast.peak_bytes
        for wish in (None, [])
    )
    assert low < high
    for budget, names in ((low + 4096, ("two.0",)), (2 * high, ())):
        model = revwire.convert(wide(), WIDE, memory_budget=budget, chunks=1)
        assert revwire.report(model).checkpointed == names
        assert {n for n, m in model.named_modules() if checkpointed_of(m)} == set(names)
        training_step(model, WIDE)()
        assert peak_bytes(training_step(model, WIDE)) <= budget * 1.02
    with pytest.raises(revwire.BudgetError) as error:
        revwire.convert(wide(), WIDE, memory_budget=1000, chunks=1)
    assert error.value.smallest == pytest.approx(low, rel=0.01)


def test_chunks_that_the_caller_wants_leave_the_choice_to_the_planner():
    plan = revwire.plan(wide(), WIDE, memory_budget="least", chunks=2)
    assert plan.checkpointed == ("two.0",)


def test_every_unit_stored_means_the_network_as_it_is():
    """What a plan gives up for memory is not in its forecast of a step that gives up nothing."""
    chosen, forbidden = (
        revwire.plan(wide(), WIDE, memory_budget="least", chunks=1, checkpoint=wish) for wish in (None, [])
    )
    assert chosen.checkpointed
    assert chosen.forecast.stored.peak_bytes == forbidden.forecast.stored.peak_bytes
    roomy = 2 * chosen.forecast.stored.peak_bytes
    assert "every activation fits" in str(revwire.plan(wide(), WIDE, memory_budget=roomy))
    assert "every activation fits" not in str(revwire.plan(wide(), WIDE, memory_budget=roomy, checkpoint="stays"))


def test_a_replica_runs_on_its_own_weights():
    model = revwire.convert(Stages(), X, checkpoint="stays", rewire="everywhere")
    replica = model.two[0]._replicate_for_data_parallel()
    assert checkpointed_of(replica).module is replica


class Notes:
    """An object that is given to modules, and written to."""

    def __init__(self):
        self.kept = []


class Noting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, notes):
        notes.kept.append(self.inner(x))
        return torch.cat(notes.kept, 1).relu()


class Passing(nn.Module):
    """Hands an object of its caller's to a module."""

    def __init__(self):
        super().__init__()
        self.part = Noting()

    def forward(self, x, notes):
        return self.part(x, notes)


def test_an_object_that_a_module_writes_to_is_written_to_once():
    torch.manual_seed(0)
    plain = Passing()
    model = revwire.convert(copy.deepcopy(plain), (X, Notes()), checkpoint="part", rewire="everywhere")
    assert revwire.report(model).checkpointed == ("part",)
    for _ in range(2):
        found = []
        for net in (plain, model):
            net.zero_grad()
            notes = Notes()
            notes.kept.append(X[:, :1])
            net(X, notes).square().sum().backward()
            found.append((len(notes.kept), [p.grad for p in net.parameters()]))
        assert [n for n, _ in found] == [2, 2]
        for a, b in zip(found[0][1], found[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.inner.calls, self.losses, self.last = 0, [], None

    def forward(self, x):
        self.inner.calls += 1
        self.inner.seen = self.inner.calls
        h = self.inner(x)
        self.losses.append(h.mean())
        self.last = h.detach().sum()
        return h.relu()


def test_what_a_module_counts_and_notes_happens_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Sequential(Counting()), nn.ReLU())
    plain = copy.deepcopy(net)
    revwire.convert(net, X, checkpoint="0", rewire="everywhere")
    for steps in (1, 2):
        for model in (plain, net):
            model.zero_grad()
            out = model(X).square().sum()
            (out + model[0][0].losses[-1]).backward()
        assert [m[0][0].inner.calls for m in (plain, net)] == [steps, steps]
        assert [m[0][0].inner.seen for m in (plain, net)] == [steps, steps]
        assert [len(m[0][0].losses) for m in (plain, net)] == [steps, steps]
        assert torch.equal(plain[0][0].last, net[0][0].last)
        for p, q in zip(plain.parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0)
