"""What one unit costs, in any of its forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

from revwire._budget.forms import Form, forms_after
from revwire._budget.measured import Run

STORED_IS_FASTER = 0.99
"""The most of what storing a unit gains that a selective one can gain: clocks are noisy, and this is certain."""


@dataclass(frozen=True)
class ChainSizes:
    """What a chain keeps of its states.

    Attributes:
        kept: bytes that are kept for each of its units when they are reversible.
        state: bytes of one state.
        exact: whether states are rebuilt to the bit, so that a checkpointed unit keeps no more than one.
        weights: bytes of the largest weight of each unit that is trained, where that is known.
    """

    kept: tuple[int, ...]
    state: int
    exact: bool
    weights: tuple[int, ...] = ()


@dataclass(frozen=True)
class Selective:
    """What a unit costs when it is selective.

    Attributes:
        extra: bytes kept beyond those of its reversible form, from its forward to its backward.
        own: by how many bytes the peak of its own stretches is higher.
        seconds: by which a step is shorter.
    """

    extra: int
    own: int
    seconds: float


@dataclass(frozen=True)
class UnitCost:
    """One run of a unit.

    Attributes:
        run: what was measured; its glances are 0 where no recompute stops, its result where only a state is kept.
        sizes: of its chain.
        gain: seconds by which a step is shorter when it is stored.
        relief: seconds by which a step is shorter when it is checkpointed: its recompute stops when its gradient has
            all that it needs.
        fixed: it stays reversible: nothing is rebuilt for it, or it runs several times.
        selective: what it costs in that form, where that was measured.
    """

    run: Run
    sizes: ChainSizes
    gain: float
    relief: float
    fixed: bool
    selective: Selective | None = None

    def changed(self, before: UnitCost, after: UnitCost) -> UnitCost:
        """That of a unit that changes as another of its kind has changed."""
        return replace(
            self,
            run=self.run.changed(before.run, after.run),
            gain=max(0.0, self.gain + after.gain - before.gain),
            relief=max(0.0, self.relief + after.relief - before.relief),
            fixed=self.fixed or after.fixed,
        )

    @property
    def chain(self) -> int:
        """The number of its chain."""
        return self.run.place.chain

    @property
    def unit(self) -> int:
        """Its place in its chain."""
        return self.run.place.unit

    @property
    def kept(self) -> int:
        """Bytes that are kept for it when it is reversible."""
        return self.sizes.kept[self.unit]

    @property
    def state(self) -> int:
        """Bytes of one of its chain's states."""
        return self.sizes.state

    @property
    def weight(self) -> int:
        """Bytes of its largest weight that is trained; 0 where that is not known."""
        return self.sizes.weights[self.unit] if self.sizes.weights else 0

    @property
    def ends(self) -> bool:
        """Whether it is the last of its chain."""
        return self.unit == len(self.sizes.kept) - 1

    @property
    def kind(self) -> tuple[int, ...]:
        """What units have in common that are of one kind."""
        run = self.run
        return run.saved, run.held, self.kept, self.state, run.glances, run.result, int(self.ends)

    def forms(self, before: Form | None) -> tuple[Form, ...]:
        """The forms that it may have after a unit of form ``before`` (None: it is the first of its chain)."""
        return forms_after(before, ends=self.ends, fixed=self.fixed, selective=self.selective is not None)

    def extra(self, form: Form, before: Form | None) -> int:
        """Bytes kept beyond those of its reversible form, from its forward to its backward."""
        if form is Form.REVERSIBLE:
            return 0
        if form is Form.SELECTIVE:
            return self.selective.extra if self.selective else 0
        if form is Form.CHECKPOINTED:
            return self._extra_checkpointed(before)
        states = 0
        if form is Form.STORED and before is not None and not before.stored:
            states = 2 if self.sizes.exact or before is Form.REVERSIBLE else 1
        if form is Form.WHOLE_CHAIN and self.ends:
            states = -2
        return self.run.saved - self.run.lasting - self.kept + states * self.state

    def _extra_checkpointed(self, before: Form | None) -> int:
        if self.run.result:
            return self.run.result + self.run.glances
        states = 1 if self.sizes.exact or before is Form.CHECKPOINTED else 2
        return states * self.state + self.run.glances - self.kept

    def before_turn(self, form: Form) -> int:
        """How many of them are there in its reversible form, too, until the forward pass ends."""
        return self.run.early - self.run.lasting if form.stored else 0

    def seconds(self, form: Form) -> float:
        """Seconds by which a step is shorter than with the reversible form."""
        if form is Form.REVERSIBLE:
            return 0.0
        if form is Form.CHECKPOINTED:
            return self.relief
        if form is Form.SELECTIVE:
            return self.selective.seconds if self.selective else 0.0
        return self.gain
