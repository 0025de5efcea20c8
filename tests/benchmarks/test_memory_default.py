"""The benchmark of the plain call: every model can be built and has a rival, a failure is null and a reason, and a
sweep goes on where it was cut short.
"""

import pytest
import torch
from torch import nn

import revwire
from benchmarks.harness import record
from benchmarks.harness.gpt import GPT
from benchmarks.memory import default, models
from benchmarks.memory import tables as memory_tables
from revwire.measure import peak_bytes

TOKENS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def toys(monkeypatch):
    """Two small stand-ins for the models: one that trains, one that cannot be built."""

    def missing():
        raise ImportError("no such library")

    found = {"gpt": lambda: (GPT(3, 64), TOKENS), "missing": missing}
    for module in (default, models):
        monkeypatch.setattr(module, "MODELS", found)


def test_a_row_has_the_three_variants_and_what_was_planned(toys):
    row = default.measured("gpt", rounds=2)
    assert row["reason"] is None
    assert (row["rival"], row["blocks"], row["units"]) == ("checkpoint every block", 3, 6)
    assert 0 < row["plain_bytes"] < row["stored_bytes"]
    assert 0 < row["rival_bytes"] < row["stored_bytes"]
    assert all(row[f"{variant}_seconds"]["median"] > 0 for variant in ("stored", "rival", "plain"))
    assert row["to_rival"]["low"] <= row["to_rival"]["median"] <= row["to_rival"]["high"]
    assert min(row["convert_seconds"], row["plan_seconds"]) > 0


def test_the_variants_are_those_of_the_same_weights(toys):
    model, example = default.made("gpt")
    default.step(revwire.rival(model, example).model, example)
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    default.step(model, example)
    for mine, true in zip(got, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-8)


class Widening(nn.Module):
    """Gives out much more than it takes and keeps, as a language model its logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 512)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def test_the_loss_takes_no_memory_of_its_own():
    """The output; then, as nobody holds it any more, its gradient, beside what is kept for the weights."""
    x = torch.randn(4096, 8)
    net = Widening()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    output = x.shape[0] * 512 * 4
    assert output <= peak_bytes(lambda: default.step(net, x)) <= 1.1 * output


def test_rows_that_were_measured_under_another_loss_are_measured_again(toys, tmp_path, monkeypatch):
    default.sweep(["missing"], 1, False, tmp_path)
    measured = []
    monkeypatch.setattr(default, "measured", lambda name, rounds: measured.append(name) or {"model": name})
    monkeypatch.setattr(default, "LOSS", "another")
    default.sweep(["missing"], 1, True, tmp_path)
    assert measured == ["missing"]


def test_a_model_that_fails_is_null_and_a_reason(toys):
    row = default.measured("missing", rounds=1)
    assert row["reason"] == "ImportError: no such library"
    assert {v for k, v in row.items() if k not in ("model", "reason")} == {None}
    assert memory_tables.default([row])[1][-1] == "failed: ImportError: no such library"


def test_a_sweep_goes_on_where_it_was_cut_short(toys, tmp_path, monkeypatch):
    first = default.sweep(["missing"], 1, False, tmp_path)
    measured = []
    monkeypatch.setattr(default, "measured", lambda name, rounds: measured.append(name) or {"model": name})
    rows = default.sweep(["gpt", "missing"], 1, True, tmp_path).results
    assert measured == ["gpt"]
    assert rows == [{"model": "gpt"}, *first.results]
    assert [r.results for r in record.read("default", tmp_path)] == [rows]


def test_the_table_sets_the_plain_call_beside_its_rival():
    even = {"low": 1.0, "median": 1.25, "high": 1.5}
    row = {
        "model": "m",
        "reason": None,
        "units": 4,
        "blocks": 0,
        "rival": "checkpoint (own switch)",
        "stored_bytes": 4 * 2**20,
        "rival_bytes": 2 * 2**20,
        "plain_bytes": 2**20,
        "checkpointed": 3,
        "stored_forecast": 4 * 2**20,
        "rival_forecast": 2**20 * 21 // 10,
        "plain_forecast": None,
        "to_rival": even,
        "to_stored": even,
        "convert_seconds": 2.0,
        "plan_seconds": 0.5,
    }
    head, cells, other = memory_tables.default([row, {**row, "blocks": 7}])
    assert len(head) == len(cells) == len(other)
    assert cells[1:7] == ["4, 3", "own switch", "4.0", "2.0", "1.0", "0.50"]
    assert cells[7:] == ["1.25 (1.00–1.50)", "1.25 (1.00–1.50)", "+0.0%, +5.0%, –", "2.0 (0.5)"]
    assert other[2] == "7 blocks"


@pytest.mark.parametrize("name", ["timm efficientnet_b0", "torchvision r3d_18", "Hugging Face BERT"])
@pytest.mark.filterwarnings("ignore")
def test_every_model_has_a_rival(name):
    model, example = models.made(name)
    rival = revwire.rival(model, example)
    assert rival.blocks or rival.name == "checkpoint (own switch)"
