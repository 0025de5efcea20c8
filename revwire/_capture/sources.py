"""The syntax tree of a function that runs."""

from __future__ import annotations

import ast
import functools
import linecache
from threading import Lock
from types import CodeType, FunctionType

Function = ast.FunctionDef | ast.Lambda

_PARSING = Lock()
"""Held by the one thread that parses: CPython 3.11 counts how deep it is in a tree for all threads at once, and raises
SystemError where two build one at a time.
"""


def source_of(function: FunctionType) -> Function | None:
    """The syntax tree of a function, if its source is what runs."""
    code = function.__code__
    with _PARSING:
        functions = _functions_in(code.co_filename)
    found = functions.get((code.co_name, code.co_firstlineno), [])
    return next((node for node, then in found if _same_code(then, code)), None)


@functools.lru_cache(maxsize=256)
def _functions_in(file: str) -> dict[tuple[str, int], list[tuple[Function, CodeType]]]:
    """The functions of a file, by name and first line. It is compiled as a whole: what stands around a function (an
    import, a class) makes a difference to its code.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
        codes = _by_place(compile(tree, file, "exec", dont_inherit=True))
    except (SyntaxError, ValueError):
        return {}
    nodes: dict[tuple[str, int], list[Function]] = {}
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef):
            nodes.setdefault((n.name, min([n.lineno, *(d.lineno for d in n.decorator_list)])), []).append(n)
        elif isinstance(n, ast.Lambda):
            nodes.setdefault(("<lambda>", n.lineno), []).append(n)
    return {
        place: [*zip(sorted(several, key=lambda n: n.col_offset), codes[place], strict=True)]
        for place, several in nodes.items()
        if len(several) == len(codes.get(place, ()))  # equal ones are one code
    }


def _by_place(code: CodeType) -> dict[tuple[str, int], list[CodeType]]:
    """The codes in a code, by name and first line, in order."""
    found: dict[tuple[str, int], list[CodeType]] = {}
    todo = [code]
    while todo:
        code = todo.pop()
        todo += [c for c in reversed(code.co_consts) if isinstance(c, CodeType)]
        found.setdefault((code.co_name, code.co_firstlineno), []).append(code)
    return found


def _same_code(a: CodeType, b: CodeType) -> bool:
    if (a.co_code, a.co_names, len(a.co_consts)) != (b.co_code, b.co_names, len(b.co_consts)):
        return False
    pairs = zip(a.co_consts, b.co_consts, strict=True)
    return all(_same_code(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else x == y for x, y in pairs)
