"""Units as excerpts of their host's graph, and whether what is written in place lets them be taken out.

Note [Order and writes]
    A unit runs as one call, when all that it needs is there. Calls of the host that stood between the parts of a unit,
    and need some of them, move behind it. So where anything is written in place, each reader of that memory must still
    stand on the same side of the write; and a unit may write to memory of its own making only, since it will be
    computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from revwire._errors import CaptureError
from revwire._programs.calls import Slot
from revwire._programs.compiled import after
from revwire._programs.host_graph import HostGraph
from revwire._runtime.unit import Unit
from revwire._search.places import NOT_ITS_OWN, TO_ANOTHER_NAME, TO_ITS_INPUT, WITHOUT_GRADIENTS
from revwire._search.residuals import Candidate


@dataclass
class Excerpt:
    """One unit in a host graph: its branch nodes, what it needs from outside, what it gives besides its output."""

    slot: Slot
    candidate: Candidate
    kind: str
    fork: fx.Node
    out: fx.Node
    add: fx.Node
    branch: fx.Node | None
    nodes: list[fx.Node]
    dropped: list[fx.Node]
    extras: list[fx.Node] = field(default_factory=list)
    sides: list[fx.Node] = field(default_factory=list)
    unit: Unit | None = None

    @property
    def all_nodes(self) -> list[fx.Node]:
        return [*self.nodes, *self.dropped]


def check_own_memory(host: HostGraph, order: dict[fx.Node, int], excerpt: Excerpt) -> None:
    """See Note [Order and writes]; the add itself is made out of place."""
    events, storage_of = host.recording.events, host.storage_of
    add = events[excerpt.candidate.add]
    if add.modes[:2] != events[0].modes[:2]:
        raise CaptureError(WITHOUT_GRADIENTS.format(add.at))
    if any(u.target is after and u.args[1] is excerpt.add for u in excerpt.add.users):
        raise CaptureError(TO_ANOTHER_NAME.format(add.at))
    if excerpt.add in host.writes and storage_of[excerpt.fork] in host.writes[excerpt.add]:
        raise CaptureError(TO_ITS_INPUT.format(add.at))
    if not events[0].modes[0]:  # without gradients nothing is computed twice
        return
    inside = set(excerpt.all_nodes)
    for storage, writer in {s: n for n in excerpt.all_nodes for s in host.writes.get(n, ())}.items():
        holders = [n for n, s in storage_of.items() if s == storage]
        if holders and min(holders, key=order.__getitem__) not in inside:
            raise CaptureError(NOT_ITS_OWN.format(line_of(host, writer)))


def check_order_of_writes(
    host: HostGraph, order: dict[fx.Node, int], executed: list[fx.Node], excerpts: list[Excerpt]
) -> None:
    """See Note [Order and writes]."""
    position = {node: i for i, node in enumerate(executed)}
    holders: dict[int, list[fx.Node]] = {}
    for node, storage in host.storage_of.items():
        holders.setdefault(storage, []).append(node)
    dropped = {n for excerpt in excerpts for n in excerpt.dropped}
    for node, storages in host.writes.items():
        if node in dropped:
            continue
        readers = {u for s in storages for h in holders.get(s, ()) for u in h.users if u is not node}
        if any((order[r] < order[node]) != (position[r] < position[node]) for r in readers):
            raise CaptureError(
                "writes in place to a tensor that is read elsewhere while its residual unit runs"
                f"{line_of(host, node)}; write to a clone"
            )


def line_of(host: HostGraph, node: fx.Node) -> str:
    """The line of the call that a node stands for, as it is put behind what is said of it."""
    return host.recording.events[host.event_of[node]].at if node in host.event_of else ""
