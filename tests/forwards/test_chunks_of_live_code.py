"""Units in chunks are run by a graph, made before their code is met: it serves as long as all that the code reads is
the same, and code of which that is not known, or which does something outside, runs whole.
"""

import functools
import operator
import os
import random
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import revwire
from revwire._capture.code_names import identity
from revwire._capture.code_reads import reads_of
from revwire._capture.pure_calls import is_torchs
from revwire._errors import CaptureError

X = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))

SCALE = 1.0
SETTINGS = {"scale": 1.0}
CALLS: list[int] = []


class Config:
    scale = 1.0


class Slots:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0


def scaled(h):
    return h * SCALE


def handed_on(function):
    def wrapper(*args, **kwargs):
        kwargs.pop("unused", None)
        return function(*args, **kwargs)

    return wrapper


class Block(nn.Module):
    shared = 1.0

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale, self.calls, self.log, self.names = 1.0, 0, [], set()
        self.nested, self.items = {"mlp": {"scale": 1.0}}, [1.0]
        self.config, self.slots = SimpleNamespace(mlp=SimpleNamespace(scale=1.0)), Slots()
        self.rng = random.Random(0)
        self.down.scale = self.down.weight.scale = 1.0
        self.verbose = False

    def hidden(self, x):
        return self.up(self.norm(x)).relu()


def of_a_global(self, x):
    return x + self.down(self.hidden(x)) * SCALE


def of_a_function(self, x):
    return x + self.down(scaled(self.hidden(x)))


def of_a_global_dict(self, x):
    return x + self.down(self.hidden(x)) * SETTINGS["scale"]


def of_its_class(self, x):
    return x + self.down(self.hidden(x)) * self.shared


def of_another_class(self, x):
    return x + self.down(self.hidden(x)) * Config.scale


def of_an_attribute(self, x):
    return x + self.down(self.hidden(x)) * self.scale


def of_nested_dicts(self, x):
    return x + self.down(self.hidden(x)) * self.nested["mlp"]["scale"]


def of_a_list(self, x):
    return x + self.down(self.hidden(x)) * self.items[0]


def of_nested_objects(self, x):
    return x + self.down(self.hidden(x)) * self.config.mlp.scale


def of_slots(self, x):
    return x + self.down(self.hidden(x)) * self.slots.scale


def of_a_child(self, x):
    return x + self.down(self.hidden(x)) * self.down.scale


def of_a_weight(self, x):
    return x + self.down(self.hidden(x)) * self.down.weight.scale


def decided_by_an_attribute(self, x):
    h = self.hidden(x)
    if self.scale > 1.5:
        h = h * 2
    if self.verbose and self.scale > 1:
        CALLS.append(len(CALLS))
    return x + self.down(h)


def by_getattr(self, x):
    return x + self.down(self.hidden(x)) * (getattr(self, "extra", 1.0) if hasattr(self, "extra") else 1.0)


@handed_on
def behind_a_wrapper(self, x):
    return x + self.down(self.hidden(x)) * self.scale


def set_global(name, value):
    globals()[name] = value


def every(change):
    return lambda model, value: [change(block, value) for block in model]


READS = {
    of_a_global: lambda _, value: set_global("SCALE", value),
    of_a_function: lambda _, value: set_global("SCALE", value),
    of_a_global_dict: lambda _, value: SETTINGS.update(scale=value),
    of_its_class: lambda _, value: setattr(Block, "shared", value),
    of_another_class: lambda _, value: setattr(Config, "scale", value),
    of_an_attribute: every(lambda b, value: setattr(b, "scale", value)),
    of_nested_dicts: every(lambda b, value: b.nested["mlp"].update(scale=value)),
    of_a_list: every(lambda b, value: b.items.__setitem__(0, value)),
    of_nested_objects: every(lambda b, value: setattr(b.config.mlp, "scale", value)),
    of_slots: every(lambda b, value: setattr(b.slots, "scale", value)),
    of_a_child: every(lambda b, value: setattr(b.down, "scale", value)),
    of_a_weight: every(lambda b, value: setattr(b.down.weight, "scale", value)),
    decided_by_an_attribute: every(lambda b, value: setattr(b, "scale", value)),
    by_getattr: every(lambda b, value: setattr(b, "extra", value)),
    behind_a_wrapper: every(lambda b, value: setattr(b, "scale", value)),
}


def of_the_environment(self, x):
    return x + self.down(self.hidden(x)) * float(os.environ.get("REVWIRE_TEST_SCALE", "1.0"))


def of_a_set(self, x):
    return x + self.down(self.hidden(x)) * (2.0 if "twice" in self.names else 1.0)


def of_values(self, x):
    return x + self.down(self.hidden(x)) * (2.0 if float(x.detach().sum()) > 0 else 1.0)


def of_random_numbers(self, x):
    return x + self.down(self.hidden(x)) * self.rng.random()


def counting(self, x):
    self.calls += 1
    return x + self.down(self.hidden(x)) * (1 + self.calls % 2)


def logging(self, x):
    h = self.hidden(x)
    self.log.append(h.mean())
    return x + self.down(h)


def outside(self, x):
    CALLS.append(len(CALLS))
    return x + self.down(self.hidden(x))


def as_it_is(*_):
    pass


WHOLE = {
    of_the_environment: lambda _, value: os.environ.update(REVWIRE_TEST_SCALE=str(value)),
    of_a_set: every(lambda b, value: b.names.add("twice") if value > 1 else b.names.discard("twice")),
    of_values: as_it_is,
    of_random_numbers: as_it_is,
    counting: as_it_is,
    logging: as_it_is,
    outside: as_it_is,
}


def stack(forward):
    torch.manual_seed(0)
    kind = type(Block.__name__, (Block,), {"forward": forward})
    return nn.Sequential(*(kind() for _ in range(3))).double()


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setitem(globals(), "SCALE", 1.0)
    monkeypatch.setitem(SETTINGS, "scale", 1.0)
    monkeypatch.setattr(Block, "shared", 1.0)
    monkeypatch.setattr(Config, "scale", 1.0)
    monkeypatch.setenv("REVWIRE_TEST_SCALE", "1.0")
    monkeypatch.setitem(globals(), "CALLS", [])


def close(forward, change, x):
    """Runs a converted model beside the original through changes; the former, and the units that run in chunks."""
    plain, model = stack(forward), stack(forward)
    revwire.convert(model, x, chunks=2, coupling="bdia:1/128")
    cut = [u.chunks for u in revwire.report(model).units]
    for value in (1.0, 2.0, 0.5, 2.0):
        change(plain, value)
        change(model, value)
        for given in (x, -x):
            CALLS.clear()
            want = plain(given)
            happened = list(CALLS)
            CALLS.clear()
            got = model(given)
            assert happened == CALLS
            torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)  # the coupling changes the function a little
            got.sum().backward()
    assert [(b.calls, len(b.log)) for b in plain] == [(b.calls, len(b.log)) for b in model]
    return model, cut


@pytest.mark.parametrize("forward", READS, ids=lambda f: f.__name__)
def test_what_the_code_reads_has_its_present_value(forward):
    _, cut = close(forward, READS[forward], X.double())
    assert cut == [2, 2, 2]


@pytest.mark.parametrize("forward", WHOLE, ids=lambda f: f.__name__)
def test_code_of_which_it_is_not_known_what_it_reads_runs_whole(forward):
    model, cut = close(forward, WHOLE[forward], X.double())
    assert cut == [1, 1, 1]
    assert all(h.requires_grad for block in model for h in block.log)


def test_a_call_whose_code_cannot_be_told_runs_whole_with_one_warning():
    model, x = stack(of_an_attribute), X.double()
    revwire.convert(model, x, chunks=2)
    type(model[1]).forward = counting
    cause = "its units run whole instead of in chunks, as its code assigns to its attribute 'calls'"
    with pytest.warns(UserWarning, match=cause) as told:
        model(x).sum().backward()
    assert [str(w.message) for w in told] == [f"{i}: {cause}" for i in range(3)]
    model(x).sum().backward()
    assert model[1].calls == 2


@pytest.mark.parametrize("forward", [outside, logging, counting], ids=lambda f: f.__name__)
def test_a_call_that_cannot_be_told_does_once_what_it_does(forward):
    """It is refused before it is observed."""
    model, x = stack(of_an_attribute), X.double()
    revwire.convert(model, x, chunks=2)
    type(model[1]).forward = forward
    with pytest.warns(UserWarning, match="run whole instead of in chunks"):
        model(x)
    assert len(CALLS) + len(model[0].log) + model[0].calls == (3 if forward is outside else 1)


def in_evaluation(self, x):
    self.train(False)
    return x + self.down(self.hidden(x))


def writing_by_operator(self, x):
    operator.setitem(self.items, 0, self.items[0] + 1.0)
    return x + self.down(self.hidden(x))


def shadowed(self, x):
    widths = [SCALE + 1 for SCALE in range(2)]
    return x + self.down(self.hidden(x)) * (SCALE + len(widths) - 2)


def growing(self, x):
    items = self.items
    items += [1.0]
    return x + self.down(self.hidden(x)) * len(items)


def of_one_of_two(self, x):
    settings = self.config.mlp
    for _ in range(2):
        x = x * settings.scale
        settings = self.slots
    return x + self.down(self.hidden(x))


class Sums(nn.Linear):
    """A module whose forward is PyTorch's own in part."""

    def forward(self, x):
        return super().forward(x) * SCALE


FORMS = {
    in_evaluation: "calls train() of a module",
    writing_by_operator: "calls operator.setitem",
    growing: "holds the statement 'items += [1.0]'",
    of_one_of_two: "assigns self.slots in some calls",
}


@pytest.mark.parametrize("forward", FORMS, ids=lambda f: f.__name__)
def test_what_changes_something_or_may_lead_elsewhere_is_refused(forward):
    module = stack(forward)[0]
    line = forward.__code__.co_firstlineno
    with pytest.raises(CaptureError, match=re.escape(FORMS[forward])) as error:
        reads_of((module,), lambda m: m.forward)
    assert line < int(str(error.value).rpartition(":")[2].rstrip(")")) <= line + 4


def test_a_name_that_a_comprehension_binds_is_its_own():
    close(shadowed, READS[of_a_global], X.double())


def test_a_wrapper_with_the_name_of_a_torch_function_is_code_like_any_other():
    linear = nn.Linear(4, 4)

    @functools.wraps(nn.Linear.forward)
    def forward(x):
        return nn.Linear.forward(linear, x) * float(os.environ["REVWIRE_TEST_SCALE"])

    assert not is_torchs(forward)


def test_what_is_read_by_way_of_the_class_above_is_known_again():
    """Else each capture would add to the reads, and forget all programs."""
    module = Sums(4, 4)
    first, second = (reads_of((module,), lambda m: m.forward) for _ in range(2))
    assert len(first) > 2
    assert {identity(read) for read in first} == {identity(read) for read in second}
