"""The line of the user's code that made a call.

Note [Whose line]
    A call is seen from inside of PyTorch, or of revwire, so the frames of both are passed over: the innermost other one
    is the code that a user can change. They are looked through as far as the module call around: where only PyTorch's
    own frames lie in it, the module is PyTorch's own, and the line is that of its forward.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import CodeType, FrameType

import torch

Line = tuple[CodeType, int, str]
"""(code, line number, name of the Python module): little enough to keep one for each call."""


_CALLS_OF_MODULES = torch.nn.modules.module.__file__


_TORCH, _OWN = (str(PurePath(file).parent) for file in (torch.__file__, str(PurePath(__file__).parent)))


_OURS: dict[str, bool | None] = {_CALLS_OF_MODULES: True}
"""For the files of code: revwire's own, or what calls a module (True); other files of PyTorch (False); a user's."""


def _kind(file: str) -> bool | None:
    inside = [package for package in (_OWN, _TORCH) if PurePath(file).is_relative_to(package)]
    kind = _OURS[file] = (inside[0] == _OWN) if inside else None
    return kind


def current_line(depth: int = 1) -> Line | None:
    """The line of the user's code that runs now, seen ``depth`` frames above; see Note [Whose line]."""
    frame: FrameType | None = sys._getframe(depth)
    torchs: FrameType | None = None
    while frame is not None:
        code = frame.f_code
        file = code.co_filename
        kind = _OURS[file] if file in _OURS else _kind(file)
        if kind is None:
            return code, frame.f_lineno, frame.f_globals.get("__name__", "")
        if kind and torchs is not None:
            break
        if not kind:
            torchs = frame
        frame = frame.f_back
    return None if torchs is None else (torchs.f_code, torchs.f_lineno, torchs.f_globals.get("__name__", ""))


def shown(line: Line | None) -> str:
    """A line as users read it, ``package/models/net.py:215``: the file as its package names it; "" for None."""
    if line is None:
        return ""
    code, number, module = line
    path = PurePath(code.co_filename)
    package = module.count(".") + (path.stem == "__init__")
    return f"{PurePath(*path.parts[-1 - package :])}:{number}"
