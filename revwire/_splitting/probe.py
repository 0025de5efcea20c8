"""Units that run in chunks: of the batch, of tokens, of windows, where a branch treats each by itself. Each chunk is
rebuilt by itself.

Note [What may be cut]
    Along a dimension, F may be cut where F(x)[i] depends on x[i] alone. That is found on the example, with the model in
    eval mode (without dropout): a random half of the elements along the dimension is exchanged for others, and the
    results of the other half must stay the same to the bit, and the other way round; and the chunks, computed alone,
    must give what the whole gives (up to the rounding of matrix products of another size), so that F does not count
    positions either. Weights are moved a little meanwhile: a part of a branch that begins as zero (an output layer, a
    gate) hides what it will do once it has been trained. Branches that write buffers (batch statistics) are never cut,
    nor are those that take values of what they compute into Python: what they decide may differ from part to part.

Note [Windows]
    Where elements act on each other, they may do so in pieces that do not (the windows of attention, along time). Where
    the first two end is found by exchanging one element of each; the others are taken to be as long as the second, and
    then any of them are exchanged, of which the rest must know nothing. A window that is shifted around the border is
    two pieces. What pieces there are depends on the size of the input (where one window covers all, it is not shifted),
    so such a cut holds for the sizes of the example alone; a unit runs whole on others. Neighbouring pieces are one
    chunk only in those numbers of chunks for which the branch, run on each, was seen to give the same as on the whole:
    a branch that shifts its windows would shift those of the chunk.

Note [Random numbers in chunks]
    Dropout draws a number for each element, so chunks of samples draw theirs one after the other. Along other
    dimensions that would break what a whole sample shares (stochastic depth drops its branch or does not). So a branch
    that draws random numbers is cut along a dimension other than the batch only where all that it draws has the same
    shape for a chunk as for the whole; then each chunk draws the same numbers again (`Chunk.shares`), and the generator
    ends where a plain forward leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from revwire._errors import ConversionError
from revwire._runtime.chain import observed
from revwire._runtime.chunks import BATCH, Cut, Windows
from revwire._runtime.observer import Inputs, Observer
from revwire._splitting.kinds import Kinds
from revwire._splitting.separable import Separable, cuts_batch, observed_run, separable, shared_draws
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.randomness import accelerators_of, preserved_random_state

if TYPE_CHECKING:
    from revwire._runtime.chain import Chain
    from revwire._runtime.unit import Unit


_Key = tuple[object, int]
"""A chain, and a place in it."""


class Prober(Observer):
    """Finds, while a converted model runs, along which dimensions its units may be cut.

    Args:
        counts: the numbers of chunks that are wanted.
        alike: for each unit the one that is looked at in its place; see Note [Kinds of units] in `kinds`.
    """

    def __init__(self, counts: Iterable[int], alike: Mapping[_Key, _Key]) -> None:
        self.counts, self.alike = sorted(set(counts)), alike
        self.found: dict[_Key, Separable] = {}
        self.draws: dict[_Key, tuple[int, ...]] = {}  # dimensions along which a unit that draws may share its draws
        self.stage: Literal["dimensions", "draws", "batch"] = "dimensions"
        self.looks = False  # at a unit, in whose branch others may lie

    def wants_branch(self, chain: object, place: int) -> bool:
        return self.alike.get((chain, place)) == (chain, place)

    def passes(self, chain: object, place: int) -> bool:
        return not self.wants_branch(chain, place)

    def on_inputs(self, inputs: Inputs) -> None:
        unit = inputs.unit
        if self.looks or not unit.has_branch or not self.wants_branch(inputs.chain, unit.index):
            return
        self.looks = True
        try:
            chain, unit, host, x, extras = inputs
            with torch.no_grad(), preserved_random_state(accelerators_of([x])):
                self._look([(chain, place) for place in (unit.index, *unit.later)], unit, host, x.detach(), extras)
        finally:
            self.looks = False

    def _look(self, keys: list[_Key], unit: Unit, host: nn.Module, x: Tensor, extras: tuple[Any, ...]) -> None:
        if self.stage == "draws":
            found = next((self.found[key] for key in keys if key in self.found), None)
            seen = observed_run(unit, host, x, extras) if found is not None else None
            if found is None or seen is None:
                return
            if seen.decides:
                self.found.update(dict.fromkeys(keys, found._replace(dims=(), windows=(), open=False)))
            elif seen.traces:
                self.draws.update(dict.fromkeys(keys, shared_draws(unit, host, x, extras, found, self.counts[-1])))
            return
        if self.stage == "batch":
            open_ = [key for key in keys if key in self.found and self.found[key].open and not self._usable(key)]
            if open_ and cuts_batch(unit, host, x, extras, self.counts[-1]):
                self.found.update({key: self.found[key]._replace(dims=(BATCH, *self.found[key].dims)) for key in open_})
            return
        found = separable(unit, host, x, extras, self.counts)
        for key in keys:
            same = self.found.get(key, found) == found  # a unit that runs several times
            self.found[key] = found if same else found._replace(dims=(), windows=(), open=False)

    def _usable(self, key: _Key) -> tuple[tuple[int, ...], tuple[Windows, ...]] | None:
        """The dimensions along which a unit may be cut, and its windows, if there are any; those that its random
        numbers allow.
        """
        key = self.alike.get(key, key)
        found, shared = self.found[key], self.draws.get(key)
        dims = tuple(d for d in found.dims if shared is None or d == BATCH or d in shared)
        windows = tuple(w for w in found.windows if shared is None or w.dim in shared)
        return (dims, windows) if dims or windows else None

    @property
    def unsettled(self) -> bool:
        """Whether there are units that may be cut along the batch, if at all."""
        return any(found.open and not self._usable(key) for key, found in self.found.items())

    def cut(self, chain: Chain, place: int, count: int) -> Cut | None:
        """How the unit at a place of a chain may be cut into so many chunks, or None."""
        key = self.alike.get((chain, place), (chain, place))
        found = self.found.get(key)
        if count == 1 or found is None:
            return None
        usable = self._usable(key)
        if usable is None:
            return None
        return Cut(count, found.rank, usable[0], found.slices, found.kinds, usable[1], self.draws.get(key, ()))

    @property
    def cuts_something(self) -> bool:
        """Whether any unit may be cut."""
        return any(found.dims or found.windows for found in self.found.values())


def probed(
    model: nn.Module,
    chains: Sequence[Chain],
    run: Callable[[], Any],
    counts: Iterable[int],
    kinds: Kinds,
    some: Container[int] | None = None,
    *,
    quiet: bool = False,
) -> Prober:
    """Run a converted model on its example in eval mode, and in train mode (unless that is known to be ``quiet``: it
    draws nothing), and see how its units (of ``some`` kinds, or of all) may be cut into so many chunks.

    The model is left as it was. One that cannot run in train mode on the example counts as one that draws random
    numbers.

    Raises:
        ConversionError: the model fails in eval mode.
    """
    prober = Prober(counts, _alike(chains, kinds, some))
    with left_as_found(model), torch.no_grad(), observed(chains, prober):
        model.eval()
        try:
            run()
        except Exception as error:
            raise ConversionError(
                f"{type(model).__name__}: chunks= looks at the model in eval mode, in which it failed on the example "
                f"inputs ({type(error).__name__}: {error}); pass an example that it takes in eval mode, or leave "
                "chunks= out"
            ) from error
        if not quiet:
            prober.stage = "draws"
            model.train()
            try:
                run()
            except Exception:  # noqa: BLE001 - anything: models want labels, or a larger batch, in train mode
                prober.draws.update(dict.fromkeys(prober.found, ()))
        if prober.unsettled:
            prober.stage = "batch"
            model.eval()
            run()
    return prober


def _alike(chains: Sequence[Chain], kinds: Kinds, some: Container[int] | None) -> dict[_Key, _Key]:
    """For each unit the first of its kind, if that is one of some."""
    first: dict[int, _Key] = {}
    return {
        (chain, place): first.setdefault(kind, (chain, place))
        for chain, several in zip(chains, kinds, strict=True)
        for place, kind in enumerate(several)
        if some is None or kind in some
    }
