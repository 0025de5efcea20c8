"""`rival`: a model under the activation checkpointing that a user would pick, on the same weights.

Note [What the rival is]
    Where the model has a switch of its own for checkpointing (a method or a flag, by the names that libraries give it),
    and this takes effect, it is the model with that switched on. Some libraries checkpoint in train mode only, and some
    refuse; so a forward pass is watched, and where nothing runs inside of a checkpoint, every block is wrapped in
    `torch.utils.checkpoint` (non-reentrant); which those are says `revwire._plan.blocks`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from revwire._capture.arguments import Call, as_call, fresh_arguments
from revwire._capture.run import fullest_recording
from revwire._forwards.converted import is_converted
from revwire._forwards.install import take_all_off
from revwire._plan.blocks import every_block
from revwire._surroundings.as_found import left_as_found
from revwire._torch import inside_checkpoint

OWN_SWITCH, EVERY_BLOCK = "checkpoint (own switch)", "checkpoint every block"

_SETTERS = ("set_grad_checkpointing",)
_PAIRS = (
    ("activation_checkpointing_enable", "activation_checkpointing_disable"),
    ("gradient_checkpointing_enable", "gradient_checkpointing_disable"),
    ("enable_gradient_checkpointing", "disable_gradient_checkpointing"),
)
_FLAGS = ("use_checkpoint", "use_checkpointing", "with_cp")


@dataclass(frozen=True)
class Rival:
    """A model under the activation checkpointing that a user would pick. See Note [What the rival is].

    Attributes:
        model: a copy of the model, in its original wiring, on the very same weights and buffers.
        name: ``"checkpoint (own switch)"`` or ``"checkpoint every block"``.
        blocks: qualified names of the modules that are wrapped; none with its own switch.
    """

    model: nn.Module
    name: str
    blocks: tuple[str, ...] = ()


def rival(model: nn.Module, example_inputs: Any) -> Rival:
    """The original network under the checkpointing that a user would pick: by its own switch, or of every block.

    ``model`` is left as it is, converted or not. Steps of the copy add to the same ``.grad`` and write to the same
    buffers.

    Args:
        model: any module; a copy of it is run on ``example_inputs``.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments.

    Example:
        >>> import torch, revwire
        >>> net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> revwire.rival(net, torch.randn(1, 4, 16)).blocks
        ('layers.0', 'layers.1')
    """
    call, own = as_call(example_inputs), _twin(model)
    if switched(own, on=True) and _runs_checkpoints(own, call):
        return Rival(own, OWN_SWITCH)
    twin = original(model)
    blocks = every_block(fullest_recording(twin, call.args, call.kwargs))
    for path in blocks:
        block = twin.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return Rival(twin, EVERY_BLOCK, blocks)


def original(model: nn.Module) -> nn.Module:
    """A copy in the original wiring on the very same weights and buffers, without checkpointing."""
    twin = _twin(model)
    switched(twin, on=False)
    return twin


def _twin(model: nn.Module) -> nn.Module:
    tensors: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, tensors)
    for module in [m for m in twin.modules() if is_converted(m)]:
        take_all_off(module)
    return twin


def switched(model: nn.Module, *, on: bool) -> bool:
    """Turn the outermost switches of a model's own checkpointing; whether there was one. Flags are set wherever they
    are.
    """
    turned: list[str] = []
    for name, module in model.named_modules():
        if not any(name.startswith(f"{other}." if other else "") for other in turned) and _turned(module, on):
            turned.append(name)
    flags = [(m, flag) for m in model.modules() for flag in _FLAGS if isinstance(vars(m).get(flag), bool)]
    for module, flag in flags if not turned else ():
        setattr(module, flag, on)
    return bool(turned or flags)


def _turned(module: nn.Module, on: bool) -> bool:
    for name in _SETTERS:
        if callable(setter := getattr(module, name, None)):
            return _accepts(setter, on)
    for pair in _PAIRS:
        if callable(method := getattr(module, pair[not on], None)):
            return (on and _accepts(method, {"use_reentrant": False})) or _accepts(method)
    return False


def _accepts(method: Callable[..., Any], *args: Any) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that gives way to another one
            method(*args)
    except Exception:  # noqa: BLE001 - a library may refuse in its own way: then there is no switch
        return False
    return True


def _runs_checkpoints(model: nn.Module, call: Call) -> bool:
    """Whether some module runs inside of a checkpoint, in a forward pass that leaves no trace."""
    seen: list[bool] = []
    args, kwargs = fresh_arguments((call.args, call.kwargs))
    with left_as_found(model, (args, kwargs)), torch.enable_grad():
        hooks = [m.register_forward_pre_hook(lambda *_: seen.append(inside_checkpoint())) for m in model.modules()]
        try:
            model(*args, **kwargs)
        except Exception:  # noqa: BLE001 - it fails with its switch on: as good as none
            return False
        finally:
            for hook in hooks:
                hook.remove()
    return any(seen)
