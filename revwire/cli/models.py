"""From a name on the command line to a model: ``timm:…``, ``torchvision:…``, ``pytorchvideo:…``, ``hf:…`` or
``package.module:factory``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from revwire.cli.usage import Shape, UsageError, first_line


@dataclass(frozen=True)
class Subject:
    """A model to work on, with inputs that it takes.

    Attributes:
        model: as its zoo builds it.
        shapes: shapes of its input tensors, or empty where they must be given.
        as_list: the tensors go in as one list (the pathways of a SlowFast) instead of as arguments.
        inputs: example inputs that came with the model; then ``shapes`` are not used.
        main: which of ``inputs``, where they are keywords, has the shape that is asked for.
    """

    model: nn.Module
    shapes: tuple[Shape, ...] = ()
    as_list: bool = False
    inputs: Any = None
    main: str = ""

    def example_inputs(self, shapes: tuple[Shape, ...] = (), *, as_list: bool = False) -> Any:
        """Random tensors of ``shapes``, or of the shapes known for the model."""
        if self.main and shapes:
            return self._of_shape(shapes[0])
        if self.inputs is not None and not shapes:
            return self.inputs if isinstance(self.inputs, tuple | dict) else (self.inputs,)
        tensors = [torch.randn(shape) for shape in shapes or self.shapes]
        if not tensors:
            raise UsageError("no input shape is known for this model; pass --input, for example --input 1,3,224,224")
        return (tensors,) if as_list or self.as_list else tuple(tensors)

    def _of_shape(self, shape: Shape) -> dict[str, torch.Tensor]:
        """The main input in this shape: whole numbers where it is of such."""
        known = self.inputs[self.main]
        drawn = torch.randn(shape) if known.is_floating_point() else torch.randint(int(known.max()) + 1, shape)
        return {**self.inputs, self.main: drawn}


def load(name: str, *, pretrained: bool = False) -> Subject:
    """Build the model called ``name``.

    Raises:
        UsageError: an unknown zoo or model (near matches are named), a missing package, weights out of reach.
    """
    zoo, colon, model = name.partition(":")
    if not colon or not zoo or not model:
        raise UsageError(
            f"got the model name {name!r}; expected ZOO:MODEL, for example timm:vit_tiny_patch16_224 or "
            "package.module:factory"
        )
    if zoo in ZOOS:
        return ZOOS[zoo](model, pretrained)
    if pretrained:
        raise UsageError("--pretrained is for the zoos; a factory loads its own weights")
    return _factory(zoo, model)


def _timm(name: str, pretrained: bool) -> Subject:
    timm = _package("timm")
    _known("timm", name, timm.list_models())
    model = _built(lambda: timm.create_model(name, pretrained=pretrained), name, pretrained)
    return Subject(model, ((2, *getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))),))


def _torchvision(name: str, pretrained: bool) -> Subject:
    models = _package("torchvision").models
    _known("torchvision", name, models.list_models())
    model = _built(lambda: models.get_model(name, weights="DEFAULT" if pretrained else None), name, pretrained)
    size = _crop(models.get_model_weights(name))
    video = name in models.list_models(module=models.video)
    return Subject(model, ((1, 3, 16, size, size),) if video else ((2, 3, size, size),))


def _crop(weights: Any) -> int:
    """The side that a model's published weights are evaluated at: the one size that every architecture surely takes."""
    preset = next(iter(weights)).transforms()
    crop = getattr(preset, "crop_size", None)
    return int(crop[0]) if crop else 224


# Frames and side that the architectures of pytorchvideo's hub are built for; their heads pool with kernels of fixed
# size.
_FRAMES = {
    "csn_r101": (32, 256),
    "mvit_base_32x3": (32, 224),
    "mvit_base_16x4": (16, 224),
    "r2plus1d_r50": (16, 256),
    "x3d_xs": (4, 160),
    "x3d_s": (13, 160),
    "x3d_m": (16, 224),
    "x3d_l": (16, 312),
    "efficient_x3d_xs": (4, 160),
    "efficient_x3d_s": (13, 160),
    "slowfast_r50": (32, 256),
    "slowfast_r101": (32, 256),
    "slowfast_16x8_r101_50_50": (64, 256),
}


_ALPHA = 4  # a SlowFast's slow pathway sees every fourth frame


def _pytorchvideo(name: str, pretrained: bool) -> Subject:
    _package("pytorchvideo")
    hub = import_module("pytorchvideo.models.hub")
    builders = {n: f for n, f in vars(hub).items() if callable(f) and not n.startswith("_")}
    _known("pytorchvideo", name, builders)
    model = _built(lambda: builders[name](pretrained=pretrained), name, pretrained)
    frames, side = _FRAMES.get(name, (8, 224))
    fast = (1, 3, frames, side, side)
    if name.startswith("slowfast"):
        return Subject(model, ((1, 3, frames // _ALPHA, side, side), fast), as_list=True)
    return Subject(model, (fast,))


def _huggingface(name: str, pretrained: bool) -> Subject:
    _package("transformers")
    from revwire.cli import hub

    config = hub.configuration(name)
    model = _built(lambda: hub.network(name, config, pretrained), name, pretrained)
    return Subject(model, main=hub.main_input(model), inputs=hub.example_inputs(model))


ZOOS: dict[str, Callable[[str, bool], Subject]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "pytorchvideo": _pytorchvideo,
    "hf": _huggingface,
}


def _factory(module: str, attribute: str) -> Subject:
    """``package.module:factory``: a module, a callable that returns one, or one that returns (module, example
    inputs).
    """
    sys.path.insert(0, os.getcwd())  # a script does not get its working directory from Python, `python -m` does
    try:
        made = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        near = get_close_matches(module, ZOOS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"got {module!r}, which is neither a zoo ({', '.join(ZOOS)}) nor a module that can be imported "
            f"({error}){hint}"
        ) from None
    except AttributeError:
        raise UsageError(f"the module {module!r} has no {attribute!r}") from None
    finally:
        sys.path.pop(0)
    if callable(made) and not isinstance(made, nn.Module):
        made = made()
    model, inputs = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{module}:{attribute} gave an object of type {type(model).__name__}; expected a torch.nn.Module, or "
            "(module, example inputs)"
        )
    return Subject(model, inputs=inputs)


EXTRAS = {"timm": "timm", "torchvision": "video", "pytorchvideo": "pytorchvideo", "transformers": "hf"}


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"models of {name} need a package that is not installed ({error.name}): pip install "
            f"'revwire[{EXTRAS[name]}]'"
        ) from None


def _known(zoo: str, name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        near = get_close_matches(name, names, n=3)
        raise UsageError(
            f"{zoo} has no model {name!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else f", but {len(names)} others")
        )


def _built(build: Callable[[], nn.Module], name: str, pretrained: bool) -> nn.Module:
    try:
        return build()
    except Exception as error:  # each hub client raises errors of its own where it cannot be reached
        if not pretrained:
            raise
        raise UsageError(
            f"the weights of {name} could not be loaded ({first_line(error)}); leave out --pretrained"
        ) from error
