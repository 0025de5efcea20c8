"""Modules that a host's own code may call, made known to whoever follows that code.

A leaf stands as an instance attribute before `nn.Module._call_impl`, which is all of a call, with the hooks of the
module; it does nothing but ask, while no host's code is followed on its thread.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from revwire._runtime.follower import NOW
from revwire._torch import CALL, COMPILED_CALL, REPLICATE, replicate


class Leaf:
    """Calls its module, or lets the follower of the host's code that calls it do so.

    Attributes:
        run: the call as it would have been.
    """

    def __init__(self, module: nn.Module, compiled: Any = None) -> None:
        self.module = module
        self.compiled = compiled
        self.run = compiled if compiled is not None else MethodType(getattr(type(module), CALL), module)

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["module"])  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        follower = NOW.follower
        if follower is None:
            return self.run(*args, **kwargs)
        return follower.module_call(self.module, self.run, args, kwargs)


class _Replicate:
    """A copy that `nn.DataParallel` makes of the module is no leaf until its own host is called."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> nn.Module:
        replica: nn.Module = replicate(self.module)
        for name in (CALL, REPLICATE):
            vars(replica).pop(name, None)
        return replica


def make_leaf(module: nn.Module) -> None:
    """Let calls of a module be known."""
    own = vars(module)
    found = own.get(CALL)
    if isinstance(found, Leaf) and found.module is module:
        return
    compiled = own.get(COMPILED_CALL)
    leaf = Leaf(module, compiled)
    own[CALL] = leaf
    if compiled is not None:
        own[COMPILED_CALL] = leaf
    if not isinstance(own.get(REPLICATE), _Replicate) and REPLICATE not in own:
        own[REPLICATE] = _Replicate(module)


def unmake_leaf(module: nn.Module) -> None:
    """Leave a module as it was."""
    own = vars(module)
    leaf = own.get(CALL)
    if not isinstance(leaf, Leaf):
        return
    del own[CALL]
    if isinstance(own.get(COMPILED_CALL), Leaf):
        own[COMPILED_CALL] = leaf.compiled
    if isinstance(own.get(REPLICATE), _Replicate):
        del own[REPLICATE]
