"""The benchmarks' harness: records, tables, data; and the figures that can be asked of a test."""

import os
import subprocess
import sys
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
    pictures = imagenet_sample.images(Path(os.environ["REVWIRE_DATA"], SAMPLE))
    normalize = imagenet_sample.NORMALIZATIONS["ImageNet"]
    model = imagenet_sample.classifier()

    def top1():
        parts = imagenet_sample.predictions(model, pictures, normalize, batch=50)
        return (torch.cat(list(parts)) == torch.arange(1000)).sum().item()

    assert top1() == 768  # the preprocessing is that of the reference figure
    revwire.convert(model, normalize(pictures[:8].float() / 255))
    assert top1() >= 760
