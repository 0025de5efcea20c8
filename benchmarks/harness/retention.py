"""The tables of the retention benchmarks: what fine-tuning makes of each wiring, the bits that a unit keeps, and what
was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from benchmarks.harness.record import Record, Row, read

DEFAULT = "bdia"
STAND_INS = {"bdia": "bdia:1/16"}
"""Records from before the default had a row of its own: on residual and post-activation units it is this coupling."""


@dataclass(frozen=True)
class Seeds:
    """One figure, measured with several seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float:
        """The sample standard deviation; 0 for one seed."""
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def minus(self, other: Seeds) -> tuple[float, float]:
        """(difference of the means, its standard error)."""
        error = sqrt(sum(s.deviation**2 / len(s.values) for s in (self, other)))
        return self.mean - other.mean, error


def seeds(rows: Iterable[Row], key: str, **chosen: object) -> Seeds | None:
    """The figure ``key`` of the rows in which these columns have these values; None where nothing was measured."""
    found = tuple(row[key] for row in rows if row[key] is not None and all(row[k] == v for k, v in chosen.items()))
    return Seeds(found) if found else None


def cifar_finetuning(rows: list[Row]) -> list[list[str]]:
    """Top-1 by network, wiring and deployment (rows) and steps (columns)."""
    steps = sorted({row["steps"] for row in rows})
    head = [
        "network",
        "wiring",
        "deployed",
        *(f"{k} steps" for k in steps),
        f"{steps[-1]} steps, whole test set",
        "seeds",
    ]
    table = [head]
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        for wiring in dict.fromkeys(row["wiring"] for row in mine):
            for deployed, prefix in _deployments(wiring):
                cells = [_percent(seeds(mine, f"{prefix}top1_part", wiring=wiring, steps=k)) for k in steps]
                whole = seeds(mine, f"{prefix}top1", wiring=wiring, steps=steps[-1])
                table.append(
                    [network, wiring, deployed, *cells, _percent(whole), str(len(whole.values)) if whole else "0"]
                )
    return table


def language_model_finetuning(rows: list[Row]) -> list[list[str]]:
    """Validation loss by wiring and deployment (rows) and steps (columns)."""
    steps = sorted({row["steps"] for row in rows})
    table = [["wiring", "deployed", *(f"{k} steps" for k in steps), "seeds"]]
    for wiring in dict.fromkeys(row["wiring"] for row in rows):
        for deployed, prefix in _deployments(wiring):
            found = [seeds(rows, f"{prefix}loss", wiring=wiring, steps=k) for k in steps]
            last = found[-1]
            table.append([wiring, deployed, *map(_nats, found), str(len(last.values)) if last else "0"])
    return table


def kept_bytes(rows: list[Row]) -> list[list[str]]:
    """Bits by coupling: declared, and measured."""
    head = ["wiring", "bits per element and unit, declared", "measured"]
    figures = (
        ("–" if r["declared_bits"] is None else str(r["declared_bits"]), f"{r['measured_bits']:.2f}") for r in rows
    )
    return [head, *([r["wiring"], *cells] for r, cells in zip(rows, figures, strict=True))]


def _deployments(wiring: str) -> list[tuple[str, str]]:
    return [("original", "")] if wiring in ("stored", "scratch") else [("rewired", ""), ("reverted", "reverted_")]


def _percent(figure: Seeds | None) -> str:
    if figure is None:
        return "–"
    return (
        f"{figure.mean:.1%}" if len(figure.values) == 1 else f"{100 * figure.mean:.1f} ± {100 * figure.deviation:.1f}%"
    )


def _nats(figure: Seeds | None) -> str:
    if figure is None:
        return "–"
    return f"{figure.mean:.4f}" if len(figure.values) == 1 else f"{figure.mean:.4f} ± {figure.deviation:.4f}"


# -- what was asked for ------------------------------------------------------------------------------------------------


def claims() -> list[list[str]]:
    """What the default coupling was asked to show, and what the records say."""
    table = [["network", "deployed", "asked of the default coupling", "measured", "holds"]]
    for claim in (_cifar, _imagenet, _language_model, _sentences, _finetuned_cifar, _finetuned_language_model):
        table += [row for record in claim.records() for row in claim.judge(record)]
    return table


@dataclass(frozen=True)
class _Claim:
    """What one record is asked to show: rows of the table."""

    name: str
    judge: Callable[[Record], list[list[str]]]

    def records(self) -> list[Record]:
        return [record for record in read(self.name) if record.results]


def _claim(name: str) -> Callable[[Callable[[list[Row]], list[list[str]]]], _Claim]:
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
def _cifar(rows: list[Row]) -> list[list[str]]:
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        before = next(row["top1"] for row in mine if row["wiring"] == "original")
        table.append(_relative(network, before, _of_default(mine)["top1"]))
    return table


@_claim("imagenet_sample")
def _imagenet(rows: list[Row]) -> list[list[str]]:
    table = []
    for norm in dict.fromkeys(row["normalization"] for row in rows):
        mine = [row for row in rows if row["normalization"] == norm]
        before = next(row["top1"] for row in mine if row["wiring"] == "original")
        table.append(_relative(f"EfficientNet-Lite0, {norm} normalisation", before, _of_default(mine)["top1"]))
    return table


@_claim("language_model")
def _language_model(rows: list[Row]) -> list[list[str]]:
    before = next(row["loss"] for row in rows if row["wiring"] == "original")
    rise = _of_default(rows)["loss"] / before - 1
    asked = "at most 1% relative rise of validation loss"
    return [["character model", "rewired, no training", asked, f"{rise:+.2%}", _holds(rise <= 0.01)]]


@_claim("sentences")
def _sentences(rows: list[Row]) -> list[list[str]]:
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
def _finetuned_cifar(rows: list[Row]) -> list[list[str]]:
    table = []
    for network in dict.fromkeys(row["network"] for row in rows):
        mine = [row for row in rows if row["network"] == network]
        table += _as_good(network, mine, "top1", better=1)
        table += _sooner(network, mine, "top1_part", better=1)
    return table


@_claim("language_model_finetuning")
def _finetuned_language_model(rows: list[Row]) -> list[list[str]]:
    return [*_as_good("character model", rows, "loss", better=-1), *_sooner("character model", rows, "loss", better=-1)]


def _as_good(network: str, rows: list[Row], key: str, better: int) -> list[list[str]]:
    """Against stored activations after the largest budget: not worse by more than two standard errors of the
    difference.
    """
    last = max(row["steps"] for row in rows)
    stored, table = seeds(rows, key, wiring="stored", steps=last), []
    for deployed, prefix in _deployments(DEFAULT):
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


def _sooner(network: str, rows: list[Row], key: str, better: int) -> list[list[str]]:
    """The first budget against the paper's rewiring after the same and after larger ones."""
    steps = sorted({row["steps"] for row in rows if row["steps"]})
    mine = seeds(rows, key, wiring=DEFAULT, steps=steps[0])
    papers = {k: s for k in steps if (s := seeds(rows, key, wiring="re2tal", steps=k))}
    if mine is None or not papers:
        return []
    shown = _nats if key == "loss" else _percent
    caught_up = [k for k, s in papers.items() if better * (s.mean - mine.mean) >= 0]
    asked = f"reaches in {steps[0]} steps what `re2tal` needs many more for"
    figures = "; ".join(f"{shown(s)} after {k}" for k, s in papers.items())
    return [[network, "both rewired", asked, f"{shown(mine)}; `re2tal`: {figures}", _holds(steps[0] not in caught_up)]]


TABLES: dict[str, Callable[[list[Row]], list[list[str]]]] = {
    "cifar_finetuning": cifar_finetuning,
    "language_model_finetuning": language_model_finetuning,
    "kept_bytes": kept_bytes,
}
