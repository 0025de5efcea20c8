"""`revert`: give a model its original wiring back, in place."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from revwire._api.config import warn_of_lost_function
from revwire._forwards.first_call import FirstCall
from revwire._forwards.install import take_all_off
from revwire._surroundings.interrupts import uninterrupted

M = TypeVar("M", bound=nn.Module)


def revert(model: M) -> M:
    """Give ``model`` its original wiring back, in place, with its weights as they are now, and return it.

    Warns:
        FunctionLostWarning: its weights were trained under a coupling that does not keep the function of the original
            network.

    Raises:
        ConversionError: it is not converted.
    """
    forward = vars(model).get("forward")
    if isinstance(forward, FirstCall):
        forward.remove()
    else:
        warn_of_lost_function(model, "the original wiring")
        uninterrupted(take_all_off, model)
    return model
