"""Rows that outlast the run that measured them: a benchmark of many minutes that was ended goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness.record import Row


@dataclass(frozen=True)
class Scratch:
    """A folder of rows, one file each. A row that was measured under another configuration is measured again.

    Attributes:
        folder: where the files lie; it is made where it is missing.
        config: everything that was chosen for these rows, as plain data.
    """

    folder: Path
    config: Row

    def row(self, name: str, measure: Callable[[], Row]) -> Row:
        """The row of this name: read, or measured and kept."""
        kept = self.kept(name)
        if kept is None:
            kept = measure()
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self._path(name)
            beside = path.with_suffix(".writing")
            beside.write_text(json.dumps({"config": self.config, "row": kept}))
            beside.rename(path)  # a file is whole, or is not there
        return kept

    def kept(self, name: str) -> Row | None:
        """The row of this name, if it was measured under this configuration."""
        path = self._path(name)
        found = json.loads(path.read_text()) if path.exists() else {"config": None}
        return found["row"] if found["config"] == json.loads(json.dumps(self.config)) else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_').replace(' ', '_')}.json"


def add_option(parser: argparse.ArgumentParser, benchmark: str) -> None:
    """Add ``--scratch`` to a benchmark's options."""
    default = Path(tempfile.gettempdir(), "revwire", benchmark)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=default,
        help="folder of the rows that are measured already (default: %(default)s)",
    )
