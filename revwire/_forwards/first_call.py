"""The forward of a model that is converted when it is first called, on the arguments of that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from revwire._capture.arguments import Call
from revwire._torch import disable_dynamo


class FirstCall:
    """Stands in for the forward of a model that is converted by its first call.

    Args:
        model: the model.
        original: an instance attribute ``forward`` that was there before, or None.
        rewire: converts a model by the arguments of a call.
    """

    def __init__(self, model: nn.Module, original: Any, rewire: Callable[[nn.Module, Any], None]) -> None:
        self.model = model
        self.original = original
        self.rewire = rewire

    @disable_dynamo  # a compiled model that is still to be converted breaks its graph here, and runs on real values
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        try:
            self.rewire(self.model, Call(args, kwargs))
        except BaseException:
            vars(self.model)["forward"] = self
            raise
        return self.model.forward(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        vars(self.model).pop("forward")
        if self.original is not None:
            vars(self.model)["forward"] = self.original
