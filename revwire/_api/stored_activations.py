"""`stored_activations`: the same function with ordinary autograd, for checking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from revwire._forwards.converted import converted, switch


@contextmanager
def stored_activations(model: nn.Module) -> Iterator[None]:
    """Within this context the converted model computes the same function with ordinary autograd, which stores
    activations.

    For checking: outputs and gradients are those of the reversible run, in exact mode to the bit.

    Raises:
        ConversionError: ``model`` is not converted.
    """
    state = converted(model)
    before = [chain.stored for chain in state.chains]
    on = [forward for forward in state.checkpointed if forward.on]
    try:
        for chain in state.chains:
            chain.stored = True
        switch(on, on=False)
        yield
    finally:
        for chain, stored in zip(state.chains, before, strict=True):
            chain.stored = stored
        switch(on, on=True)
