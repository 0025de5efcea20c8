"""The fewest statements of a program with which a fault is still there."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from fuzz.program import Program


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Leave out statements, one by one, while ``fails`` holds."""
    again = True
    while again:
        again = False
        for number in program.numbers():
            less = program.less(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if fails(less):
                    program, again = less, True
    return program
