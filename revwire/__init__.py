"""Rewire pretrained networks into reversible ones: train with two tensors per chain instead of every activation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revwire import couplings, measure
    from revwire._api.calibrate import calibrate
    from revwire._api.config import load_config, save_config
    from revwire._api.convert import convert
    from revwire._api.doctor import Diagnosis, doctor
    from revwire._api.plan import plan
    from revwire._api.profile import Profile, profile
    from revwire._api.report import report
    from revwire._api.revert import revert
    from revwire._api.rival import Rival, rival
    from revwire._api.schedule import CouplingSchedule, set_coupling
    from revwire._api.stored_activations import stored_activations
    from revwire._api.verify import Check, verify
    from revwire._errors import (
        BudgetError,
        CalibrationWarning,
        CaptureError,
        ConversionError,
        CouplingError,
        FunctionLostWarning,
        NothingToRewireWarning,
        RangeError,
        ReconstructionError,
        RevwireError,
        UnsupportedTorchError,
        UnsupportedTransformError,
    )
    from revwire._plan.plan import Forecast, Plan
    from revwire.couplings import Bdia, Coupling, Dr2Net, Innovation, Midpoint, Momentum, RandomBdia, Re2TAL

__version__ = "0.2.0"

__all__ = [
    "Bdia",
    "BudgetError",
    "CalibrationWarning",
    "CaptureError",
    "Check",
    "ConversionError",
    "Coupling",
    "CouplingError",
    "CouplingSchedule",
    "Diagnosis",
    "Dr2Net",
    "Forecast",
    "FunctionLostWarning",
    "Innovation",
    "Midpoint",
    "Momentum",
    "NothingToRewireWarning",
    "Plan",
    "Profile",
    "RandomBdia",
    "RangeError",
    "Re2TAL",
    "ReconstructionError",
    "RevwireError",
    "Rival",
    "UnsupportedTorchError",
    "UnsupportedTransformError",
    "calibrate",
    "convert",
    "couplings",
    "doctor",
    "load_config",
    "measure",
    "plan",
    "profile",
    "report",
    "revert",
    "rival",
    "save_config",
    "set_coupling",
    "stored_activations",
    "verify",
]

_HOMES = {
    "revwire._api.calibrate": "calibrate",
    "revwire._api.config": "load_config save_config",
    "revwire._api.convert": "convert",
    "revwire._api.doctor": "Diagnosis doctor",
    "revwire._api.plan": "plan",
    "revwire._api.profile": "Profile profile",
    "revwire._api.report": "report",
    "revwire._api.revert": "revert",
    "revwire._api.rival": "Rival rival",
    "revwire._api.schedule": "CouplingSchedule set_coupling",
    "revwire._api.stored_activations": "stored_activations",
    "revwire._api.verify": "Check verify",
    "revwire._plan.plan": "Forecast Plan",
    "revwire.couplings": "Bdia Coupling Dr2Net Innovation Midpoint Momentum RandomBdia Re2TAL",
}
"""Where the public names are, but for errors. They are imported when they are asked for, since PyTorch takes seconds,
and ``revwire --help`` has none to spare.
"""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'revwire' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names.split()), "revwire._errors")
    value = import_module(f"revwire.{name}") if name in ("couplings", "measure") else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
