"""Collects what the tests of each stack came to, for the table of docs/training-stacks.md; see `table`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from table import DOCUMENT, Row, noted, read_outcomes, with_new, with_recipes, with_table, write_outcomes

_ROWS = pytest.StashKey[dict[tuple[str, str], Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stacks-table",
        choices=("write", "check"),
        help="write docs/training-stacks.md, or check that it is up to date",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = {}
    config.pluginmanager.register(_Collector(config), "stacks-collector")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Tell with each report which row it fills: tests may run in other processes than the one that writes the table."""
    outcome: Any = yield
    marker = item.get_closest_marker("stack")
    if marker is not None:
        where = (item.location[0], item.location[1] or 0)
        on_gpu = item.get_closest_marker("gpu") is not None
        outcome.get_result().user_properties.append(("stack", {**marker.kwargs, "where": where, "on_gpu": on_gpu}))


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Say something that was measured, beside the row of this test."""
    return lambda text: record_property("figure", text)


class _Collector:
    """Turns reports into rows."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties).get("stack")
        if not isinstance(told, dict) or (report.when != "call" and report.passed):
            return
        told = {**told, "where": tuple(told["where"])}
        row = self.config.stash[_ROWS].setdefault((told["stack"], told["what"]), Row(**told))
        row.where = min(row.where, told["where"])
        row.outcomes.append(report.outcome)
        row.figures += [str(value) for name, value in report.user_properties if name == "figure"]
        if report.skipped and isinstance(report.longrepr, tuple):
            row.reasons.append(report.longrepr[2].removeprefix("Skipped: "))

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        mode = self.config.getoption("--stacks-table", None)
        if mode is None or hasattr(self.config, "workerinput"):
            return
        rows = with_new(read_outcomes(), noted(list(self.config.stash[_ROWS].values())))
        before = DOCUMENT.read_text()
        now = with_table(with_recipes(before), rows)
        if mode == "write":
            write_outcomes(rows)
            DOCUMENT.write_text(now)
        elif (read_outcomes(), before) != (rows, now):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            message = f"{DOCUMENT.name} is out of date: run pytest tests/stacks --stacks-table=write"
            self.config.get_terminal_writer().line(message, red=True)
