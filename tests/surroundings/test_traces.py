"""What code writes outside of tensors and modules, of whatever kind, conversion, plans and checks undo."""

from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import revwire

WIDTH = 8
X = torch.sin(torch.linspace(0, 9, 64).view(1, -1, 1) * torch.arange(1, WIDTH + 1)).repeat(4, 1, 1)

LOG, COUNTS, STATE = [], {"calls": 0}, SimpleNamespace(deep=SimpleNamespace(step=0))
TOTAL, BY_NAME, TABLE = 0, 0, torch.zeros(3)
LEDGER = ModuleType("ledger")
LEDGER.total, LEDGER.entries = 0, []


class Tally:
    def __init__(self):
        self.n = 0


class Slots:
    __slots__ = ("__weakref__", "n")  # the first cannot be assigned to

    def __init__(self):
        self.n = 0


TALLY, SLOTS = Tally(), Slots()


def note_deeply():
    note()


def note():
    LOG.append("a function that a function calls")


class Counting(nn.Module):
    """A branch that counts its calls in one way, and is one of PyTorch's modules else."""

    count: int = 0

    def __init__(self, way):
        super().__init__()
        self.f, self.way, self.own, self.many = nn.Linear(WIDTH, WIDTH), way, Tally(), {"inner": [Slots()]}
        if way == "hook":
            self.f.register_forward_hook(lambda *_: LOG.append("hook"))
        if way == "hook with arguments":
            self.register_forward_pre_hook(partial(hooked, COUNTS))

    def forward(self, x):
        ways[self.way](self)
        return torch.tanh(self.f(x))


def hooked(counts, module, args):
    counts["calls"] += 1


def by_statement(module):
    global TOTAL
    TOTAL += 1


def by_name(module):
    globals()["BY_NAME"] += 1


def of_a_class(module):
    type(module).count += 1


def of_an_object_in_a_dict(module):
    module.many["inner"][0].n += 1


def of_an_object(module):
    module.own.n += 1


def of_a_namespace(module):
    STATE.deep.step += 1


def of_a_global_object(module):
    TALLY.n += 1


def of_slots(module):
    SLOTS.n += 1


def of_python_module(module):
    LEDGER.total += 1
    LEDGER.entries.append(1)


def of_a_global_tensor(module):
    TABLE.add_(1)


def in_a_function_within(module):
    def count():
        COUNTS["calls"] += 1

    count()


ways = {
    "hook": lambda module: None,
    "hook with arguments": lambda module: None,
    "function": lambda module: note_deeply(),
    **{
        f.__name__: f for f in (by_statement, by_name, of_a_class, of_an_object, of_an_object_in_a_dict, of_a_namespace)
    },
    **{
        f.__name__: f
        for f in (of_a_global_object, of_slots, of_python_module, of_a_global_tensor, in_a_function_within)
    },
}


class Net(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.layers = nn.ModuleList(Counting(way) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def counted(net):
    """All that may be counted."""
    tables = (LOG, COUNTS, STATE.deep.step, TOTAL, BY_NAME, TABLE, LEDGER.total, LEDGER.entries, TALLY.n, SLOTS.n)
    modules = [(layer.own.n, layer.many["inner"][0].n) for layer in net.layers]
    return repr((tables, modules, Counting.count))


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("run", [revwire.plan, revwire.convert])
def test_conversion_counts_nothing(run, way):
    torch.manual_seed(0)
    net = Net(way)
    before = counted(net)
    run(net, X, rewire="everywhere", chunks=2)
    assert counted(net) == before
    net(X)
    assert counted(net) != before  # a call does count


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("run", [revwire.verify, revwire.profile, revwire.calibrate])
def test_checks_count_nothing(run, way):
    torch.manual_seed(0)
    net = revwire.convert(Net(way), X, coupling="innovation:1/2", rewire="everywhere", calibrate=())
    before = counted(net)
    run(net, [X] if run is revwire.calibrate else X)
    assert counted(net) == before


def assigned_through_data(key, query):
    key.data = key.data * 0.9 + query.data * 0.1


def written_through_data(key, query):
    key.data.mul_(0.9).add_(query.data, alpha=0.1)


def written(key, query):
    with torch.no_grad():
        key.lerp_(query, 0.1)


class Momentum(nn.Module):
    """A teacher's weights follow those that are trained, in forward."""

    def __init__(self, follow):
        super().__init__()
        self.follow, self.net, self.teacher = follow, Net("function"), nn.Linear(WIDTH, WIDTH)
        self.student = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.follow(self.teacher.weight, self.student.weight)
        return self.student(self.net(x)) - self.teacher(x).detach()


@pytest.mark.parametrize("follow", [assigned_through_data, written_through_data, written])
@pytest.mark.parametrize("run", [revwire.plan, revwire.convert, revwire.verify, revwire.profile])
def test_weights_that_a_forward_moves_are_as_before(run, follow):
    torch.manual_seed(0)
    model = Momentum(follow)
    if run in (revwire.verify, revwire.profile):
        revwire.convert(model, X, rewire="everywhere")
    before, weight = {k: v.clone() for k, v in model.state_dict().items()}, model.teacher.weight
    run(model, X)
    assert model.teacher.weight is weight
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    model(X)
    assert not torch.equal(model.teacher.weight, before["teacher.weight"])  # a call does move them
