"""The command line, ``revwire plan|verify|profile|doctor|demo``. Needs the extra ``revwire[cli]``."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDS = ("typer", "rich")


def main() -> None:
    """Entry point of the ``revwire`` script; says in one line what to install where the extra is missing."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        sys.exit(f"revwire: the command line needs {' and '.join(missing)}: pip install 'revwire[cli]'")
    from revwire.cli.app import app

    app()
