"""What a branch reads and changes besides tensors, in its modules and outside of them: a recompute finds it as the
forward did, and counts nothing, whatever was done to it before the backward pass.
"""

import copy
from collections import deque
from contextlib import contextmanager
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import revwire
from revwire._forwards.converted import chains_of

WIDTH = 8
X = torch.sin(torch.linspace(0, 9, 20).view(4, 5, 1) * torch.arange(1, WIDTH + 1))

TOTAL, BY_NAME, COUNTS, LOG, TABLE = 0, 0, {"calls": 0}, [], torch.zeros(())
NAMES, LAST, PAIR = set(), deque([0], maxlen=2), (torch.zeros(()), [0])
STATE, LEDGER = SimpleNamespace(deep=SimpleNamespace(step=0)), ModuleType("ledger")
LEDGER.total = 0


class Tally:
    """A plain object that counts in all ways an object may."""

    made = 0

    def __init__(self):
        self.n, self.items = 0, {"inner": [0]}
        self.hidden = 0

    @property
    def steps(self):
        return self.hidden

    @steps.setter
    def steps(self, value):
        self.hidden = value

    def bump(self):
        self.n += 1
        return self.n

    def begin(self):
        if not hasattr(self, "late"):
            self.late = 0
        self.late += 1
        return self.late

    def __call__(self):
        self.n += 3
        return self.n

    @contextmanager
    def around(self):
        self.n += 1
        yield self.n

    @classmethod
    def make(cls):
        cls.made += 1
        return cls.made


class Slots:
    __slots__ = ("n",)

    def __init__(self):
        self.n = 0


TALLY, SLOTS = Tally(), Slots()


def counter():
    calls, seen = 0, []

    def count():
        nonlocal calls
        calls += 1
        seen.append(calls)
        return calls + len(seen)

    return count


def by_statement(m):
    global TOTAL
    TOTAL += 1
    return TOTAL


def by_name(m):
    globals()["BY_NAME"] += 1
    return BY_NAME


def of_a_class(m):
    type(m).count += 1
    return m.count


def of_a_named_class(m):
    return Tally.make()


def of_a_dict(m):
    COUNTS["calls"] += 1
    return COUNTS["calls"]


def of_a_list(m):
    LOG.append(1)
    return len(LOG)


def of_a_function_called(m):
    return of_a_list(m) + of_a_dict(m)


def of_a_set(m):
    NAMES.add(len(NAMES))
    return len(NAMES)


def of_a_deque(m):
    LAST.append(LAST[-1] + 1)
    return LAST[-1]


def of_a_tensor(m):
    TABLE.add_(1)
    return TABLE.clone()


def of_a_tensor_behind_its_counter(m):
    TABLE.data += 1
    return TABLE.clone()


def of_a_tuple(m):
    PAIR[0].add_(1)
    PAIR[1][0] += 1
    return PAIR[0] + PAIR[1][0]


def of_a_namespace(m):
    STATE.deep.step += 1
    return STATE.deep.step


def of_a_python_module(m):
    LEDGER.total += 1
    return LEDGER.total


def of_a_global_object(m):
    TALLY.n += 1
    return TALLY.n


def of_slots(m):
    SLOTS.n += 1
    return SLOTS.n


def of_an_object(m):
    m.own.n += 1
    return m.own.n


def of_what_an_object_holds(m):
    m.own.items["inner"][0] += 1
    return m.own.items["inner"][0]


def of_an_object_in_a_list(m):
    m.many["all"][0].n += 1
    return m.many["all"][0].n


def by_a_method(m):
    return m.own.bump()


def by_a_call(m):
    return m.own()


def by_a_property(m):
    m.own.steps += 1
    return m.own.steps


def by_a_context(m):
    with m.own.around() as n:
        return n


def of_an_object_when_first_needed(m):
    return m.own.begin()


def of_an_enclosed_variable(m):
    return m.counter()


def of_a_function(m):
    of_a_function.calls += 1
    return of_a_function.calls


of_a_function.calls = 0


def of_a_default(m, seen=[]):  # noqa: B006 - that is what is tested
    seen.append(1)
    return len(seen)


def of_a_named_default(m, *, seen={}):  # noqa: B006
    seen[len(seen)] = 1
    return len(seen)


def of_the_module(m):
    m.calls += 1
    return m.calls


def of_the_module_when_first_needed(m):
    m.late = getattr(m, "late", 0) + 1
    return m.late


def of_the_module_by_turns(m):
    m.turn = not m.turn
    if m.turn:
        del m.spare
        return 1
    m.spare = 2
    return m.spare


def of_the_module_by_name(m):
    vars(m)["calls"] += 1
    setattr(m, "calls", m.calls + 1)  # noqa: B010
    return m.calls


def of_a_layer(m):
    m.up.calls = getattr(m.up, "calls", 0) + 1
    return m.up.calls


def of_a_tuple_of_the_module(m):
    m.pair[0].add_(1)
    m.pair = (m.pair[0], m.pair[1] + 1)
    return m.pair[0] + m.pair[1]


def of_a_buffer(m):
    m.running.add_(1)
    return m.running.clone()


def of_a_buffer_behind_its_counter(m):
    m.running.data.add_(1)
    return m.running.clone()


def of_a_module_that_is_made(m):
    if m.layer is None:
        m.layer = nn.Tanh()
        return 2
    return 1


def of_a_module_that_is_added(m):
    if "later" not in m._modules:
        m.add_module("later", nn.Tanh())
        return 2
    return 1


def of_a_buffer_that_is_added(m):
    if not hasattr(m, "first"):
        m.register_buffer("first", torch.ones(()))
        return 2
    return 1


def by_a_mode(m):
    m.train(not m.training)
    return 2 if m.training else 1


def by_a_hook_that_goes(m):
    return len(m.up._forward_hooks) + 1


WAYS = [value for value in list(globals().values()) if getattr(value, "__code__", None) and value.__code__.co_argcount]
WAYS = [way for way in WAYS if way.__code__.co_varnames[0] == "m"]


class Leaf(nn.Module):
    """A branch whose last layer is zero, as that of an adapter: its result hides what it computes."""

    count = 0

    def __init__(self, way):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.down.weight)
        self.way, self.own, self.many, self.counter = way, Tally(), {"all": [Slots()]}, counter()
        self.calls, self.turn, self.spare, self.pair = 0, False, 2, (torch.zeros(()), 0)
        self.layer = None
        self.register_buffer("running", torch.zeros(()))
        if way is by_a_hook_that_goes:
            handle = self.up.register_forward_hook(lambda *_: handle.remove())

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h * (1 + self.way(self) / 7))


class Block(nn.Module):
    def __init__(self, leaf):
        super().__init__()
        self.leaf = leaf

    def forward(self, x):
        return x + self.leaf(x)


class Net(nn.Module):
    def __init__(self, leaf, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(Block(leaf()) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def counted(net):
    """All that is counted."""
    own = [vars(b.leaf.own) | {"more": b.leaf.many["all"][0].n} for b in net.blocks]
    skip = ("own", "many", "counter", "way", "forward")
    modules = [{k: v for k, v in vars(m).items() if k[0] != "_" and k not in skip} for m in net.modules()]
    cells = [[c.cell_contents for c in b.leaf.counter.__closure__] for b in net.blocks]
    tables = [TOTAL, BY_NAME, COUNTS, LOG, TABLE, NAMES, LAST, PAIR, STATE, LEDGER.total, vars(TALLY), SLOTS.n]
    more = [Leaf.count, Tally.made, of_a_function.calls, of_a_default.__defaults__, of_a_named_default.__kwdefaults__]
    names = [[*m._modules, *m._buffers, len(m._forward_hooks)] for m in net.modules()]
    return copy.deepcopy([own, modules, cells, tables, more, names, [*map(str, net.buffers())]])


def begin_again():
    global TOTAL, BY_NAME
    TOTAL = BY_NAME = LEDGER.total = SLOTS.n = Leaf.count = Tally.made = STATE.deep.step = of_a_function.calls = 0
    TABLE.zero_()
    PAIR[0].zero_()
    PAIR[1][0], COUNTS["calls"] = 0, 0
    for container in (LOG, NAMES, *of_a_default.__defaults__, *of_a_named_default.__kwdefaults__.values()):
        container.clear()
    LAST.extend([0, 0])
    vars(TALLY).clear()
    TALLY.__init__()


def gradients(net, run):
    net.zero_grad(set_to_none=True)
    run()
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_equal(got, true):
    assert got.keys() == true.keys()
    for name in got:
        assert (got[name] is None) == (true[name] is None), name
        assert got[name] is None or torch.equal(got[name], true[name]), name


def converted(leaf, mode):
    torch.manual_seed(0)
    net = revwire.convert(Net(leaf), X, rewire="everywhere")
    for chain in chains_of(net):
        if mode:
            chain.modes = (mode,) * chain.length
    return net


@pytest.mark.parametrize("mode", [None, "checkpointed"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_each_change_counts_once(way, mode):
    def accumulated():
        net(X).square().sum().backward()
        (net(X).square().sum() + net(2 * X).square().sum()).backward()  # two forwards, and then their backward passes

    begin_again()
    net = converted(partial(Leaf, way), mode)
    before = counted(net)
    got, after = gradients(net, accumulated), counted(net)
    assert str(after) != str(before)
    begin_again()
    net = converted(partial(Leaf, way), mode)
    with revwire.stored_activations(net):
        assert_equal(got, gradients(net, accumulated))
    assert str(counted(net)) == str(after)
    begin_again()
    torch.manual_seed(0)
    net = Net(partial(Leaf, way))
    gradients(net, accumulated)
    if mode is None and not way.__name__.startswith("of_a_module_that"):
        assert [*map(str, counted(net)[2:])] == [*map(str, after[2:])]


class Switched(Leaf):
    """Reads what is switched around it."""

    def __init__(self):
        super().__init__(lambda m: m.factor)
        self.factor, self.drop = 1.0, nn.Dropout(0.0)
        self.twin = nn.Linear(self.up.in_features, self.up.out_features)
        self.twin.weight = self.up.weight  # so that the branch has it twice

    def forward(self, x):
        h = torch.relu(self.drop(self.up(x)))
        if self.training:
            h = h * 2
        return self.down(h * self.factor * rate() * RATE * Rates.rate * RATES.deep.rate * SLOTS_OF_RATES.n)


def enclosed_rate():
    value = 1.0

    def give():
        return value

    def take(new):
        nonlocal value
        value = new

    return give, take


class Rates:
    rate = 1.0


RATE, RATES, SLOTS_OF_RATES = 1.0, SimpleNamespace(deep=SimpleNamespace(rate=1.0)), Slots()
rate, set_rate = enclosed_rate()


def set_rates(value):
    """Settings that the code of the branch only reads."""
    globals()["RATE"] = Rates.rate = RATES.deep.rate = SLOTS_OF_RATES.n = value
    set_rate(value)


def seen(module, args, out):
    return out * 3


def attribute(net):
    for block in net.blocks:
        block.leaf.factor = 5.0


def dropout(net):
    for block in net.blocks:
        block.leaf.drop.p = 0.5


def mode(net):
    net.eval()


def frozen(net):
    for block in net.blocks:
        block.leaf.up.requires_grad_(False)


def trained_again(net):
    for block in net.blocks:
        block.leaf.up.bias.requires_grad_(True)


def hooked(net):
    for block in net.blocks:
        block.leaf.up.register_forward_hook(seen)


def unhooked(net):
    for block in net.blocks:
        block.leaf.down._forward_pre_hooks.clear()


def exchanged(net):
    for block in net.blocks:
        block.leaf.drop = nn.Tanh()


def removed(net):
    for block in net.blocks:
        del block.leaf.factor


def settings(net):
    set_rates(2.0)


def emptied(net):
    del rate.__closure__[0].cell_contents


def hooked_everywhere(net):
    HANDLES.append(nn.modules.module.register_module_forward_hook(seen))


HANDLES = []
SWITCHES = [attribute, dropout, mode, frozen, trained_again, hooked, unhooked, exchanged, removed, settings, emptied]


@pytest.fixture(autouse=True)
def nothing_left():
    begin_again()
    yield
    begin_again()
    while HANDLES:
        HANDLES.pop().remove()


@pytest.mark.parametrize("mode", [None, "checkpointed"])
@pytest.mark.parametrize("switch", [*SWITCHES, hooked_everywhere], ids=lambda s: s.__name__)
def test_what_is_switched_before_backward_is_as_in_forward(switch, mode):
    def made():
        set_rates(1.0)
        net = converted(Switched, mode)
        for block in net.blocks:
            block.leaf.down.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            block.leaf.up.bias.requires_grad_(switch is not trained_again)
        return net

    def step(net):
        loss = net(X).square().sum()
        switch(net)
        found = state(net)
        loss.backward()
        assert state(net) == found

    def state(net):
        modules = [{k: str(v) for k, v in vars(m).items() if k != "forward"} for m in net.modules()]
        outside = RATE, Rates.rate, RATES.deep.rate, SLOTS_OF_RATES.n, str(rate.__closure__[0])
        return modules, [p.requires_grad for p in net.parameters()], outside

    got = gradients(net := made(), partial(step, net))
    while HANDLES:
        HANDLES.pop().remove()
    with revwire.stored_activations(net := made()):
        assert_equal(got, gradients(net, partial(step, net)))
