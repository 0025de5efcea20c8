"""Leave a model as it was found: the one context manager for all who run one to learn something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from revwire._structures import tensors_in
from revwire._surroundings.attributes import MISSING, STANDARD, attributes_kept, contents_of, refill, refilled, slots_of
from revwire._surroundings.buffers import buffers_kept
from revwire._surroundings.code import CACHED, classes_of, functions_of, named, packages_of
from revwire._surroundings.generators import generators_in, set_states, states_of
from revwire._surroundings.inventory import version_of
from revwire._surroundings.noted import (
    SMALL,
    held_in,
    is_array,
    is_object_of,
    is_written_to,
    note_write,
)
from revwire._surroundings.outside import put, reached
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
        stack.enter_context(_holdings_kept(model, filled=attributes))
        stack.enter_context(shards_kept(model))
        stack.enter_context(buffers_kept(model, alone=not backward))
        if backward:
            stack.enter_context(gradients_put_aside(model))
        yield


@contextmanager
def _holdings_kept(root: nn.Module, *, filled: bool = True) -> Iterator[None]:
    """Undo what a run does to what modules hold: generators of their own, tensors and arrays among their attributes,
    and what containers and plain objects, theirs and those that their code names, are ``filled`` with; and what their
    code, hooks included, assigns to globals and classes. (Assignments to modules are undone by `attributes_kept`.)
    """
    modules = [*root.modules()]
    classes, functions, packages = classes_of(modules), functions_of(modules), packages_of(modules)
    attributes = [v for m in modules for k, v in vars(m).items() if k not in STANDARD]
    buffers = [(b, version_of(b)) for b in root.buffers()]
    values = held_in(attributes, packages)
    reach = reached(modules)
    states = states_of([*chain.from_iterable(map(generators_in, attributes)), *reach.generators])
    places = [(table, name, table.get(name, MISSING)) for table, name in reach.places]
    of_code = chain((v for *_, v in places), *map(named, functions), *(vars(kind).values() for kind in classes))
    outside = held_in(of_code, packages)
    fillable = [*values, *outside] if filled else []
    objects = [v for v in fillable if is_object_of(v, packages)]
    small = [v for v in outside if not isinstance(v, Tensor) or v.numel() <= SMALL]
    with (
        _written_undone([*values, *small], unseen=reach.unseen),
        _weights_kept([*root.parameters()]),
        _slots_kept(objects),
        _filled_undone(fillable),
        _caches_kept_empty(outside),
    ):
        try:
            yield
        finally:
            set_states(states)
            put(places)
            for b, version in buffers:
                if version_of(b) != version:
                    note_write(b)


@contextmanager
def _filled_undone(values: Iterable[Any]) -> Iterator[None]:
    containers = [(v, contents) for v in values if (contents := contents_of(v)) is not None]
    try:
        yield
    finally:
        for container, contents in containers:
            if refilled([(container, contents)]):
                refill(container, contents)


@contextmanager
def _weights_kept(weights: Sequence[Tensor]) -> Iterator[None]:
    """Undo what is assigned to ``weight.data``, and what is written to those that a run was seen to write to. (Of the
    run that sees it, the recorder undoes that.)
    """
    plain = [p for p in weights if type(p) is nn.Parameter and p.layout == torch.strided]  # others belong to sharding
    kept = [(p, p.detach(), p.detach().clone() if is_written_to(p) else None) for p in plain]
    try:
        yield
    finally:
        for p, then, copy in kept:
            if p.data_ptr() != then.data_ptr() and then.untyped_storage().size():
                note_write(p)
                p.data = then
            if copy is not None:
                p.data.copy_(copy)


@contextmanager
def _caches_kept_empty(values: Iterable[Any]) -> Iterator[None]:
    """Empty the caches of functions that were empty: their code runs when it is first called, not in a run to learn."""
    cached: Iterable[Any] = (v for v in values if isinstance(v, CACHED))
    empty = [v for v in cached if not v.cache_info().currsize]
    try:
        yield
    finally:
        for v in empty:
            v.cache_clear()


@contextmanager
def _slots_kept(objects: Iterable[Any]) -> Iterator[None]:
    kept = [(v, slots_of(v)) for v in objects]
    try:
        yield
    finally:
        for v, fields in kept:
            for name in slots_of(v).keys() - fields.keys():
                object.__delattr__(v, name)  # the class may be frozen
            for name, value in fields.items():
                object.__setattr__(v, name, value)


@contextmanager
def _written_undone(values: list[Any], *, unseen: bool) -> Iterator[None]:
    tensors = [t for t in values if isinstance(t, Tensor) and not (isinstance(t, nn.Parameter) or t.is_inference())]
    copies = [(t, t._version, t.detach().clone()) for t in tensors]
    arrays = [(a, a.copy()) for a in values if is_array(a) and a.flags.writeable]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, version, kept in copies:
                if t._version != version or (unseen and not torch.equal(t, kept)):
                    note_write(t)
                    t.copy_(kept)
        for array, kept in arrays:
            array[...] = kept
