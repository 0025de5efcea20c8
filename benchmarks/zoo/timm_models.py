"""timm: the smallest model of each of its model files, or every registered name.

Which model is the smallest is kept in ``timm_smallest.txt``; ``python -m benchmarks.zoo.timm_models`` makes it anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.zoo.case import Built, Case

ZOO = "timm_models"
SMALLEST = Path(__file__).with_name("timm_smallest.txt")
SIDES = (96, 112, 128)
"""Pixels to try, smallest first, before the model's own size: at 96, a stage of stride 32 is 3 x 3, and no 1 x 1 hides
a shape.
"""
SHORTER: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 4}}
"""Options for models whose smallest is too large for the time limit."""


def cases(everything: bool = False) -> list[Case]:
    """The smallest model of each model file; with ``everything``, each registered name."""
    if everything:
        import timm

        names = timm.list_models()
    else:
        names = [line.split()[0] for line in SMALLEST.read_text().splitlines()]
    return [Case(name, ZOO, partial(_build, name)) for name in names]


def _build(name: str) -> Built:
    import timm

    failures = []
    config = timm.get_pretrained_cfg(name)
    own = config.input_size if config else (3, 224, 224)
    for options, side in _sizes(own, fixed=bool(config and config.fixed_input_size)):
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, **options, **SHORTER.get(name, {}))
            example = torch.randn(2, *side)
            _try(model, example)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AssertionError,
            IndexError,
        ) as error:  # the size does not suit the model
            failures.append(f"{side}: {type(error).__name__}: {error}")
            continue
        return Built(model.train(), example)
    raise RuntimeError(f"{name} takes none of the sizes: {'; '.join(failures)}")


def _sizes(own: tuple[int, ...], fixed: bool) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    """(options of ``create_model``, (channels, height, width)), the cheapest first, the model's own size last."""
    channels, height, width = own
    for side in (s for s in SIDES if s < min(height, width)):
        yield {"img_size": side}, (channels, side, side)
        if not fixed:
            yield {}, (channels, side, side)
    yield {}, own


def _try(model: nn.Module, example: torch.Tensor) -> None:
    with torch.no_grad():
        model.train()(example)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()


def smallest() -> list[tuple[str, str, int]]:
    """(model file, name, parameters) of the smallest model of each file; models are built without memory."""
    import timm

    best: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        file = timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1]
        size = _parameters(name)
        if size is not None:
            best[file] = min(best.get(file, (size, name)), (size, name))
    return [(file, name, size) for file, (size, name) in sorted(best.items())]


def _parameters(name: str) -> int | None:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except (RuntimeError, NotImplementedError, ValueError):  # reads values while it is built, or needs a package
        return None
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    """Write the list of the smallest models."""
    found = smallest()
    SMALLEST.write_text("".join(f"{name}  {file}  {size}\n" for file, name, size in found))
    print(f"{len(found)} model files")


if __name__ == "__main__":
    main()
