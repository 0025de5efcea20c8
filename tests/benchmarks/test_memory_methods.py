"""The memory benchmarks: every method computes what it should, a failure is null and a reason, and tables say what
records say.
"""

import importlib
import subprocess
import sys

import pytest
import torch

from benchmarks.harness import record
from benchmarks.harness.gpt import GPT, Layer
from benchmarks.memory import hollow, planner, sweep
from benchmarks.memory import tables as memory_tables
from benchmarks.memory.alternatives import CHECKPOINT, METHODS, STORED, Unsuited
from benchmarks.memory.networks import NETWORKS, Network
from benchmarks.memory.steps import step as run_step

TOKENS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
SAME = (STORED, CHECKPOINT, sweep.SEGMENTS, sweep.SELECTIVE)


@pytest.fixture
def toy(monkeypatch):
    """A small stand-in for the GPT of the sweeps."""
    gpt = NETWORKS["GPT"]
    monkeypatch.setitem(NETWORKS, "GPT", Network(lambda depth: GPT(depth, 64), gpt.example, gpt.containers, gpt.axis))

    def build(method, depth=3):
        torch.manual_seed(0)
        return METHODS[method]("GPT", NETWORKS["GPT"].build(depth).train(), TOKENS)

    return build


def gradients_by_name(model):
    run_step(model, TOKENS)
    return {n.replace("layers.", ""): p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("method", SAME[1:])
def test_checkpointing_of_any_kind_gives_the_gradients_of_stored_activations(toy, method):
    mine, stored = gradients_by_name(toy(method)), gradients_by_name(toy(STORED))
    for (_, got), (_, true) in zip(mine.items(), stored.items(), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", [m for m in METHODS if m.startswith("revwire") and m not in sweep.WINDOWS])
def test_revwire_trains_the_same_parameters(toy, method):
    model, plain = toy(method), toy(STORED)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert all(g is not None and g.abs().sum() > 0 for g in gradients_by_name(model).values())


def test_only_networks_with_windows_run_window_by_window(toy):
    with pytest.raises(Unsuited, match="no windows along time"):
        toy(sweep.WINDOWS[0])


@pytest.mark.parametrize("package", ["momentumnet", "memcnn"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:TypedStorage is deprecated")
def test_other_packages_train_every_layer(toy, package):
    pytest.importorskip(package)
    model = toy(package)
    grads = gradients_by_name(model)
    assert len(grads) >= 3 * len(list(Layer(64, 1).parameters()))
    assert all(g is not None and g.isfinite().all() for g in grads.values())


def test_segments_hold_about_the_root_of_the_blocks(toy):
    model = toy(sweep.SEGMENTS, depth=9)
    assert [len(segment) for segment in model.layers] == [3, 3, 3]


@pytest.mark.parametrize("method", [STORED, CHECKPOINT, sweep.BDIA, sweep.RE2TAL])
def test_leaving_products_out_changes_no_byte(toy, method):
    model = toy(method)
    full, without = hollow.difference(lambda: run_step(model, TOKENS))
    assert full == without > 0


def test_outside_of_the_context_products_are_what_they_were():
    x = torch.randn(4, 4)
    before = x @ x
    with hollow.products_left_out():
        assert not (x @ x).any()
    assert torch.equal(x @ x, before)


def test_a_network_that_a_method_cannot_take_is_null_and_a_reason(toy, monkeypatch):
    def unsuited(*_):
        raise Unsuited("it has no branches")

    monkeypatch.setitem(sweep._EVERY, "memcnn", unsuited)
    case = {"network": "GPT", "depth": 1, "batch": 1, "length": 8, "method": "memcnn"}
    assert sweep.measured(case) == {**case, "peak_bytes": None, "reason": "Unsuited: it has no branches"}


def test_a_sweep_goes_on_where_it_was_cut_short(toy, monkeypatch, tmp_path):
    grid = sweep.Grid("GPT", (STORED, CHECKPOINT), depths=(2, 3), lengths=(16,))
    monkeypatch.setitem(sweep.SWEEPS, "memory_gpt", (grid,))
    whole = sweep.sweep("memory_gpt", False, tmp_path).results
    assert [(r["depth"], r["method"]) for r in whole] == [(d, m) for d in (2, 3) for m in (STORED, CHECKPOINT)]
    assert whole[0]["peak_bytes"] > whole[1]["peak_bytes"] > 0
    measured = []
    monkeypatch.setattr(
        sweep, "measured", lambda case: measured.append(case) or {**case, "peak_bytes": 1, "reason": None}
    )
    (kept,) = record.read("memory_gpt", tmp_path)
    record.Record(**{**vars(kept), "results": whole[:3]}).write(tmp_path)
    assert sweep.sweep("memory_gpt", True, tmp_path).results[:3] == whole[:3]
    assert [c["method"] for c in measured] == [CHECKPOINT]


def test_every_sweep_has_a_table_and_known_methods():
    assert set(sweep.SWEEPS) <= set(memory_tables.TABLES)
    methods = {m for grids in sweep.SWEEPS.values() for grid in grids for m in grid.methods}
    assert methods <= set(sweep._EVERY)
    assert set(planner.CASES) <= set(NETWORKS)


def row(method, peak, depth=1, batch=1, length=8, network="GPT"):
    return {
        "network": network,
        "depth": depth,
        "batch": batch,
        "length": length,
        "method": method,
        "peak_bytes": peak,
        "reason": None,
    }


def test_peaks_are_set_beside_checkpointing():
    rows = [row(CHECKPOINT, 2**20), row("a", 2**19), row("a", None, depth=2)]
    head, *body = memory_tables.peaks(rows)
    assert head == ["peak MiB of a step (× checkpointing)", "depth 1", "depth 2"]
    assert body == [[CHECKPOINT, "1.0 (1.00×)", ""], ["a", "0.5 (0.50×)", "–"]]


def test_the_largest_input_follows_from_a_line():
    lines = {STORED: (0, 8), CHECKPOINT: (0, 2), "a": (8, 1)}
    rows = [row(m, (base + slope * n) * 2**26, batch=n) for m, (base, slope) in lines.items() for n in (1, 2, 4)]
    table = {cells[1]: cells for cells in memory_tables.fit(rows)[1:]}
    assert table["a"][2:6] == ["768.0 (4)", "64.0", "0.0%", "24 (1.5×, 6.0×)"]  # 2 GiB: (32 - 8) / 1, 32 / 2, 32 / 8
    rows[-2]["peak_bytes"] *= 1.1
    assert {cells[1]: cells[4] for cells in memory_tables.fit(rows)[1:]}["a"] == "9.1%"
    assert memory_tables.fit(rows[:1])[1][2:] == ["512.0 (8)", "", "", "", "", ""]


def test_predictions_are_set_beside_what_came():
    rows = [
        {"network": "n", "share": s, "predicted_bytes": p * 2**20, "measured_bytes": 100 * 2**20}
        for s, p in ((0.0, 90), (1.0, 105))
    ]
    assert memory_tables.planner(rows)[1] == ["n", "90.0 (-10.0%)", "105.0 (+5.0%)", "10.0%", ""]
    rival = {"checkpoint_predicted_bytes": 51 * 2**20, "checkpoint_measured_bytes": 50 * 2**20}
    rows = [{**r, **rival, "predicted_time_ratio": 1.2, "measured_time_ratio": 1.25} for r in rows]
    head, cells = memory_tables.planner(rows)
    assert head[0] == "predicted MiB (off the measured peak); predicted and measured seconds, × all stored"
    assert cells == ["n", "90.0 (-10.0%); 1.20, 1.25", "105.0 (+5.0%); 1.20, 1.25", "10.0%", "51.0 (+2.0%)"]


def test_what_the_machinery_costs_is_what_is_left(monkeypatch):
    overhead = importlib.import_module("benchmarks.memory.overhead")
    monkeypatch.setattr(overhead, "UNITS", 4)
    rows = overhead.measured(2)
    assert [(r["method"], r["direction"]) for r in rows] == [
        (c, d) for c in ("checkpoint per two blocks", "re2tal", "bdia:1/16") for d in ("forward", "backward")
    ]
    for row in rows:
        again = row["plain"]["median"] + (rows[0]["plain"]["median"] if row["direction"] == "backward" else 0)
        assert row["machinery"] == pytest.approx(row["whole"]["median"] - again - row["arithmetic"])
    assert memory_tables.overhead(rows)[3][0] == "re2tal, forward"
    assert len(memory_tables.overhead(rows)) == 7


def test_a_network_written_by_hand_is_left_out_where_its_source_is_not(monkeypatch):
    monkeypatch.delenv("OPENTAD", raising=False)
    row = {"network": "swin3d_t", "depth": 12, "batch": 1, "length": 4, "method": "OpenTAD's Re2TAL Swin"}
    assert "set OPENTAD to a checkout of" in sweep.measured(row)["reason"]
    assert "GPT is no Video Swin" in sweep.measured({**row, "network": "GPT", "length": 8})["reason"]


def test_the_planner_predicts_within_its_claim(toy, monkeypatch):
    monkeypatch.setitem(planner.CASES, "GPT", (3, 2, 40))
    rows = planner.measured("GPT", (0.5, 1.0), rounds=0)
    assert all(abs(r["predicted_bytes"] / r["measured_bytes"] - 1) < 0.15 for r in rows)
    assert all(r["measured_bytes"] <= r["budget"] * 1.02 for r in rows[1:])
    assert rows[-1]["stored"] == 6
    assert rows[0]["checkpoint_predicted_bytes"] == pytest.approx(rows[0]["checkpoint_measured_bytes"], rel=0.05)


def test_plots_are_drawn_from_records(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    plots = importlib.import_module("benchmarks.memory.plots")
    monkeypatch.setattr(plots, "PICTURES", tmp_path)
    made = record.run(
        "memory_vit", {}, lambda: [row(m, p * d, depth=d) for m, p in (("a", 100), ("b", 50)) for d in (1, 2)]
    )
    path = plots.by_axis(made)
    first = path.read_text()
    assert path == tmp_path / "memory_vit.svg"
    assert "<svg" in first
    assert plots.by_axis(made).read_text() == first


def test_a_front_has_plans_with_the_bytes_of_its_rivals(toy):
    pareto = importlib.import_module("benchmarks.memory.pareto")
    left = (STORED, CHECKPOINT, "selective checkpoint per block")
    rows = {r["method"]: r for r in pareto.measured("GPT", 4, 8, 32, 1, tuple(m for m in METHODS if m not in left))}
    assert {*left, *(f"revwire {c}, budget of {rival}" for c in pareto.COUPLINGS for rival in pareto.RIVALS)} < {*rows}
    for rival, method in pareto.RIVALS.items():
        row = rows[f"revwire re2tal, budget of {rival}"]
        assert row["reason"] is not None or row["peak_bytes"] <= 1.02 * rows[method]["peak_bytes"]
        assert row["reason"] is not None or row["to_checkpoint"]["median"] > 0


FAULTS = """
import resource, torch
from benchmarks.harness.heap import keep_memory
if {kept}:
    keep_memory()
for _ in range(16):  # until the heap has found its shape
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a switch of glibc")
def test_kept_memory_costs_no_page_faults():
    plain, kept = (
        int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(kept=k)], check=True, capture_output=True, text=True
            ).stdout
        )
        for k in (False, True)
    )
    assert kept < plain / 10
