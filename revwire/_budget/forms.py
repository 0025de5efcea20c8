"""The forms in which a unit of a chain can run, and which may follow which.

Note [Forms]
    What a mode keeps depends on the neighbours, since states are shared:

    =============  =====================================================================================================
    REVERSIBLE     the kept bits: what was measured
    CHECKPOINTED   one state, and glances; in float streams one state more where the unit before is not checkpointed.
                   Where the branch gives fewer bits than a state has: that result, beside the kept bits, instead of a
                   state
    SELECTIVE      as checkpointed, and the results of its products: measured
    STORED         its activations; where the run of such units begins, the two states before it
    TO_THE_END     likewise, where the run ends the chain: its two states replace those of the end
    SECOND_TO_END  the second unit of such a run: until that is over, there is one state besides those before it
    LATER_TO_END   the third and those after it: two
    WHOLE_CHAIN    likewise, in a chain that is stored as a whole: no states at all
    =============  =====================================================================================================
"""

from __future__ import annotations

from enum import Enum

from revwire._runtime.unit import Mode


class Form(Enum):
    """How a unit runs, beside its neighbours; see Note [Forms]."""

    REVERSIBLE = "reversible"
    CHECKPOINTED = "checkpointed"
    SELECTIVE = "selective"
    STORED = "stored"
    TO_THE_END = "stored, as the first of those to the end of the chain"
    SECOND_TO_END = "stored, as the second of those"
    LATER_TO_END = "stored, as one after these"
    WHOLE_CHAIN = "stored, as all of the chain"

    __hash__ = object.__hash__  # as members are single; Enum's hashes a name each time, and the search is long

    @property
    def mode(self) -> Mode:
        """The mode of a unit that runs so."""
        return _RECOMPUTED.get(self, "stored")

    @property
    def stored(self) -> bool:
        """Whether its activations are stored."""
        return self not in _RECOMPUTED


_RECOMPUTED: dict[Form, Mode] = {
    Form.REVERSIBLE: "reversible",
    Form.CHECKPOINTED: "checkpointed",
    Form.SELECTIVE: "selective",
}


_GOES_ON = {
    Form.TO_THE_END: Form.SECOND_TO_END,
    Form.SECOND_TO_END: Form.LATER_TO_END,
    Form.LATER_TO_END: Form.LATER_TO_END,
    Form.WHOLE_CHAIN: Form.WHOLE_CHAIN,
}
"""The form of the next unit, where a run is stored to the end of its chain."""


def forms_after(before: Form | None, *, ends: bool, fixed: bool, selective: bool) -> tuple[Form, ...]:
    """The forms that a unit may have after one of form ``before``.

    Args:
        before: None, where it is the first of its chain.
        ends: it is the last of its chain.
        fixed: it stays reversible.
        selective: what it costs in that form is known.
    """
    if before in _GOES_ON:
        return () if fixed else (_GOES_ON[before],)
    if fixed:
        return (Form.REVERSIBLE,)
    stored = () if ends else (Form.STORED,)
    if before is None:
        return (Form.REVERSIBLE, *stored, Form.WHOLE_CHAIN)
    recomputed = (Form.REVERSIBLE, Form.CHECKPOINTED, *((Form.SELECTIVE,) if selective else ()))
    to_the_end = () if before is Form.STORED else (Form.TO_THE_END,)
    return (*recomputed, *stored, *to_the_end)
