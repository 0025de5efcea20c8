"""What a model must not be, and what must not go on around it, when it is converted."""

from __future__ import annotations

import torch
from torch import nn

from revwire._capture.intercept import is_recording
from revwire._errors import ConversionError
from revwire._torch import functorch_interpreter, is_fx_symbolic_tracing, tracing_state

_WRAPPERS = frozenset({"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule"})


def refuse_unready(model: nn.Module) -> None:
    """Raise if ``model`` is wrapped for parallel training already, or if this call is being traced.

    Raises:
        ConversionError: says which, and what to do first.
    """
    trace = active_trace()
    if trace is not None:
        raise ConversionError(
            f"{type(model).__name__}: got a call of plan() or convert() inside of {trace}; expected a run on real "
            "values; convert the model first, outside, and trace it then"
        )
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise ConversionError(
                f"{type(model).__name__}: got a model that is wrapped in {wrapper} already (at {name or 'its root'}); "
                "expected the plain one; convert it first, with an example, and wrap it then"
            )


def active_trace() -> str | None:
    """The name of what traces this call, if anything does."""
    if is_recording():
        return "another conversion"
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return "torch.compile"
    if tracing_state() is not None:
        return "torch.jit.trace"
    if is_fx_symbolic_tracing():
        return "a torch.fx trace"
    if functorch_interpreter() is not None:
        return "a torch.func transform"
    if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
        return "make_fx"
    return None
