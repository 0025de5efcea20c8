"""What the commands print: results, on narrow terminals too; errors in one line; that they are at work."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import typer


def show(result: Any, as_json: bool) -> None:
    """Print a result: as JSON, or as text, which a terminal may be too narrow for."""
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    elif sys.stdout.isatty() or "COLUMNS" in os.environ:
        typer.echo(fitted(str(result), shutil.get_terminal_size().columns))
    else:
        typer.echo(str(result))


def fitted(text: str, width: int) -> str:
    """A text in so many columns. A table that is wider becomes a list: a line for each cell, after its column's name.

    Example:
        >>> print(fitted("chain    units\\n-------  -----\\nchain 0  24", 12))
        chain: chain 0
        units: 24
    """
    lines, out = text.splitlines(), []
    while lines:
        line = lines.pop(0)
        if lines and lines[0] and not lines[0].strip("- ") and len(lines[0]) > width:
            rule = lines.pop(0)
            names = _cells(line, rule)
            while lines and _is_row(lines[0], rule):
                cells = [*zip(names, _cells(lines.pop(0), rule), strict=True)]
                out += [
                    part
                    for name, cell in cells
                    if cell
                    for part in _wrapped(f"{name}: {cell}" if name else cell, width)
                ]
                out.append("")
            out.pop()
        else:
            out += _wrapped(line, width)
    return "\n".join(out)


def _cells(line: str, rule: str) -> list[str]:
    """The cells of a row, by the dashes below the names of the columns."""
    ends = [*accumulate(len(dashes) + 2 for dashes in rule.split())]
    return [line[begin:end].strip() for begin, end in zip([0, *ends], [*ends[:-1], None], strict=False)]


def _is_row(line: str, rule: str) -> bool:
    """Whether the gaps between columns are empty in a line."""
    ends = [*accumulate(len(dashes) + 2 for dashes in rule.split())][:-1]
    return bool(line.strip()) and len(line) > ends[0] and all(not line[end - 2 : end].strip() for end in ends)


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) or [""]


def errors(line: str) -> None:
    """Print to standard error."""
    typer.echo(line, err=True)


@contextmanager
def working(what: str, *, shown: bool = True) -> Iterator[None]:
    """A spinner with the time gone by, on standard error, while it is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def reported(traceback: bool) -> Iterator[None]:
    """Errors are one line, and an exit code; with their traceback where that is asked for."""
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:  # a model may raise whatever it likes while it is built
        from revwire import RangeError, ReconstructionError, RevwireError

        if traceback:
            raise
        kind = "" if isinstance(error, RevwireError) else f"{type(error).__name__}: "
        said = str(error) if isinstance(error, RevwireError) else next(iter(str(error).splitlines()), "")
        errors(f"revwire: {kind}{said}" + ("" if not kind else " (--traceback shows where)"))
        raise typer.Exit(1 if isinstance(error, ReconstructionError | RangeError) else 2) from None
