"""The tutorials: ``python -m benchmarks.site.notebooks`` runs every notebook of ``docs/tutorials`` from its first cell
to its last, and writes what came out into it. Outputs are never written by hand.
"""

from __future__ import annotations

import argparse
import os
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
SECONDS = 300
"""A cell that takes longer has failed."""


def executed(path: Path) -> Any:
    """The notebook with the outputs of this run; raises where a cell raises."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    search = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with TemporaryDirectory() as folder:  # for the files that cells write
        at = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=SECONDS, record_timing=False, resources=at)
        client.execute(env={**os.environ, "PYTHONPATH": search})
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]  # warnings about the machine
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def as_page(path: Path) -> str:
    """The notebook as Markdown, with the text that its cells printed."""
    import json

    cells = json.loads(path.read_text())["cells"]
    parts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else _code(cell) for cell in cells]
    heading, _, rest = parts[0].partition("\n")
    return "\n\n".join([heading, f"*This page is [a notebook]({path.name}).*", rest.strip(), *parts[1:]]) + "\n"


def _code(cell: dict[str, Any]) -> str:
    printed = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
    shown = f"\n\n```text\n{printed.rstrip()}\n```" if printed else ""
    return f"```python\n{''.join(cell['source'])}\n```{shown}"


def main() -> None:
    """Run those that are named, or all."""
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help=f"of {', '.join(p.stem for p in NOTEBOOKS)}")
    only = parser.parse_args().only
    for path in NOTEBOOKS:
        if fnmatch(path.stem, only):
            nbformat.write(executed(path), path)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
