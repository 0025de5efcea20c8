"""The syntax tree of a function that runs."""

from __future__ import annotations

import ast
import functools
import linecache
from types import CodeType, FunctionType


def source_of(function: FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function, if its source is what runs."""
    code = function.__code__
    found = _functions_in(code.co_filename).get((code.co_name, code.co_firstlineno))
    return found[0] if found is not None and _same_code(found[1], code) else None


@functools.lru_cache(maxsize=256)
def _functions_in(file: str) -> dict[tuple[str, int], tuple[ast.FunctionDef, CodeType]]:
    """The functions of a file, by name and first line. It is compiled as a whole: what stands around a function (an
    import, a class) makes a difference to its code.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
        todo = [compile(tree, file, "exec", dont_inherit=True)]
    except (SyntaxError, ValueError):
        return {}
    nodes = {
        (n.name, min([n.lineno, *(d.lineno for d in n.decorator_list)])): n
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef)
    }
    found = {}
    while todo:
        code = todo.pop()
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
        place = code.co_name, code.co_firstlineno
        if place in nodes:
            found[place] = nodes[place], code
    return found


def _same_code(a: CodeType, b: CodeType) -> bool:
    if (a.co_code, a.co_names, len(a.co_consts)) != (b.co_code, b.co_names, len(b.co_consts)):
        return False
    pairs = zip(a.co_consts, b.co_consts, strict=True)
    return all(_same_code(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else x == y for x, y in pairs)
