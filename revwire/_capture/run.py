"""Observe a module at work: one run on real values, from which the graph of any of its parts can be cut.

Note [Why a run on values]
    Proxies that stand for values break on ``isinstance``, on control flow and on every C function that wants a number.
    Here forward runs on copies of the caller's own tensors, and interception points write down what happens: a
    `TorchFunctionMode` (every torch call that Python makes), wrappers of ``nn.Module.__call__``, of custom autograd
    functions and of TorchScript functions, and a `TorchDispatchMode` (which kernels a call runs). Python decides as it
    always does. What it decided *on* is written down too: reading a shape or a value of a tensor is a `Read`.

Note [Nothing is kept alive]
    What autograd saves is measured and dropped, and the recording holds weak references: memory stays that of
    inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revwire._capture.arguments import fresh_arguments
from revwire._capture.intercept import intercepted
from revwire._capture.recorder import Kernels, Recorder
from revwire._capture.recording import Recording
from revwire._errors import CaptureError
from revwire._structures import tensors_in
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.context import context_of_its_own
from revwire._surroundings.interrupts import interruptible, uninterrupted
from revwire._surroundings.modes import nothing_compiled
from revwire._surroundings.randomness import accelerators_of, python_random_state, random_states, same_random_state


def record(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    forward: Callable[..., Any] | None = None,
    *,
    gradients: bool = True,
) -> Recording:
    """Run ``module`` once on copies of its arguments and write down what happens; all is left as found.

    Args:
        module: the root of the recording.
        args, kwargs: real arguments of its forward.
        forward: called instead of the module itself, as the body of the root call (to record an original forward
            under a rewired one).
        gradients: whether the run has them enabled.

    Raises:
        CaptureError: the module has parameters that do not exist yet.
    """
    _refuse_lazy(module)
    return uninterrupted(_recorded, module, args, kwargs, forward, gradients)


def _recorded(
    module: nn.Module, args: Any, kwargs: Any, forward: Callable[..., Any] | None, gradients: bool
) -> Recording:
    tensors = [*tensors_in((args, kwargs)), *module.parameters()]
    devices = accelerators_of(tensors)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        args, kwargs = fresh_arguments((args, kwargs))
        recorder = Recorder(module, tuple(sorted({"cpu", *(d.type for d in devices)})))
        stack.enter_context(left_as_found(module, (args, kwargs)))
        stack.enter_context(nothing_compiled())
        recorder.values.name_all()
        stack.enter_context(recorder.watch)
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.measure_saved, _dropped))
        stack.enter_context(Kernels(recorder))
        stack.enter_context(_seeing(recorder))
        stack.enter_context(intercepted(recorder))
        recorder.recording.training = all(m.training for m in module.modules())
        drawn, python_drawn = random_states(devices), python_random_state()
        context = context_of_its_own()
        if forward is None:
            interruptible(context.run, module, *args, **kwargs)
        else:
            body = forward
            interruptible(
                context.run, recorder.module_call, lambda _, *a, **k: body(*a, **k), module, args, kwargs, body=True
            )
        drawn_after = random_states(devices)
        recorder.recording.drew = not same_random_state(python_drawn, python_random_state()) or any(
            not torch.equal(state, drawn_after[device]) for device, state in drawn.items()
        )
    return recorder.recording


@contextmanager
def _seeing(recorder: Recorder) -> Iterator[None]:
    """A function mode, which an interrupt within PyTorch's own code may have taken off its stack already."""
    mode: Any = recorder
    mode.__enter__()
    try:
        yield
    finally:
        with suppress(RuntimeError):
            mode.__exit__(None, None, None)


def fullest_recording(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recording:
    """A run of a model, as it is; or in eval mode, where that calls more of its modules (layers that are left out at
    random in training).
    """
    found = record(module, args, kwargs)
    if not module.training or not _leaves_out(found):
        return found
    modes = [(m, m.training) for m in module.modules()]
    try:
        module.eval()
        other = record(module, args, kwargs)
    except Exception:  # noqa: BLE001 - it need not run in eval mode, and does not matter
        return found
    finally:
        for m, training in modes:
            m.training = training
    return other if len(_called(other)) > len(_called(found)) else found


def _called(recording: Recording) -> set[int]:
    return {id(e.target) for e in recording.events if e.is_module}


def _leaves_out(recording: Recording) -> bool:
    """Whether a module with weights was not called, and one was that differs from it in numbers in its name alone."""
    called = _called(recording)
    groups: dict[str, set[bool]] = {}
    for name, module in recording.root.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            alike = ".".join("#" if part.isdecimal() else part for part in name.split("."))
            groups.setdefault(alike, set()).add(id(module) in called)
    return any(len(found) == 2 for found in groups.values())


def _refuse_lazy(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if is_lazy(p):
            raise CaptureError(
                f"{type(module).__name__}: got the lazy parameter {name!r}; expected all weights to exist; call the "
                "model once first"
            )


def _dropped(_: Any) -> Tensor:
    raise RuntimeError("a backward pass, or torch.autograd.grad, through a run that is observed")
