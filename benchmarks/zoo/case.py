"""A case of the sweep: a model that can be built, and an example that it takes. Nothing is built before ``build()`` is
called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Built:
    """A model with random weights, and an example for it.

    Attributes:
        model: in train mode.
        example: what ``revwire.convert`` takes: a tensor, a tuple of positional arguments, or a dict of keyword
            arguments.
    """

    model: nn.Module
    example: Any


@dataclass(frozen=True)
class Case:
    """One model of a zoo.

    Attributes:
        name: unique within the zoo.
        zoo: name of the file that lists it, and of its record.
        build: makes model and example; imports the zoo's library, and raises what that raises.
    """

    name: str
    zoo: str
    build: Callable[[], Built]
