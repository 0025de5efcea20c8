"""Syntax trees of what runs."""

import argparse
import ast
import dataclasses
import gc
import inspect
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import revwire
from revwire._capture.sources import _functions_in, source_of
from toys import X, pre_norm, stack

FUNCTIONS = [argparse.ArgumentParser.parse_args, ast.parse, dataclasses.replace, inspect.getsource, textwrap.dedent]


@pytest.fixture
def threads_that_take_turns():
    """In the midst of whatever makes objects; nothing has been parsed before."""

    def pause(*_):
        time.sleep(0)

    usual = gc.get_threshold()
    gc.callbacks.append(pause)
    gc.set_threshold(50)
    _functions_in.cache_clear()
    with ThreadPoolExecutor(len(FUNCTIONS)) as pool:
        yield pool
    gc.set_threshold(*usual)
    gc.callbacks.remove(pause)


def test_trees_are_found_in_several_threads(threads_that_take_turns):
    found = [*threads_that_take_turns.map(source_of, FUNCTIONS)]
    assert [tree.name for tree in found] == [f.__name__ for f in FUNCTIONS]


def test_models_are_converted_in_several_threads(threads_that_take_turns):
    models = [stack(pre_norm) for _ in FUNCTIONS]
    converted = [*threads_that_take_turns.map(lambda model: revwire.convert(model, X), models)]
    assert [len(revwire.report(model).units) for model in converted] == [3] * len(models)
