"""Rewire pretrained networks into reversible ones: train with two tensors per chain instead of every activation."""

from __future__ import annotations

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

__version__ = "0.1.0"

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
