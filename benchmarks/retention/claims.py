"""What the default coupling was asked to show, and what the records say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness.cells import Table
from benchmarks.harness.record import Record, Row, read
from benchmarks.retention.seeds import deployments, nats, percent, seeds

DEFAULT = "bdia"
STAND_INS = {"bdia": "bdia:1/16"}
"""Records from before the default had a row of its own: on residual and post-activation units it is this coupling."""


def claims() -> Table:
    """What the default coupling was asked to show, and what the records say."""
    table = [["network", "deployed", "asked of the default coupling", "measured", "holds"]]
    for claim in (_cifar, _imagenet, _language_model, _sentences, _finetuned_cifar, _finetuned_language_model):
        table += [row for record in claim.records() for row in claim.judge(record)]
    return table


@dataclass(frozen=True)
class _Claim:
    """What one record is asked to show: rows of the table."""

    name: str
    judge: Callable[[Record], Table]

    def records(self) -> list[Record]:
        return [record for record in read(self.name) if record.results]


def _claim(name: str) -> Callable[[Callable[[list[Row]], Table]], _Claim]:
    return lambda judge: _Claim(name, lambda record: judge(record.results or []))


def _of_default(rows: list[Row]) -> Row:
    named = {row["wiring"]: row for row in rows}
    return named.get(DEFAULT) or named[STAND_INS[DEFAULT]]


def _relative(network: str, before: float, after: float) -> list[str]:
    loss = 1 - after / before
    return [
        network,
        "rewired, no training",
        "at most 0.5% relative loss of top-1",
        f"{-loss:+.2%}",
        _holds(loss <= 0.005),
    ]


def _holds(value: bool) -> str:
    return "yes" if value else "**no**"


@_claim("cifar_conversion")
def _cifar(rows: list[Row]) -> Table:
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        before = next(row["top1"] for row in mine if row["wiring"] == "original")
        table.append(_relative(network, before, _of_default(mine)["top1"]))
    return table


@_claim("imagenet_sample")
def _imagenet(rows: list[Row]) -> Table:
    table = []
    for norm in dict.fromkeys(row["normalization"] for row in rows):
        mine = [row for row in rows if row["normalization"] == norm]
        before = next(row["top1"] for row in mine if row["wiring"] == "original")
        table.append(_relative(f"EfficientNet-Lite0, {norm} normalisation", before, _of_default(mine)["top1"]))
    return table


@_claim("language_model")
def _language_model(rows: list[Row]) -> Table:
    before = next(row["loss"] for row in rows if row["wiring"] == "original")
    rise = _of_default(rows)["loss"] / before - 1
    asked = "at most 1% relative rise of validation loss"
    return [["character model", "rewired, no training", asked, f"{rise:+.2%}", _holds(rise <= 0.01)]]


@_claim("sentences")
def _sentences(rows: list[Row]) -> Table:
    cosine = _of_default(rows)["mean_cosine"]
    return [
        [
            "all-MiniLM-L6-v2",
            "rewired, no training",
            "mean cosine at least 0.99",
            f"{cosine:.4f}",
            _holds(cosine >= 0.99),
        ]
    ]


@_claim("cifar_finetuning")
def _finetuned_cifar(rows: list[Row]) -> Table:
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        table += _as_good(network, mine, "top1", better=1)
        table += _sooner(network, mine, "top1_part", better=1)
    return table


@_claim("language_model_finetuning")
def _finetuned_language_model(rows: list[Row]) -> Table:
    return [*_as_good("character model", rows, "loss", better=-1), *_sooner("character model", rows, "loss", better=-1)]


def _as_good(network: str, rows: list[Row], key: str, better: int) -> Table:
    """Against stored activations after the largest budget: not worse by more than two standard errors of the
    difference.
    """
    last = max(row["steps"] for row in rows)
    stored, table = seeds(rows, key, wiring="stored", steps=last), []
    for deployed, prefix in deployments(DEFAULT):
        mine = seeds(rows, prefix + key, wiring=DEFAULT, steps=last)
        if stored is None or mine is None:
            continue
        difference, error = mine.minus(stored)
        asked = f"after {last} steps as good as stored activations, within two standard errors"
        fewest = min(len(stored.values), len(mine.values))
        shown = (
            f"{difference:+.4f} ± {error:.4f} nats"
            if key == "loss"
            else f"{100 * difference:+.2f} ± {100 * error:.2f} points"
        )
        if fewest > 1:
            table.append(
                [network, deployed, asked, f"{shown} ({fewest} seeds)", _holds(better * difference >= -2 * error)]
            )
        else:
            table.append([network, deployed, asked, f"{shown.split(' ± ')[0]} (one seed)", "not known from one seed"])
    return table


def _sooner(network: str, rows: list[Row], key: str, better: int) -> Table:
    """The first budget against the paper's rewiring after the same and after larger ones."""
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    mine = seeds(rows, key, wiring=DEFAULT, steps=steps[0])
    papers = {k: s for k in steps if (s := seeds(rows, key, wiring="re2tal", steps=k))}
    if mine is None or not papers:
        return []
    shown = nats if key == "loss" else percent
    caught_up = [k for k, s in papers.items() if better * (s.mean - mine.mean) >= 0]
    asked = f"reaches in {steps[0]} steps what `re2tal` needs many more for"
    figures = "; ".join(f"{shown(s)} after {k}" for k, s in papers.items())
    return [[network, "both rewired", asked, f"{shown(mine)}; `re2tal`: {figures}", _holds(steps[0] not in caught_up)]]
