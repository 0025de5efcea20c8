"""The plan: what `convert` will do, or has done, as immutable data. ``str(plan)`` is the table users read."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from revwire._plan.stays import Skipped, stays_lines, why_nothing
from revwire.measure.sizes import spelled


@dataclass(frozen=True)
class PlannedUnit:
    """One residual unit.

    Attributes:
        path: qualified name: the host module, and the part of it that is the branch.
        host: qualified name of the module whose forward holds the unit ("" is the model itself).
        pattern: ``"residual"`` (x + F(x)), ``"post-activation"`` (act(x + F(x))), or ``"block"`` (anything that keeps
            its shape: post-normalised, scaled or parallel branches), rewired as F = block(x) − x.
        shape: shape of the stream in the example.
        saved_bytes: bytes that autograd would keep for this unit in the example.
        kept_bytes: bytes that are kept for it instead.
        mode: how its activations come back in backward: ``"reversible"``, or as a memory budget chose,
            ``"checkpointed"``, ``"selective"`` (checkpointed, with what its products gave) or ``"stored"``.
        chunks: into how many chunks it is cut, with the shape of the example.
        parts: in how many parts the core of its branch runs, the products of activations with each other (the heads of
            attention).
    """

    path: str
    host: str
    pattern: str
    shape: tuple[int, ...]
    saved_bytes: int
    kept_bytes: int
    mode: str = "reversible"
    chunks: int = 1
    parts: int = 1


@dataclass(frozen=True)
class PlannedChain:
    """A run of units on two streams.

    Attributes:
        name: as errors name it.
        units: its units, in order.
        coupling: spelling of the coupling.
        exact: fixed-point streams (True) or float streams.
        bits: bits kept per element and unit.
        stream_bytes: bytes of the two streams, kept once.
        largest: largest magnitude in the streams in the example.
    """

    name: str
    units: tuple[PlannedUnit, ...]
    coupling: str
    exact: bool
    bits: int
    stream_bytes: int
    largest: float

    @property
    def bytes_saved(self) -> int:
        """Bytes that need not be kept between forward and backward: autograd's, less the streams and the kept bits."""
        return sum(u.saved_bytes - u.kept_bytes for u in self.units) - self.stream_bytes


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of a step on the example above rest (weights, ``.grad``, inputs), found on paper from the one
    run that was observed: of the model alone, without a loss, and without the scratch memory of kernels.

    Attributes:
        stored: as the network was.
        checkpointing: with activation checkpointing around each of its blocks.
        planned: with this plan.
    """

    stored: int
    checkpointing: int
    planned: int

    def __str__(self) -> str:
        return (
            f"peak of a step: {spelled(self.stored)} before, {spelled(self.checkpointing)} with each block "
            f"checkpointed, {spelled(self.planned)} with this plan{self._verdict()}"
        )

    def _verdict(self) -> str:
        if self.planned < 0.97 * self.checkpointing:
            return f" ({self.planned / self.checkpointing:.2f} of checkpointing)"
        if self.checkpointing < 0.97 * self.stored:
            return ": revwire gains nothing here, use checkpointing"
        return ": neither gains anything here, use the network as it was"


@dataclass(frozen=True)
class Point:
    """What a step is predicted to cost: bytes at its peak above rest (``.grad`` allocated), and seconds."""

    peak_bytes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What the planner predicts of a step on the example, as measured when the plan was made.

    Attributes:
        budget: bytes that were allowed, or None for the least.
        planned: the chosen mix.
        stored: every unit stored, whole, and nothing checkpointed but what the caller asked for.
        reversible: every unit reversible.
        advice: chains that reversible units gain nothing for, and why; and whether plain checkpointing would need less.
        checkpoint: `torch.utils.checkpoint` around each host, in the original network, estimated.
    """

    budget: int | None
    planned: Point
    stored: Point
    reversible: Point
    advice: tuple[str, ...] = ()
    checkpoint: Point | None = None

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of a step above rest."""
        return self.planned.peak_bytes

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step."""
        return self.planned.seconds

    def __str__(self) -> str:
        budget = "least memory" if self.budget is None else f"budget {spelled(self.budget)}"
        lines = [f"{budget}: predicted peak of a step {_point(self.planned)}"]
        uniform = f"  every unit stored: {_point(self.stored)}; every unit reversible: {_point(self.reversible)}"
        rival = (
            f"; torch.utils.checkpoint around the same blocks: about {_point(self.checkpoint)}"
            if self.checkpoint
            else ""
        )
        lines += [uniform + rival, *self.advice]
        return "\n".join(lines)


def _point(p: Point) -> str:
    return f"{spelled(p.peak_bytes)} in {p.seconds:.3g} s"


@dataclass(frozen=True)
class Plan:
    """What is rewired, what stays, and why.

    Attributes:
        model: the name of its class.
        chains: what is rewired.
        skipped: the residual adds that stay.
        forecast: what a memory budget was planned with.
        checkpointed: qualified names of the modules outside of chains that are checkpointed.
        peaks: of a step on the example, by what a user could do; None where the example does not tell.

    Example:
        >>> import torch, revwire
        >>> block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        >>> plan = revwire.plan(torch.nn.Sequential(block, block), torch.randn(1, 4, 16))
        >>> len(plan.chains), plan.coverage
        (1, 1.0)
    """

    model: str
    chains: tuple[PlannedChain, ...]
    skipped: tuple[Skipped, ...]
    forecast: Forecast | None = None
    checkpointed: tuple[str, ...] = ()
    peaks: Peaks | None = None

    @property
    def units(self) -> tuple[PlannedUnit, ...]:
        """All units of all chains."""
        return tuple(u for c in self.chains for u in c.units)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Qualified names of the modules whose forward is rewired."""
        return tuple(dict.fromkeys(u.host for u in self.units))

    @property
    def coverage(self) -> float:
        """Units rewired / residual adds found. Adds inside a rewired branch, and projection shortcuts, are not
        counted.
        """
        left = sum(not (s.computed_shortcut or s.inside_unit) for s in self.skipped)
        return len(self.units) / (len(self.units) + left) if self.units or left else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (JSON-ready)."""
        return {**asdict(self), "coverage": self.coverage, "bytes_saved": sum(c.bytes_saved for c in self.chains)}

    def __str__(self) -> str:
        last = [str(self.peaks)] if self.peaks else []
        if not self.chains:
            head = f"{self.model}: nothing is rewired: {why_nothing(self.skipped)}"
            return "\n".join([head, *self._checkpointed_lines(), *stays_lines(self.skipped), *last])
        rows: list[tuple[str, ...]] = [("chain", "host", "units", "pattern", "shape", "coupling", "bits", "saves")]
        more = [("modes", _modes)] if self.forecast else []
        more += [("chunks", _chunks)] if any(u.chunks > 1 or u.parts > 1 for u in self.units) else []
        rows = [(*rows[0], *(name for name, _ in more))]
        rows += [(*_row(c), *(column(c) for _, column in more)) for c in self.chains]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        several = "chain" if len(self.chains) == 1 else "chains"
        head = (
            f"{self.model}: {len(self.units)} units in {len(self.chains)} {several}, {self.coverage:.0%} of the "
            "residual adds"
        )
        forecast = [str(self.forecast)] if self.forecast else []
        return "\n".join([head, *lines, *forecast, *self._checkpointed_lines(), *stays_lines(self.skipped), *last])

    def _checkpointed_lines(self) -> list[str]:
        some = ", ".join(self.checkpointed[:8]) + (" ..." if len(self.checkpointed) > 8 else "")
        if self.checkpointed:
            return [f"checkpointed outside of chains: {len(self.checkpointed)} modules ({some})"]
        if self.forecast and self.forecast.planned == self.forecast.stored:
            return ["every activation fits: nothing is rebuilt, and the network as it was would do as well"]
        return []


def _modes(c: PlannedChain) -> str:
    """Runs of units of one mode, in order: ``2 stored, 10 reversible``; where there are many, how many units have
    which.
    """
    runs = [(len(list(run)), mode) for mode, run in groupby(u.mode for u in c.units)]
    if len(runs) > 4:
        runs = sorted(((n, mode) for mode, n in Counter(u.mode for u in c.units).items()), reverse=True)
    return ", ".join(f"{n} {mode}" for n, mode in runs)


def _chunks(c: PlannedChain) -> str:
    """How many units run in how many chunks, and the parts of their cores: ``12 in 4, 12 whole (core in 4)``."""
    counts = Counter((u.chunks, u.parts) for u in c.units)

    def way(chunks: int, parts: int) -> str:
        return ("whole" if chunks == 1 else f"in {chunks}") + (f" (core in {parts})" if parts > 1 else "")

    return ", ".join(f"{n} {way(*cut)}" for cut, n in sorted(counts.items(), reverse=True))


def _row(c: PlannedChain) -> tuple[str, ...]:
    patterns = "+".join(dict.fromkeys(u.pattern for u in c.units))
    first, last = c.units[0].host or "(model)", c.units[-1].host
    hosts = first if first == last or not last else f"{first} .. {last.rsplit('.', 1)[-1]}"
    shape = "x".join(str(s) for s in c.units[0].shape)
    arithmetic = f"{c.coupling} {'exact' if c.exact else 'float'}"
    return (
        c.name,
        hosts,
        str(len(c.units)),
        patterns,
        shape,
        arithmetic,
        str(c.bits if c.exact else 0),
        spelled(c.bytes_saved),
    )
