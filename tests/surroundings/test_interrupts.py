"""Ctrl-C at any point of a conversion: nothing stays patched, and the model is converted, or it is as it was."""

import signal
import sys
import threading
from itertools import count, islice

import pytest
import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import revwire
from revwire._capture.intercept import is_recording
from revwire._forwards.base import InstanceForward, standing_forward
from revwire._forwards.converted import is_converted
from revwire._surroundings.attributes import attributes_of, changed
from revwire._surroundings.buffers import _LOCKS
from revwire._surroundings.interrupts import interruptible, uninterrupted
from revwire._torch import top_saved_tensors_hooks

POINTS = 60


@pytest.fixture(autouse=True)
def interrupts_are_heard():
    """A shell ignores them on behalf of what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Info:
    """What Python looks into while the model runs, so its class is watched."""

    def __init__(self):
        self.scale = 1.0

    def __len__(self):
        return 1


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(4)

    def forward(self, x):
        return x + torch.tanh(self.norm(self.linear(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.blocks[0].register_forward_hook(lambda *_: None)
        self.blocks[1].register_full_backward_hook(lambda *_: None)
        self.calls = 0

    def forward(self, x, info):
        self.calls += 1
        for block in self.blocks:
            x = block(x)
        return Doubled.apply(x) * info.scale * len(info) + torch.rand(8)


X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def the_world(model, info):
    """All around a model that a conversion touches."""
    return (
        nn.Module.__call__,
        torch.jit.ScriptFunction.__call__,
        torch.autograd.Function.__dict__.get("apply"),
        {k: v for k, v in vars(type(info)).items() if k != "__slotnames__"},  # a cache of `copy`
        _get_current_function_mode_stack(),
        _get_current_dispatch_mode_stack(),
        top_saved_tensors_hooks(False),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_torch_function_enabled(),
        is_recording(),
        signal.getsignal(signal.SIGINT),
        torch.get_rng_state().tolist(),
        [m.training for m in model.modules()],
        [id(b) for b in model.buffers()],
        [b.tolist() for b in model.buffers()],
    )


class InterruptedAt:
    """Counts what Python does, and presses Ctrl-C at one point."""

    def __init__(self, point=-1):
        self.point, self.count = point, 0

    def __call__(self, frame, event, argument):
        self.count += 1
        if self.count == self.point:
            sys.setprofile(None)
            signal.raise_signal(signal.SIGINT)

    def run(self, function, *args, **kwargs):
        try:
            sys.setprofile(self)
            function(*args, **kwargs)
        finally:
            sys.setprofile(None)
        return self.count


def locks_are_free():
    """Whether another thread gets them."""
    free = []

    def take():
        for lock in _LOCKS:
            free.append(lock.acquire(blocking=False))
            if free[-1]:
                lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return all(free)


def convert(options, point=-1):
    """(The model, what was raised, how many points there were, all before and after)."""
    torch.manual_seed(0)
    model, info, raised = Model(), Info(), None
    example = (X, info)
    before, attributes = the_world(model, info), {m: attributes_of(m) for m in model.modules()}
    interrupt = InterruptedAt(point)
    try:
        interrupt.run(revwire.convert, model, example, **options)
    except KeyboardInterrupt as error:
        raised = error  # its traceback keeps all frames alive, as a prompt does
    assert [a == b for a, b in zip(the_world(model, info), before, strict=True)] == [True] * len(before)
    assert locks_are_free()
    if not is_converted(model):
        assert not any(isinstance(standing_forward(m), InstanceForward) for m in model.modules())
        assert not any(changed(attributes[m], m) for m in model.modules())
    return model, info, raised, interrupt.count


@pytest.fixture(scope="module")
def points():
    convert({})  # what is imported and cached at first is so from now on
    return convert({})[-1]


# Python loses an exception that a signal raises in a finalizer.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("share", [k / POINTS for k in range(POINTS)])
def test_nothing_stays_wherever_a_conversion_is_interrupted(share, points):
    model, info, raised, _ = convert({}, point=1 + int(share * points))
    assert raised or is_converted(model)  # Python drops what is raised in a finalizer
    if not is_converted(model):
        revwire.convert(model, (X, info))
    model(X, info).sum().backward()
    assert len(revwire.report(model).units) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_most_interrupts_leave_the_model_as_it_was(points):
    converted = []
    for share in (0.0, 0.2, 0.4, 0.6):
        tries = (convert({}, point=point) for point in count(1 + int(share * points)))
        model = next(model for model, _, raised, _ in islice(tries, 3) if raised)  # some are lost, one in hundreds
        converted.append(is_converted(model))
    assert converted == [False] * 4


@pytest.mark.parametrize("options", [{"chunks": 2}, {"memory_budget": "least"}])
def test_so_it_is_where_units_are_tried_out(options):
    points = convert(options)[-1]
    for share in (0.3, 0.5, 0.7, 0.9):
        convert(options, point=int(share * points))


def press(done, after=()):
    signal.raise_signal(signal.SIGINT)
    for line in after:
        line()
    done.append("to its end")


def test_the_signal_waits_until_the_end():
    done = []
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(press, done)
    assert done == ["to its end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_or_until_it_need_not_wait():
    done = []
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(press, done, [lambda: interruptible(done.append, "in the model")])
    assert done == []
    with pytest.raises(KeyboardInterrupt):
        uninterrupted(interruptible, press, done)
    assert done == []
    with pytest.raises(KeyboardInterrupt):  # the innermost counts
        uninterrupted(interruptible, uninterrupted, press, done)
    assert done == ["to its end"]


def test_an_error_is_not_lost():
    with pytest.raises(KeyboardInterrupt) as raised:
        uninterrupted(press, [], [lambda: 1 / 0])
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_a_handler_of_the_callers_own_is_called_once():
    came = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame is not None)))
    try:
        uninterrupted(press, [], [lambda: signal.raise_signal(signal.SIGINT), lambda: came.append("not yet")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == ["not yet", (signal.SIGINT, True)]


def test_other_threads_have_no_signals():
    done = []
    thread = threading.Thread(target=uninterrupted, args=(interruptible, done.append, "run"))
    thread.start()
    thread.join()
    assert done == ["run"]
