"""Looking quickly at what a call depends on: no change of it is missed, and no tensor is held on to."""

import gc
import weakref

import pytest
import torch
from torch import nn

from revwire._forwards.guards import Standing, StandingGuard
from revwire._forwards.rewired import rewired_of
from revwire._forwards.signature import call_signature
from steps import assert_same_step, twin
from toys import X, stack


class Config:
    def __init__(self):
        self.scale = 2.0
        self.inner = object()


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.number, self.flag, self.nothing = 1.5, True, None
        self.pair, self.sizes, self.table, self.empty = (1, 2), [1, 2], {"a": 1}, []
        self.config, self.function = Config(), torch.tanh


def look(host, guarded=None):
    modules = list(guarded or (host, *host.body))
    return StandingGuard(Standing(host, modules), host, modules)


CHANGES = {
    "number": lambda m: setattr(m, "number", 2.5),
    "flag": lambda m: setattr(m, "flag", False),
    "number instead of a flag": lambda m: setattr(m, "flag", 1),
    "something instead of nothing": lambda m: setattr(m, "nothing", 1),
    "new attribute": lambda m: setattr(m, "other", 1),
    "no attribute": lambda m: delattr(m, "number"),
    "another name": lambda m: vars(m).update(renamed=vars(m).pop("number")),
    "pair": lambda m: setattr(m, "pair", (1, 3)),
    "list": lambda m: m.sizes.__setitem__(0, 7),
    "longer list": lambda m: m.sizes.append(7),
    "dict": lambda m: m.table.update(a=7),
    "key of a dict": lambda m: m.table.update(b=m.table.pop("a")),
    "first item": lambda m: m.empty.append(1),
    "object": lambda m: setattr(m.config, "scale", 7.0),
    "another object": lambda m: setattr(m, "config", Config()),
    "another dict of an object": lambda m: setattr(m.config, "__dict__", {**vars(m.config), "scale": 7.0}),
    "another list": lambda m: setattr(m, "sizes", [1, 3]),
    "tensor instead of nothing": lambda m: setattr(m, "nothing", torch.zeros(3)),
    "tensor instead of a list": lambda m: setattr(m, "empty", torch.zeros(3)),
    "function": lambda m: setattr(m, "function", torch.sigmoid),
    "mode": lambda m: m.body[1].eval(),
    "module": lambda m: m.body.__setitem__(1, nn.ReLU()),
    "no module": lambda m: m.body.__delitem__(1),
    "module without a place": lambda m: setattr(m.body[0], "inner", nn.ReLU()),
    "attribute of a module below": lambda m: setattr(m.body[1], "inplace", True),
    "hook": lambda m: m.body[0].register_forward_hook(lambda *_: None),
    "hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "global hook": lambda m: HOOKS.append(nn.modules.module.register_module_forward_hook(lambda *_: None)),
}
HOOKS = []


@pytest.fixture(autouse=True)
def _no_global_hooks():
    yield
    while HOOKS:
        HOOKS.pop().remove()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_is_seen(change):
    host = Host()
    seen = look(host)
    assert seen.holds()
    change(host)
    assert not seen.holds()


def test_what_changes_elsewhere_is_no_change():
    host = Host()
    host.body.append(nn.BatchNorm1d(3))
    seen = look(host, [host, host.body[0]])
    host.body(torch.randn(2, 3)).sum().backward()
    host.body[2].eps = 1.0  # its code is not held by a program: it is called
    assert seen.holds()


@pytest.mark.parametrize(
    "value", [torch.zeros(1), [torch.zeros(1)], {"a": [1]}, ([1],)], ids=["tensor", "tensors", "nested", "in a tuple"]
)
def test_what_cannot_be_told_by_identity_is_not_looked_at(value):
    host = Host()
    host.value = value
    with pytest.raises(TypeError):
        look(host)


@pytest.mark.parametrize(
    ("held", "let_go"),
    [
        (lambda m: m.body[0], lambda m: setattr(m.body, "0", nn.Linear(3, 3))),
        (lambda m: m.body[0].weight, lambda m: setattr(m.body, "0", nn.Linear(3, 3))),
        (lambda m: m.body, lambda m: setattr(m, "body", nn.Sequential(nn.Linear(3, 3)))),
        (lambda m: m.body[0].weight, lambda m: setattr(m, "body", nn.Sequential(nn.Linear(3, 3)))),
        (lambda m: m.config.inner, lambda m: setattr(m.config, "inner", None)),
    ],
    ids=["module", "weight", "modules", "weight below", "attribute of an object"],
)
def test_what_is_replaced_is_not_kept_alive(held, let_go):
    host = Host()
    host.config.inner = nn.Linear(1, 1)
    seen = look(host)
    dying = weakref.ref(held(host))
    let_go(host)
    gc.collect()
    assert dying() is None
    assert seen.standing is not None


def test_a_guard_that_came_meanwhile_is_looked_at():
    """Another thread may add a guarded module between a look and its use."""

    def forward(self, x):
        return x + self.f(x) * self.gain

    model, _ = twin(stack(forward, lambda self: setattr(self, "gain", 1.0)))
    model(X)
    rewired = rewired_of(model.blocks[0])
    before = rewired.standing()
    extra = nn.Linear(2, 2)
    rewired.guarded[id(extra)] = extra
    assert rewired.standing() != before


def test_the_quick_key_of_a_call_is_that_of_any_other():
    x = torch.randn(2, 3)
    quick = call_signature((x,), {}, [x])
    slow = call_signature((nn.Parameter(x).as_subclass(Sub),), {}, [nn.Parameter(x).as_subclass(Sub)])
    assert len(quick) == len(slow)
    assert [type(part) for part in quick] == [type(part) for part in slow]
    assert quick[0] == slow[0]
    assert quick[2:] == slow[2:]


class Sub(torch.Tensor):
    pass


def test_equal_standings_are_one_key():
    host = Host()
    a, b = (Standing(host, [host, *host.body]) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    host.number = 7.0
    assert Standing(host, [host, *host.body]) != a


def test_steps_in_a_row_with_changes_between_them():
    def forward(self, x):
        return x + self.f(x) * self.gain

    model, reference = twin(stack(forward, lambda self: setattr(self, "gain", 1.0)))
    for gain in (1.0, 1.0, 2.0, 2.0, 1.0, 3.0, 3.0):
        for m in (*model.blocks, *reference.blocks):
            m.gain = gain
        assert_same_step(model, reference, X)


def test_looks_are_given_up_where_each_shows_a_change():
    def forward(self, x):
        return x + self.f(x) * self.gain

    model, _ = twin(stack(forward, lambda self: setattr(self, "gain", 1.0)), chunks=2)
    rewired = rewired_of(model.blocks[0])
    for i in range(40):
        model.blocks[0].gain = 2.0 + i % 2 + 1e-3 * (i % 3)
        model(X)
    assert rewired.guard is None
    model, _ = twin(stack(forward, lambda self: setattr(self, "gain", 1.0)), chunks=2)
    rewired = rewired_of(model.blocks[0])
    for _ in range(40):
        model(X)
    assert rewired.guard is not None
