"""The forward of a model that is converted when it is first called, on the arguments of that call."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
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
        waits: whether a call is not the one that is waited for, and runs the model as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        original: Any,
        rewire: Callable[[nn.Module, Any], None],
        waits: Callable[[nn.Module], bool] | None = None,
    ) -> None:
        self.model = model
        self.original = original
        self.rewire = rewire
        self.waits = waits

    @disable_dynamo  # a compiled model that is still to be converted breaks its graph here, and runs on real values
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.waits is not None and self.waits(self.model):
            return self._before(*args, **kwargs)
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

    @property
    def __signature__(self) -> Signature:
        """Frameworks ask a forward what it takes."""
        return signature(self._before)

    @property
    def _before(self) -> Callable[..., Any]:
        return self.original or type(self.model).forward.__get__(self.model)  # type: ignore[no-any-return]
