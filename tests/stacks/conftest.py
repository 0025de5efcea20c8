"""Collects what the tests of each stack came to, for the table of docs/training-stacks.md; see `table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from table import DOCUMENT, Row, with_recipes, with_table

_ROWS = pytest.StashKey[dict[tuple[str, str], Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--stacks-table", choices=("write", "check"), help="write docs/training-stacks.md, or check that it is up to date")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}


def _row(item: pytest.Item) -> Row | None:
    marker = item.get_closest_marker("stack")
    if marker is None:
        return None
    key = (marker.kwargs["stack"], marker.kwargs["what"])
    new = Row(**marker.kwargs, on_gpu=item.get_closest_marker("gpu") is not None)
    return item.config.stash[_ROWS].setdefault(key, new)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        _row(item)  # rows stand in the order of the tests


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    row = _row(item)
    if row is None or (report.when != "call" and report.passed):
        return
    row.outcomes.append(report.outcome)
    row.figures += [str(value) for name, value in item.user_properties if name == "figure"]
    if report.skipped and isinstance(report.longrepr, tuple):
        row.reasons.append(report.longrepr[2].removeprefix("Skipped: "))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say something that was measured, beside the row of this test."""
    return lambda text: record_property("figure", text)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    mode = session.config.getoption("--stacks-table", None)
    if mode is None or exitstatus:
        return
    before = DOCUMENT.read_text()
    now = with_table(with_recipes(before), list(session.config.stash[_ROWS].values()))
    if mode == "write":
        DOCUMENT.write_text(now)
    elif before != now:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        raise pytest.UsageError(f"{DOCUMENT.name} is out of date: run `pytest tests/stacks --stacks-table=write`")
