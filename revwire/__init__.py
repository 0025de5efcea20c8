"""Rewire pretrained networks into reversible ones: train with two tensors per chain instead of every activation."""

from __future__ import annotations

from revwire._api.convert import convert as convert
from revwire._api.convert import plan as plan
from revwire._api.convert import revert as revert
from revwire._api.convert import stored_activations as stored_activations
from revwire._api.profile import Profile as Profile
from revwire._api.profile import profile as profile
from revwire._api.schedule import CouplingSchedule as CouplingSchedule
from revwire._api.schedule import set_coupling as set_coupling
from revwire._api.verify import Check as Check
from revwire._api.verify import verify as verify
from revwire._errors import BudgetError as BudgetError
from revwire._errors import CaptureError as CaptureError
from revwire._errors import ConversionError as ConversionError
from revwire._errors import CouplingError as CouplingError
from revwire._errors import RangeError as RangeError
from revwire._errors import ReconstructionError as ReconstructionError
from revwire._errors import RevwireError as RevwireError
from revwire._errors import UnsupportedTorchError as UnsupportedTorchError
from revwire._errors import UnsupportedTransformError as UnsupportedTransformError
from revwire._forwards.converted import report as report
from revwire._plan.plan import Forecast as Forecast
from revwire._plan.plan import Plan as Plan
from revwire.couplings.base import Coupling as Coupling
from revwire.couplings.bdia import Bdia as Bdia
from revwire.couplings.bdia_random import RandomBdia as RandomBdia
from revwire.couplings.dr2net import Dr2Net as Dr2Net
from revwire.couplings.midpoint import Midpoint as Midpoint
from revwire.couplings.momentum import Momentum as Momentum
from revwire.couplings.re2tal import Re2TAL as Re2TAL

__version__ = "0.1.0"
