"""A forward that stands as an attribute of its module, so that the module's class stays as it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Signature, signature
from typing import Any

from torch import nn

from revwire._torch import CALL, REPLICATE, replicate

_FORWARD = "forward"


class InstanceForward(ABC):
    """What `put_on` puts on a module, and `take_off` takes off again.

    Args:
        module: the module.
        path: its qualified name in the model, for errors.
        original: an instance attribute ``forward`` that was there before, or None.
    """

    def __init__(self, module: nn.Module, path: str, original: Any = None) -> None:
        self.module = module
        self.path = path
        self.original = original

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""

    @abstractmethod
    def on_replica(self, replica: nn.Module) -> InstanceForward:
        """Its counterpart for a copy of the module that `nn.DataParallel` made."""

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as it was before conversion."""
        return self.before(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        """Frameworks ask a forward what it takes, to pick the columns of their data."""
        return signature(self.before)

    @property
    def before(self) -> Any:
        """What `plain` calls."""
        return self.original if self.original is not None else type(self.module).forward.__get__(self.module)


def standing_forward(module: nn.Module) -> Any:
    """The instance attribute ``forward`` of a module, or None."""
    return vars(module).get(_FORWARD)


def plain_forward(module: nn.Module) -> Any:
    """The forward of a module as it was before conversion."""
    standing = standing_forward(module)
    if isinstance(standing, InstanceForward):
        return standing.before
    return type(module).forward if standing is None else standing


def put_on(forward: InstanceForward) -> None:
    """Let a module run by this forward."""
    vars(forward.module)[_FORWARD] = forward
    vars(forward.module)[REPLICATE] = _Replicate(forward.module)


def take_off(module: nn.Module) -> None:
    """Take it off again: the module's own forward, or the instance attribute that was there, serves."""
    forward = vars(module).pop(_FORWARD)
    vars(module).pop(REPLICATE, None)
    if forward.original is not None:
        vars(module)[_FORWARD] = forward.original


@contextmanager
def own_forwards(model: nn.Module) -> Iterator[None]:
    """Within this context all modules of a model run by the forwards that they had before."""
    standing = [f for m in model.modules() if isinstance(f := standing_forward(m), InstanceForward)]
    try:
        for forward in standing:
            take_off(forward.module)
        yield
    finally:
        for forward in standing:
            put_on(forward)


class _Replicate:
    """`nn.DataParallel` copies a module's attributes; the copy's forward must run on the copy's weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica: nn.Module = replicate(self.module)
        forward = standing_forward(self.module)
        if isinstance(forward, InstanceForward):
            vars(replica)[_FORWARD] = forward.on_replica(replica)
            for name in (REPLICATE, CALL):
                vars(replica).pop(name, None)
        return replica
