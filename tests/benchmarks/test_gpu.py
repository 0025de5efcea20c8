"""The benchmarks for a GPU: every part runs on a CPU, parts are stopped and resumed, and what is counted is right."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import fit, plots, roofline, stage
from benchmarks.gpu import tables as gpu_tables
from benchmarks.gpu.counting import Counted, Work, counted
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.subjects import Setting
from benchmarks.harness import record, tables
from benchmarks.harness.record import RESULTS

ROOT = Path(__file__).parents[2]
TINY = Setting(torch.device("cpu"), True)


@pytest.mark.slow
def test_the_dry_run_runs_every_part(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "60", "--folder", tmp_path],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": done\n") == len(PARTS), done.stdout
    found = {name: record.read(name, tmp_path)[0] for name in {part.record for part in PARTS.values()}}
    assert all(r.config["dry_run"] for r in found.values())
    assert all(row["bit_exact"] and row["steps"] == "exact" for row in found["gpu_bits"].results)
    assert not any(row["failed"] or row["reason"] for row in found["gpu_conformance"].results)
    assert not any(row["reason"] for name in ("gpu_costs", "gpu_fit") for row in found[name].results)
    assert all(row["peak_bytes"] > 0 and row["seconds"]["median"] > 0 for row in found["gpu_costs"].results)
    assert {row["network"] for row in found["gpu_costs"].results} == {
        *("ViT-L/16", "Swin3D-B", "Llama-like, 8k tokens", "Llama-like, 32k tokens", "Re2Swin-T and ActionFormer")
    }
    assert all(row["too_large"] > row["largest"] > 0 for row in found["gpu_fit"].results)
    units = {row["case"]: row["counted"] for row in found["gpu_launches"].results}
    assert all(row["waits_per_unit"] == 0 for row in units.values())
    assert units["stored activations"]["launches_per_unit"] < units["revwire re2tal"]["launches_per_unit"]
    for name, made in found.items():
        lengths = {len(cells) for cells in tables.makers().of_rows[name](made.results)}
        assert len(lengths) == 1
    assert plots.costs(found["gpu_costs"], tmp_path).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "xpu"), "got the device 'xpu'; expected a CUDA device"),
        (("--device", "gpu:x"), "got the device 'gpu:x'; expected a CUDA device"),
        (("--dry-run", "--only", "nothing"), "got --only 'nothing'; expected a glob of bits"),
        (("--dry-run", "--minutes", "0"), "got --minutes 0; expected more than 0"),
        (("--dry-run", "--folder", str(RESULTS)), "got the folder of the results for a dry run"),
    ],
)
def test_bad_options_are_one_line(options, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *options])
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: ") as error:
        command.options()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu"])
    with pytest.raises(SystemExit, match=r"there is no CUDA device here; --dry-run runs every part on the CPU"):
        command.options()


# -- parts that are stopped, that fail, and that go on -----------------------------------------------------------------


def rows_then(then):
    def measure(setting, done):
        yield from ({"case": case, "reason": None} for case in ("a", "b") if case not in done)
        then()

    return measure


def fails():
    raise ValueError("why")


@pytest.fixture
def book(tmp_path):
    return command.Book(tmp_path, {"device": "cpu X"}, True)


def run(book, then, monkeypatch, seconds=60.0, left=60.0):
    monkeypatch.setitem(PARTS, "toy", Part("gpu_toy", seconds, rows_then(then)))
    said = command.run("toy", book, Setting(torch.device("cpu"), False), left)
    return said, [(row["case"], row["reason"]) for row in book.record("gpu_toy").results]


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_part_ends_and_is_known_to(book, monkeypatch):
    assert run(book, lambda: None, monkeypatch) == ("done", [("a", None), ("b", None)])
    assert (book.state("toy"), book.cases("toy")) == ("done", {"a", "b"})
    book.forget("toy")
    assert (book.state("toy"), book.cases("toy")) == (None, set())


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
@pytest.mark.parametrize(
    ("then", "reason"),
    [(fails, "ValueError: why"), (lambda: os._exit(7), "its process ended with 7")],
    ids=["raises", "dies"],
)
def test_a_part_that_fails_keeps_its_rows_and_says_why(then, reason, book, monkeypatch):
    said, rows = run(book, then, monkeypatch)
    assert (said, rows) == (reason, [("a", None), ("b", None), ("toy", reason)])
    assert book.state("toy") == "stopped"


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_a_part_that_takes_longer_than_its_time_is_stopped(book, monkeypatch):
    said, rows = run(book, lambda: time.sleep(600), monkeypatch, seconds=3.0)
    assert (said, rows[-1]) == ("stopped after 3 s", ("toy", "stopped after 3 s"))
    assert book.state("toy") == "stopped"


@pytest.mark.filterwarnings("ignore:.*multi-threaded")
def test_where_the_time_of_all_is_over_the_same_command_goes_on(book, monkeypatch):
    said, rows = run(book, lambda: time.sleep(600), monkeypatch, left=3.0)
    assert said.startswith("not finished")
    assert (book.state("toy"), rows) == (None, [("a", None), ("b", None)])
    monkeypatch.setattr(stage, "rows", lambda part, setting, done, seconds: iter([{"case": "c", "done": sorted(done)}]))
    command.run("toy", book, TINY, 60.0)
    assert book.record("gpu_toy").results[-1]["done"] == ["a", "b"]
    assert book.state("toy") == "done"


def test_main_runs_what_is_not_ended(book, monkeypatch, capsys):
    for part in PARTS:
        book.end(part, "done", 1.0)
    book.forget("fit")
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", "--dry-run", "--folder", str(book.folder)])
    monkeypatch.setattr(command, "opened", lambda folder, setting: book)
    monkeypatch.setattr(command, "run", lambda part, *_: f"run {part}")
    command.main()
    out = capsys.readouterr().out
    assert out.count("done before") == len(PARTS) - 1
    assert "fit: run fit" in out


# -- what fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 5, 64, 100, 1000, 4321])
@pytest.mark.parametrize("per_size", [1.0, 1.3])
def test_the_largest_that_fits_is_found(most, per_size):
    tried = []

    def attempt(size):
        tried.append(size)
        return int(1000 + 10 * size**per_size) if size <= most else None

    found = fit.search(attempt, 64, int(1000 + 10 * most**per_size))
    assert found.largest <= most < found.too_large
    assert found.largest >= 0.9 * most
    assert found.expected is None or found.expected >= found.largest
    assert len(tried) == len(set(tried))


def test_what_would_take_too_long_is_not_tried(monkeypatch):
    seconds = iter(range(0, 1000, 5))
    monkeypatch.setattr(fit, "perf_counter", lambda: next(seconds))
    tried = []
    found = fit.search(lambda size: tried.append(size) or 10 * size, 8, 10_000)
    assert tried == [8, 16]  # the next one, of 64, would take 80 seconds
    assert found == fit.Largest(16, 160, None, 1000)


def test_where_nothing_fits():
    assert fit.search(lambda size: None, 4, 100) == fit.Largest(None, None, 1, None)


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_bytes_and_operations_are_counted():
    a, b = torch.ones(8, 4), torch.ones(4)
    with Counted() as mode:
        a.add_(b.expand(8, 4))
        (a.view(4, 8) @ a).sum()
        torch.empty(4).copy_(b)
    assert mode.work == [
        Work("add_.Tensor", 4 * (32 + 4 + 32), 0),
        Work("mm.default", 4 * (32 + 32 + 16), 2 * 4 * 8 * 4),
        Work("sum.default", 4 * 17, 0),
        Work("copy_.default", 4 * 8, 0),
    ]
    assert not any(work.waits for work in mode.work)


def test_waits_are_counted_and_random_states_are_none():
    state = torch.get_rng_state()
    with Counted() as mode:
        torch.ones(2).sum().item()
        torch.equal(state, state)
    assert [work.name for work in mode.work if work.waits] == ["_local_scalar_dense.default"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")
def test_counting_wants_kernels_that_are_interpreted():
    with pytest.raises(RuntimeError, match="kernels are not interpreted here"), counted():
        pass


def test_an_estimate_grows_with_the_batch():
    pair = Work("a", 100, 10), Work("a", 140, 15)
    assert roofline.at(pair, 2) == pair[0]
    assert roofline.at(pair, 10) == Work("a", 420, 50)
    rates = roofline.Rates(100.0, 10.0)
    assert roofline.seconds([Work("a", 420, 50), Work("b", 1, 50), Work("c", 0, 0)], rates) == pytest.approx(
        5 + 5 + roofline.LAUNCH
    )


def test_the_roofline_says_whether_its_target_is_met():
    (made,) = record.read("gpu_roofline") or [None]
    assert made.config["what"] == "an estimate"
    head, *rows = gpu_tables.roofline(made.results)
    assert head[0].startswith("estimate")
    for row, cells in zip(made.results, rows, strict=True):
        ratios = [row[k] for k in row if k.startswith("to_checkpointing")]
        expected = "–" if row["target"] is None else ", ".join("yes" if r <= row["target"] else "no" for r in ratios)
        assert cells[-1] == expected


def test_a_table_of_either_record(monkeypatch):
    made = record.read("vit_depth")
    monkeypatch.setattr(tables, "read", lambda name: made if name == "vit_depth" else [])
    assert tables.render("gpu_costs or vit_depth") == tables.render("vit_depth")
    monkeypatch.setattr(tables, "read", lambda name: [])
    assert tables.render("gpu_costs or vit_depth") == tables.NOT_MEASURED


def test_what_failed_stands_in_the_tables():
    row = {"part": "costs: fit", "case": "c", "reason": "stopped after 3 s"}
    for name in ("costs", "bits", "conformance", "fit"):
        head, cells = getattr(gpu_tables, name)([row])
        assert len(head) == len(cells)
        assert cells[-1] == "failed: stopped after 3 s"
    assert json.dumps(gpu_tables.launches([row])[1]) == json.dumps(["c", *["–"] * 6], ensure_ascii=True)
