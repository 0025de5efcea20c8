"""`save_config` and `load_config`: the form in which weights were trained, beside them; and what is said where it would
be lost.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import repeat

from torch import nn

from revwire._errors import FunctionLostWarning
from revwire._forwards.converted import converted, was_trained
from revwire._plan.plan import Plan
from revwire._plan.saved import AnyPath
from revwire.couplings import Coupling


def save_config(model: nn.Module, path: AnyPath) -> None:
    """Write down, as JSON, the form in which the weights of a converted model are trained: its plan, with the couplings
    that it has now. A ``state_dict`` has the keys of the original network, and says nothing of it.

    Args:
        model: a converted model.
        path: of the file, beside that of the weights.

    Raises:
        ConversionError: the model is not converted.

    Example:
        >>> import tempfile, torch, revwire
        >>> def network():
        ...     return torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
        >>> x = torch.randn(1, 4, 16)
        >>> trained = revwire.convert(network(), x, coupling="re2tal")
        >>> with tempfile.NamedTemporaryFile(suffix=".json") as file:
        ...     revwire.save_config(trained, file.name)
        ...     config = revwire.load_config(file.name)
        >>> again = network()
        >>> _ = again.load_state_dict(trained.state_dict())
        >>> again = revwire.convert(again, x, plan=config)
        >>> revwire.report(again).chains[0].coupling
        're2tal'
    """
    config_of(model).save(path)


def load_config(path: AnyPath, *, couplings: Iterable[Coupling] = ()) -> Plan:
    """What `save_config` wrote, for ``convert(model, x, plan=...)``.

    Args:
        path: of the file.
        couplings: those of your own that the model had.

    Raises:
        ConversionError: the file holds no plan, or one of another version.
        CouplingError: it has a coupling that is not known.
    """
    return Plan.load(path, couplings=couplings)


def config_of(model: nn.Module) -> Plan:
    """The plan of a converted model as the record of what is trained.

    Raises:
        ConversionError: it is not converted.
    """
    return replace(converted(model).present_plan(), trained=True)


def lost(before: Iterable[Coupling | None], after: Iterable[Coupling | None]) -> list[str]:
    """The couplings among those of some units whose function goes where the units run under others; None: the original
    network.
    """
    pairs = zip(before, after, strict=False)
    return [*dict.fromkeys(a.name for a, b in pairs if a and type(a) is not type(b) and not a.keeps_function)]


def warn_of_lost_function(model: nn.Module, where: str, after: Sequence[Coupling] | None = None) -> None:
    """Warn where the weights of a converted model were trained under couplings whose function they do not have in what
    comes: under other couplings, or in the original network (None).
    """
    now = [c for chain in converted(model).chains for c in chain.couplings]
    names = lost(now, repeat(None) if after is None else after)
    if names and was_trained(model):
        warnings.warn(lost_words(type(model).__name__, names, where), FunctionLostWarning, stacklevel=3)


def lost_words(model: str, names: Iterable[str], where: str) -> str:
    """What a warning says."""
    return (
        f"{model}: its weights were trained under coupling {' + '.join(map(repr, names))}, which does not keep the "
        f"function of the original network: in {where} they compute something else; run them as they were trained: "
        "revwire.convert(model, x, plan=revwire.load_config(path)), where revwire.save_config(model, path) has written "
        "it down"
    )
