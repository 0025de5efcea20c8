"""From records to tables: ``python -m benchmarks.harness.tables`` renews every table in the Markdown files, ``--check``
only compares.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; what is between them is never written by hand.
``NAME or OTHER`` is the first of which there are records.
Each benchmark says in its ``tables.py`` how a table is made: ``TABLES`` from the rows of one record, by the record's
name, ``VIEWS`` likewise where a record has further tables, and ``SUMMARIES`` from several records.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.cells import Table
from benchmarks.harness.record import RESULTS, Record, Row, read

ROOT = RESULTS.parents[1]
DOCUMENTS = sorted({ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")})
NOT_MEASURED = "not measured yet\n"
_BLOCK = re.compile(r"(<!-- table: (\w+(?: or \w+)*) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


class Makers(NamedTuple):
    """What makes a table, by its name: from the rows of the record of that name, of another record, and from what the
    maker reads for itself.
    """

    of_rows: dict[str, Callable[[list[Row]], Table]]
    views: dict[str, tuple[str, Callable[[list[Row]], Table]]]
    summaries: dict[str, Callable[[], Table]]


@cache
def makers() -> Makers:
    """Those of all benchmarks."""
    found = Makers({}, {}, {})
    for path in sorted(ROOT.glob("benchmarks/*/tables.py")):
        if path != Path(__file__):
            module = import_module(f"benchmarks.{path.parent.name}.tables")
            found.of_rows.update(module.TABLES)
            found.views.update(getattr(module, "VIEWS", {}))
            found.summaries.update(getattr(module, "SUMMARIES", {}))
    return found


def render(name: str) -> str:
    """The tables of an experiment, one per device, each with its conditions below it; or a summary."""
    if name in makers().summaries:
        table = makers().summaries[name]()
        return "\n".join([*_lines(table), ""]) if len(table) > 1 else NOT_MEASURED
    if name in makers().views:
        source, maker = makers().views[name]
        return "\n".join(_render(record, maker) for record in read(source)) or NOT_MEASURED
    records = next(filter(None, map(read, name.split(" or "))), [])
    return "\n".join(_render(record, makers().of_rows[record.name]) for record in records) or NOT_MEASURED


def _render(record: Record, maker: Callable[[list[Row]], Table]) -> str:
    e = record.environment
    under = f"{e['device'].removeprefix('cpu ')}, {e['threads']} threads, PyTorch {e['versions']['torch']}, {e['date']}"
    if record.results is None:
        return f"failed: {record.reason}\n\n*{under}*\n"
    return "\n".join([*_lines(maker(record.results)), "", f"*{under}*", ""])


def _lines(table: Table) -> list[str]:
    head, *rows = table
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def renewed(text: str) -> str:
    """A document with its tables made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{render(block[2])}\n{block[4]}", text)


def main() -> None:
    """Renew or check the tables of all documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table is not what the records say")
    check = parser.parse_args().check
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        if renewed(text) != text:
            stale.append(str(path.relative_to(ROOT)))
            if not check:
                path.write_text(renewed(text))
    print(f"{'out of date' if check else 'renewed'}: {', '.join(stale) or 'nothing'}")
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
