"""The benchmarks' harness: records, tables, data; and the figures that can be asked of a test."""

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import revwire
from benchmarks.harness import data, record
from benchmarks.retention import imagenet_sample

ROOT = Path(__file__).parents[2]
SAMPLE = "images/imagenet_1000_samples_short256.tar"


def test_a_record_comes_back_as_it_was_written(tmp_path):
    made = record.run("step_time", {"depth": 1}, lambda: [{"method": "a", "seconds": 0.5}])
    made.write(tmp_path)
    assert record.read("step_time", tmp_path) == [made]
    assert made.status == "ok"
    assert made.environment["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_failure_is_null_and_a_reason(tmp_path):
    def fail():
        raise MemoryError("40 GiB")

    made = record.run("vit_depth", {}, fail)
    assert (made.status, made.results, made.reason) == ("failed", None, "MemoryError: 40 GiB")


def test_another_schema_is_refused(tmp_path):
    path = record.run("vit_depth", {}, list).write(tmp_path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 0'))
    with pytest.raises(ValueError, match="schema 0; expected 1; run the benchmark again"):
        record.read("vit_depth", tmp_path)


def test_published_tables_are_what_the_records_say():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.harness.tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_missing_data_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"needs a sample of ImageNet .* set REVWIRE_DATA"):
        data.file(None, SAMPLE, "a sample of ImageNet")
    with pytest.raises(SystemExit, match="there is no images/imagenet"):
        data.file(tmp_path, SAMPLE, "a sample of ImageNet")


@pytest.mark.slow
@pytest.mark.skipif("REVWIRE_DATA" not in os.environ, reason="needs real images: set REVWIRE_DATA")
def test_the_default_coupling_keeps_top1():
    """On every tenth class; `benchmarks.retention.imagenet_sample` measures all of them."""
    every = 10
    pictures = imagenet_sample.images(Path(os.environ["REVWIRE_DATA"], SAMPLE))[::every]
    normalize = imagenet_sample.NORMALIZATIONS["ImageNet"]
    model = imagenet_sample.classifier()

    def right():
        parts = imagenet_sample.predictions(model, pictures, normalize, batch=50)
        return (torch.cat(list(parts)) == torch.arange(0, 1000, every)).sum().item()

    before = right()
    assert before == 80  # the preprocessing is that of the reference figure, 768 of 1,000
    revwire.convert(model, normalize(pictures[:8].float() / 255), rewire="everywhere")
    assert right() >= before - 2


# -- the house ---------------------------------------------------------------------------------------------------------


def imports():
    """File -> the modules and names that it imports, wherever in it: in functions, for types only."""
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        yield path, found


def file_of(name):
    """The file of a module, or of a name in it; None for what is no part of the benchmarks."""
    for parts in (name.split("."), name.split(".")[:-1]):
        for path in (ROOT.joinpath(*parts).with_suffix(".py"), ROOT.joinpath(*parts, "__init__.py")):
            if parts[:1] == ["benchmarks"] and path.is_file():
                return path
    return None


def test_no_circle_among_the_benchmarks():
    graph = {path: {file_of(name) for name in names} - {path, None} for path, names in imports()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) > 80  # or a CycleError that names the files


def test_benchmarks_use_public_names_only():
    private = [
        (path.name, name)
        for path, names in imports()
        for name in names
        if name.split(".")[0] in ("revwire", "benchmarks") and any(part.startswith("_") for part in name.split("."))
    ]
    assert private == []
