"""Validation loss of a small pre-norm transformer straight after conversion. The benchmark trains it first, on Python's
own sources.

python -m benchmarks.retention.language_model

A character model of 10 layers (20 units) on the files of the standard library, in nats per character. Training takes
some minutes on two cores; the trained weights are kept in ``--scratch``. `language_model_finetuning` goes on from them.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness.gpt import GPT
from benchmarks.harness.record import Row, run
from benchmarks.retention.resume import add_option
from benchmarks.retention.wirings import COUPLINGS, kept, or_reason, wirings

VOCABULARY = 128  # ASCII; other characters become the last one
TRAINING = {"depth": 10, "width": 128, "heads": 4, "length": 128, "batch": 16, "steps": 1500}


def text() -> tuple[Tensor, Tensor]:
    """(training, validation) character codes: every tenth file of the standard library, by name, is for validation."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[number % 10 == 0].append(path.read_bytes())
    training, validation = (
        torch.frombuffer(bytearray(b"".join(p)), dtype=torch.uint8).long().clamp_max(VOCABULARY - 1) for p in parts
    )
    return training, validation


def windows(codes: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` random windows: (count, length + 1)."""
    starts = torch.randint(len(codes) - length - 1, (count,), generator=generator)
    return torch.stack([codes[s : s + length + 1] for s in starts.tolist()])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean nats per character."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def trained(options: argparse.Namespace, codes: Tensor) -> nn.Module:
    """The model after its training, in evaluation mode: read from the scratch folder, or trained and kept there."""
    torch.manual_seed(0)
    model = GPT(options.depth, options.width, options.heads, VOCABULARY, options.length)
    path = options.scratch / "trained_gpt.pt"
    chosen = {name: getattr(options, name) for name in (*TRAINING, "rate")}
    kept = torch.load(path) if path.exists() else {"config": {}}
    if not kept["config"].items() >= chosen.items():
        kept = {"config": chosen, "weights": _train(model, options, codes)}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
    model.load_state_dict(kept["weights"])
    return model.eval()


def _train(model: nn.Module, options: argparse.Namespace, codes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, options.steps)
    for _ in track(range(options.steps), "training"):
        optimizer.zero_grad()
        loss(model, windows(codes, options.batch, options.length, generator)).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean nats per character over fixed windows."""
    return float(torch.stack([loss(model, batch) for batch in batches]).mean())


def validation(options: argparse.Namespace, codes: Tensor) -> list[Tensor]:
    """The fixed windows of the validation files."""
    return list(windows(codes, options.windows, options.length, torch.Generator().manual_seed(1)).split(32))


def measured(options: argparse.Namespace) -> list[Row]:
    """One row for each wiring."""
    training, held_out = text()
    model = trained(options, training)
    batches = validation(options, held_out)
    rows: list[Row] = []
    for wiring, network in track(
        wirings(lambda: copy.deepcopy(model), batches[0][:, :-1]), "wirings", total=len(COUPLINGS) + 2
    ):
        units, held = kept(network)
        row = {"wiring": wiring, "units": units, "kept_bytes": held, "loss": None}
        rows.append({**row, **or_reason(lambda network=network: {"loss": validation_loss(network, batches)})})
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the model and its training."""
    for name, value in {**TRAINING, "windows": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rate", type=float, default=2e-3)
    add_option(parser, "language_model")


def config(options: argparse.Namespace) -> Row:
    """What was chosen, without where it is kept."""
    return {name: getattr(options, name) for name in (*TRAINING, "rate", "windows")}


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    run("language_model", config(options), lambda: measured(options)).publish()


if __name__ == "__main__":
    main()
