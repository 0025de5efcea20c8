"""Modules that a host's own code may call, made known to whoever follows that code.

A leaf stands as an instance attribute before `nn.Module._call_impl`, which is all of a call, with the hooks of the
module; it does nothing but ask, while no host's code is followed on its thread.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        _strip(vars(replica))
        return replica


class _Compile:
    """`nn.Module.compile` compiles the call as it would have been, and the leaf then calls what was compiled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        unmake_leaf(self.module)
        try:
            self.module.compile(*args, **kwargs)
        finally:
            make_leaf(self.module)


_STANDING: dict[str, type] = {CALL: Leaf, REPLICATE: _Replicate, "compile": _Compile}
"""What stands on a module that is a leaf."""


def are_leaves(modules: Iterable[nn.Module | None]) -> bool:
    """Whether calls of these modules are known."""
    for module in modules:
        if module is None:
            continue
        own = vars(module)
        if type(own.get(CALL)) is not Leaf or not (own.get(COMPILED_CALL) is None or type(own[COMPILED_CALL]) is Leaf):
            return False
    return True


def make_leaf(module: nn.Module) -> None:
    """Let calls of a module be known."""
    if are_leaves((module,)) and vars(module)[CALL].module is module:
        return
    own = vars(module)
    compiled = own.get(COMPILED_CALL)
    leaf = own[CALL] = Leaf(module, compiled)
    if compiled is not None:
        own[COMPILED_CALL] = leaf
    own.setdefault(REPLICATE, _Replicate(module))
    own["compile"] = _Compile(module)


def unmake_leaf(module: nn.Module) -> None:
    """Leave a module as it was."""
    own = vars(module)
    if type(own.get(COMPILED_CALL)) is Leaf:
        own[COMPILED_CALL] = own[COMPILED_CALL].compiled
    _strip(own)


def _strip(own: dict[str, Any]) -> None:
    for name, kind in _STANDING.items():
        if type(own.get(name)) is kind:
            del own[name]
