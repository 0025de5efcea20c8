"""The plan: what `convert` will do, or has done, as immutable data. ``str(plan)`` is the table users read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from revwire._plan.html import as_html
from revwire._plan.saved import AnyPath, beheaded, headed, parsed_file, written_file
from revwire._plan.stays import Skipped, stays_lines, why_nothing
from revwire._runtime.chunks import Cut
from revwire._runtime.unit import Mode
from revwire.couplings import Affine, Innovation
from revwire.couplings.base import FLOAT_TOLERANCE, Coupling
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
        add: its residual add: the innermost module that makes it, and which of those made there it is; -1: the module
            is one unit, whatever adds it holds.
        scheme: its coupling.
        cut: how it may be cut into chunks, where it is to be.
        cores: the modules in its branch whose core runs in parts, and in how many at most.
    """

    path: str
    host: str
    pattern: str
    shape: tuple[int, ...]
    saved_bytes: int
    kept_bytes: int
    mode: Mode = "reversible"
    chunks: int = 1
    parts: int = 1
    add: tuple[str, int] = ("", 0)
    scheme: Coupling | None = None
    cut: Cut | None = None
    cores: tuple[tuple[str, int], ...] = ()


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
        anchors: units from one kept true state to the next; None: none is kept for that.
        adapts: whether they come nearer to each other where rebuilt states drift.
        tolerance: the largest relative error of a rebuilt state in float streams.
        keeps_last: whether autograd keeps what the last unit saves, as nothing larger follows.
    """

    name: str
    units: tuple[PlannedUnit, ...]
    coupling: str
    exact: bool
    bits: int
    stream_bytes: int
    largest: float
    anchors: int | None = None
    adapts: bool = False
    tolerance: float = FLOAT_TOLERANCE
    keeps_last: bool = False

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
        return self.told()

    def told(self, seconds: float | None = None) -> str:
        """The peaks and the net gain; ``seconds`` are those of a step as a share of checkpointing's, where measured."""
        return (
            f"peak of a step: {spelled(self.stored)} before, {spelled(self.checkpointing)} with each block "
            f"checkpointed, {spelled(self.planned)} with this plan{self._verdict(seconds)}"
        )

    def _verdict(self, seconds: float | None) -> str:
        if self.planned < 0.97 * self.checkpointing or (seconds and seconds < 0.97):
            measured = f", in {seconds:.2f} of its seconds" if seconds else ""
            return f" ({self.planned / self.checkpointing:.2f} of checkpointing{measured})"
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

    @property
    def of_checkpointing(self) -> float | None:
        """Predicted seconds of a step as a share of plain checkpointing's."""
        return self.seconds / self.checkpoint.seconds if self.checkpoint else None

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
        peaks: of a step on the example, by what a user could do; None where it runs in chunks, or has other couplings
            by now.
        trained: whether it is the record of weights that were trained in this form, as `revwire.save_config` writes it.

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
    trained: bool = False

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
        """The plan as plain data (JSON-ready): what `save` writes, and `from_dict` reads."""
        return {**headed(self), "coverage": self.coverage, "bytes_saved": sum(c.bytes_saved for c in self.chains)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, couplings: Iterable[Coupling] = (), where: str = "plan") -> Plan:
        """The plan that `to_dict` gave.

        Args:
            data: plain data.
            couplings: those of your own that the plan names.
            where: what errors call the data.

        Raises:
            ConversionError: it is no plan, or of another version.
            CouplingError: it has a coupling that is not known.
        """
        return beheaded(cls, data, where, couplings, leaves=("coverage", "bytes_saved"))

    def save(self, path: AnyPath) -> None:
        """Write the plan to a JSON file, which `load` reads, in any process and on any machine.

        Example:
            >>> import tempfile, torch, revwire
            >>> def network():
            ...     block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            ...     return torch.nn.TransformerEncoder(block, 2)
            >>> x = torch.randn(1, 4, 16)
            >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
            ...     revwire.plan(network(), x, memory_budget="1GiB").save(file.name)
            ...     plan = revwire.Plan.load(file.name)
            >>> revwire.report(revwire.convert(network(), x, plan=plan)) == plan
            True
        """
        written_file(path, self.to_dict())

    @classmethod
    def load(cls, path: AnyPath, *, couplings: Iterable[Coupling] = ()) -> Plan:
        """The plan that `save` wrote.

        Args:
            path: of the file.
            couplings: those of your own that the plan names.

        Raises:
            ConversionError: the file holds no plan, or one of another version.
            CouplingError: it has a coupling that is not known.
        """
        return cls.from_dict(parsed_file(path), couplings=couplings, where=str(path))

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if rows:
            lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self._head(), *lines, *self._lines()])

    def _repr_html_(self) -> str:
        return as_html(self._head(), self._rows(), self._lines())

    def _rows(self) -> list[tuple[str, ...]]:
        """The table: the names of its columns, and a row for each chain; nothing where there is none."""
        if not self.chains:
            return []
        rows: list[tuple[str, ...]] = [("chain", "host", "units", "pattern", "shape", "coupling", "bits", "saves")]
        more = [("modes", _modes)] if self.forecast else []
        more += [("chunks", _chunks)] if any(u.chunks > 1 or u.parts > 1 for u in self.units) else []
        rows = [(*rows[0], *(name for name, _ in more))]
        return rows + [(*_row(c), *(column(c) for _, column in more)) for c in self.chains]

    def _head(self) -> str:
        if not self.chains:
            return f"{self.model}: nothing is rewired: {why_nothing(self.skipped)}"
        several = "chain" if len(self.chains) == 1 else "chains"
        units = f"{len(self.units)} units in {len(self.chains)} {several}"
        return f"{self.model}: {units}, {self.coverage:.0%} of the residual adds"

    def _lines(self) -> list[str]:
        """What is said below the table; the net gain is the last line."""
        told = [str(self.forecast)] if self.forecast else []
        seconds = self.forecast.of_checkpointing if self.forecast else None
        net = [self.peaks.told(seconds)] if self.peaks else []
        predicted = [line for chain in self.chains if (line := _predicted(chain))]
        return [*told, *predicted, *self._checkpointed_lines(), *stays_lines(self.skipped), *net]

    def _checkpointed_lines(self) -> list[str]:
        some = ", ".join(self.checkpointed[:8]) + (" ..." if len(self.checkpointed) > 8 else "")
        if self.checkpointed:
            return [f"checkpointed outside of chains: {len(self.checkpointed)} modules ({some})"]
        if self.forecast and self.forecast.planned == self.forecast.stored:
            return ["every activation fits: nothing is rebuilt, and the network as it was would do as well"]
        return []


def _predicted(c: PlannedChain) -> str:
    """How well the maps of a coupling that predicts do, and what they take; nothing where there are none."""
    maps = [(u.path, u.scheme.map) for u in c.units if isinstance(u.scheme, Innovation) and u.scheme.map is not None]
    if not maps:
        return ""
    shares = [(p.predicted, path) for path, p in maps if isinstance(p, Affine)]
    least, where = min(shares, default=(1.0, ""))
    size = spelled(sum(p.nbytes for _, p in maps))
    mean = sum(share for share, _ in shares) / max(len(shares), 1)
    return f"{c.name}: {len(maps)} predictors ({size}) tell {mean:.0%} of what was held out, {least:.0%} at {where}"


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
