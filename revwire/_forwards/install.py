"""Put everything on a model that converts it, and take it off again."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from revwire._capture.arguments import Call, as_call, fresh_arguments
from revwire._capture.recording import Recording
from revwire._capture.run import fullest_recording
from revwire._errors import ConversionError, RevwireError
from revwire._forwards.base import InstanceForward, standing_forward, take_off
from revwire._forwards.checkpointed import install_checkpoint
from revwire._forwards.converted import Converted, Parted, converted, forget, remember
from revwire._forwards.first_call import FirstCall
from revwire._forwards.in_parts import install_parts
from revwire._forwards.leaf import unmake_leaf
from revwire._forwards.live import install_live
from revwire._plan.again import Again
from revwire._plan.options import Options
from revwire._plan.plan import Plan
from revwire._plan.ready import refuse_unready
from revwire._plan.survey import Planner, Prepared
from revwire._structures import tensors_in
from revwire._surroundings.as_found import left_as_found


def prepared(model: nn.Module, example_inputs: Any, options: Options) -> Prepared:
    """What is to be put on ``model``, from one run on the example; nothing is changed.

    Raises:
        ConversionError: it is converted already, or fails on the example.
    """
    return Planner(_observed(model, example_inputs), options).run()


def prepared_again(model: nn.Module, example_inputs: Any, plan: Plan) -> Prepared:
    """What is to be put on ``model`` as a plan says, from one run on the example; nothing is changed.

    Raises:
        ConversionError: as for `prepared`; or the plan is that of another model.
    """
    return Again(_observed(model, example_inputs), plan).run()


def _observed(model: nn.Module, example_inputs: Any) -> Recording:
    refuse_converted(model)
    call = as_call(example_inputs)
    given = [*tensors_in((call.args, call.kwargs))]
    if given and not any(t.numel() for t in given):  # nothing is drawn for no elements, and no value is seen
        raise ConversionError(
            f"{type(model).__name__}: got example inputs without elements (shape {tuple(given[0].shape)}), which "
            "do not show what the model computes; expected a batch of at least one, such as a training step takes"
        )
    try:
        return fullest_recording(model, call.args, call.kwargs)
    except RevwireError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if _runs(model, call):
            raise ConversionError(
                f"{type(model).__name__}: the model runs on the example inputs, but not while revwire observes it "
                f"({said}); expected a forward without gradients taken inside (torch.autograd.grad, backward, "
                "torch.func.grad ...), or whatever else that is; convert the parts of the model around it: "
                "revwire.convert(model.part, inputs_of_that_part)"
            ) from error
        raise ConversionError(
            f"{type(model).__name__}: the model failed on the example inputs ({said}); pass what its forward takes: a "
            "tensor, a tuple of positional arguments, or a dict of keyword arguments"
        ) from error


def _runs(model: nn.Module, call: Call) -> bool:
    """Whether ``model`` runs on its example where nobody looks on."""
    args, kwargs = fresh_arguments((call.args, call.kwargs))
    with left_as_found(model, (args, kwargs)), torch.enable_grad(), suppress(Exception):
        model(*args, **kwargs)
        return True
    return False


def put_on(model: nn.Module, ready: Prepared, *, strict: bool) -> Converted:
    """Convert ``model``, and return what it remembers of that.

    Raises:
        ConversionError: ``strict``, and a residual add would stay.
    """
    found, chains, hosts, layouts, cores, known, _ = ready
    if strict:
        _refuse_skipped(found)
    for path, slots in hosts.items():
        install_live(model.get_submodule(path), path, slots, layouts[path])
    checkpointed = [install_checkpoint(model.get_submodule(path), path) for path in found.checkpointed]
    parted = [
        Parted(
            install_parts(model.get_submodule(path), path, chains[core.chain], core.sizes, known),
            core.chain,
            core.place,
        )
        for path, core in cores.items()
    ]
    counts = {name: count for u in found.units for name, count in u.cores}
    for one in parted:
        one.forward.cut(counts.get(one.forward.path, 1))
    state = Converted(found, chains, checkpointed, parted)
    remember(model, state)
    return state


def take_all_off(model: nn.Module) -> None:
    """Give a converted model its original wiring back.

    Raises:
        ConversionError: it is not converted.
    """
    converted(model)
    for module in model.modules():
        if isinstance(standing_forward(module), InstanceForward):
            take_off(module)
        unmake_leaf(module)
    forget(model)


def refuse_converted(model: nn.Module) -> None:
    """Raise where ``model`` is converted already, or cannot be.

    Raises:
        ConversionError: says which, and what to do first.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise ConversionError(f"convert: got {name}; expected a torch.nn.Module")
    refuse_unready(model)
    taken = [n for n, m in model.named_modules() if isinstance(standing_forward(m), (FirstCall, InstanceForward))]
    if taken:
        raise ConversionError(
            f"{name}: got a model that is converted already (at {taken[0] or 'its root'!r}); call "
            "revwire.revert(model) first"
        )


def _refuse_skipped(found: Plan) -> None:
    left = [s for s in found.skipped if not s.inside_unit and not s.reason.startswith("excluded")]
    if left or not found.chains:
        what = (
            "; ".join(f"{s.path}{f', at {s.line}' if s.line else ''}: {s.reason}" for s in left[:5])
            or "no chain of residual units was found"
        )
        raise ConversionError(
            f"{found.model}: strict=True, and {len(left)} residual adds would stay: {what}; exclude them, or pass "
            "strict=False"
        )
