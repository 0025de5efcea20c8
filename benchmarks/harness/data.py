"""Where real data lies: ``--data-root``, or the environment variable REVWIRE_DATA. The data is not part of this
repository.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--data-root`` to a benchmark's options."""
    parser.add_argument("--data-root", type=Path, default=os.environ.get("REVWIRE_DATA"), help="default: $REVWIRE_DATA")


def file(root: Path | str | None, relative: str, what: str) -> Path:
    """The path of a data file.

    Raises:
        SystemExit: there is none; says what is missing, and where it was looked for.
    """
    if root is None:
        raise SystemExit(f"this benchmark needs {what} ({relative}); pass --data-root, or set REVWIRE_DATA")
    path = Path(root, relative)
    if not path.exists():
        raise SystemExit(f"this benchmark needs {what}; there is no {relative} in the data root")
    return path
