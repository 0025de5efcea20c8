"""Leave a model as it was found: the one context manager for all who run one to learn something."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from revwire._structures import tensors_in
from revwire._surroundings.attributes import attributes_kept
from revwire._surroundings.buffers import buffers_kept
from revwire._surroundings.holdings import holdings_kept
from revwire._surroundings.randomness import accelerators_of, preserved_random_state, python_random_kept
from revwire._surroundings.weights import gradients_put_aside, shards_kept


@contextmanager
def left_as_found(
    model: nn.Module, inputs: Any = (), *, backward: bool = False, attributes: bool = True
) -> Iterator[None]:
    """Whatever a model does inside of this, at the end it is as it was, and so is the state around it.

    Put back are the attributes of its modules (``training`` among them, and tables of parameters, buffers, hooks and
    modules below) and what the containers among them hold, the values of buffers, weights that FSDP2 has gathered, and
    the states of the random generators: PyTorch's on the CPU and on the devices of the model and its inputs, Python's
    and NumPy's, and those that modules have of their own; so is what was written to tensors and arrays among the
    attributes.

    Args:
        model: any module.
        inputs: what it is called with, of any nesting: for the devices.
        backward: a backward pass runs inside: each ``.grad`` is None at first, and what was there comes back. (Without
            one, other threads are kept from exchanging the same buffers meanwhile; a backward pass may itself run in
            another thread, and does exchange them.)
        attributes: False leaves what was assigned: for a run made for that, or one that may convert the model.
    """
    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(accelerators_of([*tensors_in(inputs), *model.parameters()])))
        stack.enter_context(python_random_kept())
        if attributes:
            stack.enter_context(attributes_kept(model))
        stack.enter_context(holdings_kept(model, filled=attributes))
        stack.enter_context(shards_kept(model))
        stack.enter_context(buffers_kept(model, alone=not backward))
        if backward:
            stack.enter_context(gradients_put_aside(model))
        yield
