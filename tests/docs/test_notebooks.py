"""The tutorials run from their first cell to their last, and hold what a run of them printed."""

from __future__ import annotations

import json

import pytest
from pages import NOTEBOOKS, ROOT

from benchmarks.site import notebooks


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Jupyter, about itself
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str) -> None:
    for package in ("nbclient", "ipykernel", "timm", "torchvision"):
        pytest.importorskip(package, reason=f"needs {package}")
    if "lora" in name:
        pytest.importorskip("peft", reason="needs PEFT")
    made = notebooks.executed(ROOT / name)
    assert all(cell.execution_count for cell in made.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_one_run(name: str) -> None:
    """From the first cell to the last, by the command; no cell was run alone, or left out."""
    cells = [cell for cell in json.loads((ROOT / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]


def test_a_notebook_becomes_a_page() -> None:
    page = notebooks.as_page(ROOT / NOTEBOOKS[0])
    assert page.startswith("# ")
    assert "```python\n" in page
    assert "```text\n" in page
