"""Cores in parts: a piece of a branch that treats parts of its inputs each by itself (heads), run part by part, and
recomputed so.

Note [Cores in parts]
    Autograd keeps the inputs of a core, and nothing of what it computes inside. Its backward goes through the parts
    from the last to the first, computes each again, and takes its gradients. An input that all parts share gets the sum
    of theirs, added in that order. `stored_activations` runs the same parts with ordinary autograd, which adds in the
    same order, so its gradients are the same to the bit. A core inside of a reversible unit is computed three times: in
    forward, when the unit is rebuilt, and in backward. Samples of what comes out the last time are compared with those
    of the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revwire._errors import ReconstructionError, UnsupportedTransformError
from revwire._streams.samples import glance, same_glances
from revwire._surroundings.surroundings import Surroundings

if TYPE_CHECKING:
    from revwire._runtime.chain import Chain


_FLOAT_TOLERANCE = 5e-2  # as for a branch in float streams that computes in 16 bits


@dataclass
class Parting:
    """Into how many parts the core of a module is cut; ``chain`` is that of the unit in whose branch the module
    runs.
    """

    chain: Chain
    count: int = 1


def parts_of(size: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of at most ``count`` parts of a dimension."""
    length = -(-size // count)
    return [(start, end - start) for start, end in pairwise([*range(0, size, length), size])]


@dataclass(frozen=True)
class Border:
    """What goes into a core and comes out of it.

    Attributes:
        shapes: of the inputs, for which it was found.
        dims: the dimension along which each input is cut; None: all parts share it.
        size: of that dimension.
        outs: the dimension of each output along which its parts lie.
    """

    shapes: tuple[torch.Size, ...]
    dims: tuple[int | None, ...]
    size: int
    outs: tuple[int, ...]


class InParts:
    """What the program of a module calls for its core.

    Args:
        run: ``run(module, size, *inputs)``: the core on inputs whose parted dimension has this size; a tuple of
            tensors.
        border: what goes in and comes out.
        parting: into how many parts it is cut.
        path: of the module, for errors.
    """

    __module__, __name__, __qualname__ = "revwire", "run_in_parts", "run_in_parts"

    def __init__(self, run: Callable[..., tuple[Tensor, ...]], border: Border, parting: Parting, path: str) -> None:
        self.run = run
        self.border = border
        self.parting = parting
        self.path = path

    def __call__(self, module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        parts = parts_of(self.border.size, self.parting.count)
        if len(parts) < 2 or tuple(x.shape for x in inputs) != self.border.shapes:
            return self.run(module, self.border.size, *inputs)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return self.joined(self.run(module, part[1], *self.given(inputs, part)) for part in parts)
        if self.parting.chain.stored:
            lengths, dims = [length for _, length in parts], self.border.dims
            split = [
                x.view_as(x) if d is None else torch.split(x, lengths, d) for x, d in zip(inputs, dims, strict=True)
            ]
            found = []
            for i, length in enumerate(
                lengths
            ):  # views for the core and for each part: gradients are added up part by part
                given = [x.view_as(x) if isinstance(x, Tensor) else x[i] for x in split]
                found.append(self.run(module, length, *given))
            return tuple(
                torch.cat(outs, d).contiguous()
                for outs, d in zip(zip(*found, strict=True), self.border.outs, strict=True)
            )
        return _Parts.apply(self, module, parts, *inputs)  # type: ignore[no-any-return]

    def given(self, inputs: Sequence[Tensor], part: tuple[int, int]) -> list[Tensor]:
        """The inputs of a part."""
        return [x if d is None else x.narrow(d, *part) for x, d in zip(inputs, self.border.dims, strict=True)]

    def alone(
        self, module: nn.Module, inputs: Sequence[Tensor], needs: Sequence[bool], part: tuple[int, int]
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The inputs of a part as leaves, and its outputs with a graph of their own. (Without gradients, other kernels
        may be taken.)
        """
        given = [x.detach().requires_grad_(need) for x, need in zip(self.given(inputs, part), needs, strict=True)]
        with torch.enable_grad():
            return given, self.run(module, part[1], *given)

    def same(self, before: Tensor, after: Tensor) -> bool:
        """Whether what came out is what came out in forward, as far as its glances tell.

        In float streams, where inputs are rebuilt up to rounding: whether it is so on average.
        """
        if same_glances([before], [after]):
            return True
        return not self.parting.chain.exact and bool(
            (before - after).abs().mean() <= _FLOAT_TOLERANCE * before.abs().mean()
        )

    def joined(self, parts: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The outputs of all parts, each written to its place as soon as it is there."""
        outs: list[Tensor] = []
        start = 0
        for found in parts:
            if not outs:
                sizes = [
                    [*t.shape[:d], self.border.size, *t.shape[d + 1 :]]
                    for t, d in zip(found, self.border.outs, strict=True)
                ]
                outs = [t.new_empty(size) for t, size in zip(found, sizes, strict=True)]
            length = found[0].shape[self.border.outs[0]]
            for out, t, d in zip(outs, found, self.border.outs, strict=True):
                out.narrow(d, start, length).copy_(t)
            start += length
        return tuple(outs)


def _glances(outs: Sequence[Tensor]) -> list[Tensor]:
    """A few elements of each output, by which a second run is compared with the first."""
    return [found.to(torch.float64) for out in outs if (found := glance(out)) is not None]


def _bare(t: Tensor) -> Tensor:
    """What a graph saves, without its graph: else the two would keep each other alive."""
    return t.detach()


class _Parts(torch.autograd.Function):
    """A core, part by part; see Note [Cores in parts]."""

    @staticmethod
    def forward(
        ctx: Any, core: InParts, module: nn.Module, parts: list[tuple[int, int]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.core, ctx.module, ctx.parts = core, module, parts
        ctx.surroundings, ctx.glances = [], []
        wanted: list[bool] = []  # of the outputs
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

        def run(part: tuple[int, int]) -> tuple[Tensor, ...]:
            around = Surroundings.capture(inputs)
            with saved_tensors_hooks(_bare, _bare):
                _, outs = core.alone(module, inputs, ctx.needs_input_grad[3:], part)
            around.settle()
            ctx.surroundings.append(around)
            ctx.glances += _glances(outs)
            wanted[:] = [out.requires_grad for out in outs]
            return tuple(out.detach() for out in outs)

        found = core.joined(map(run, parts))
        ctx.mark_non_differentiable(*(out for out, wants in zip(found, wanted, strict=True) if not wants))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        core: InParts = ctx.core
        if torch.is_grad_enabled():
            raise UnsupportedTransformError(
                f"{core.path}: got create_graph=True (a double backward) through a core in parts; expected a "
                "first-order backward; compute it inside `with revwire.stored_activations(model):`, or convert with "
                "chunks=1"
            )
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        found: list[list[Tensor]] = [[] for _ in inputs]  # the gradients of their parts, from the last to the first
        wanted = [i for i, need in enumerate(needs) if need]
        glances: list[Tensor] = []
        for part, around in zip(reversed(ctx.parts), reversed(ctx.surroundings), strict=True):
            with around.restored():
                given, outs = core.alone(ctx.module, inputs, needs, part)
            glances[:0] = _glances(outs)
            cuts = [None if g is None else g.narrow(d, *part) for g, d in zip(grads, core.border.outs, strict=True)]
            asked = [(out, g) for out, g in zip(outs, cuts, strict=True) if g is not None and out.requires_grad]
            if asked:
                parts = torch.autograd.grad(
                    [o for o, _ in asked], [given[i] for i in wanted], [g for _, g in asked], allow_unused=True
                )
                for i, g in zip(wanted, parts, strict=True):
                    _gather(found[i], g, given[i], core.border.dims[i])
        if not core.same(torch.cat(ctx.glances), torch.cat(glances)):
            raise ReconstructionError(
                f"{core.path}: between forward and backward, a core in parts computed other values; expected the same "
                "as in the forward pass: no change of mode, hooks or attributes before backward, and deterministic "
                "kernels. Gradients of this pass are not valid: zero them; then convert with chunks=1"
            )
        return None, None, None, *(_whole(parts, d) for parts, d in zip(found, core.border.dims, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        raise UnsupportedTransformError(
            "core in parts: got a forward-mode AD dual tensor; expected reverse mode; use revwire.revert(model) for jvp"
        )


def _gather(found: list[Tensor], g: Tensor | None, x: Tensor, dim: int | None) -> None:
    """Add the gradient of one more part of an input to those that were found."""
    if dim is not None:
        found.append(torch.zeros_like(x) if g is None else g)
    elif g is not None:
        found[:] = [found[0] + g if found else g]


def _whole(parts: list[Tensor], dim: int | None) -> Tensor | None:
    """The gradient of an input, of those of its parts, the last first."""
    if not parts:
        return None
    return parts[0] if dim is None else torch.cat(parts[::-1], dim)
