"""How large a thing may grow before it wants to be two."""

import ast

from modules import HOUSE, MODULES, ROOT, syntax

FILES_AT_THE_TOP = 8
LINES_OF_A_FILE = 400
LINES_OF_A_CLASS = 200
COMPLEXITY = 20

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
DECISION = (
    *(ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.Assert, ast.match_case),
    ast.comprehension,
)


def found(kind):
    """(where, node) of all classes or functions of revwire."""
    for path in MODULES.values():
        for node in ast.walk(syntax(path)):
            if isinstance(node, kind):
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def parts(function):
    """All nodes inside of a function, but those inside of functions in it, which count by themselves."""
    left = list(ast.iter_child_nodes(function))
    while left:
        node = left.pop()
        yield node
        if not isinstance(node, FUNCTION):
            left += ast.iter_child_nodes(node)


def complexity(function):
    """McCabe's: one more than the decisions in it, where each condition of a comprehension and each further operand of
    `and` and `or` is one.
    """
    count = 1
    for node in parts(function):
        if isinstance(node, DECISION):
            count += 1
        if isinstance(node, ast.comprehension):
            count += len(node.ifs)
        if isinstance(node, ast.BoolOp):
            count += len(node.values) - 1
    return count


def above(limit, counts):
    """A line for each that is above a limit."""
    return "\n".join(f"{where}: {count}" for where, count in counts.items() if count > limit)


def test_few_files_stand_beside_the_packages():
    names = [path.name for path in sorted(HOUSE.glob("*.py"))]
    assert len(names) <= FILES_AT_THE_TOP, names


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert above(LINES_OF_A_FILE, lines) == ""


def test_classes_are_short():
    lines = {where: node.end_lineno - node.lineno + 1 for where, node in found(ast.ClassDef)}
    assert above(LINES_OF_A_CLASS, lines) == ""


def test_functions_decide_little():
    decisions = {where: complexity(node) for where, node in found(FUNCTION)}
    assert above(COMPLEXITY, decisions) == ""


def test_complexity_is_counted_by_hand():
    (function,) = ast.parse(
        "def f(x, y):\n"
        "    def inner(z):\n        return z if z else -z\n"  # by itself
        "    if x and y or not x:\n        return [inner(a) for a in x if a if a > 1]\n"  # 1 + 2, 1 + 2
        "    try:\n        assert y\n    except ValueError:\n        pass\n"  # 1, 1
        "    while y:\n        y -= 1\n"  # 1
    ).body
    assert complexity(function) == 1 + 3 + 3 + 2 + 1
