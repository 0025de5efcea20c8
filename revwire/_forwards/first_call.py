"""The forward of a model that is converted when it is first called, on the arguments of that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from revwire._capture.arguments import Call
from revwire._plan.options import Options
from revwire._torch import disable_dynamo


class FirstCall:
    """Stands in for the forward of a model that is converted by its first call."""

    def __init__(
        self, model: nn.Module, options: Options, original: Any, rewire: Callable[[nn.Module, Any, Options], None]
    ) -> None:
        self.model = model
        self.options = options
        self.original = original
        self.rewire = rewire

    @disable_dynamo  # a compiled model that is still to be converted breaks its graph here, and runs on real values
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.remove()
        try:
            self.rewire(self.model, Call(args, kwargs), self.options)
        except BaseException:
            vars(self.model)["forward"] = self
            raise
        return self.model.forward(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        vars(self.model).pop("forward")
        if self.original is not None:
            vars(self.model)["forward"] = self.original
