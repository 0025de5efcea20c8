"""Rewire pretrained networks into reversible ones: train with two tensors per chain instead of every activation."""

from revwire._convert import convert as convert
from revwire._convert import plan as plan
from revwire._convert import report as report
from revwire._convert import revert as revert
from revwire._convert import stored_activations as stored_activations
from revwire._couplings import Bdia as Bdia
from revwire._couplings import Coupling as Coupling
from revwire._couplings import Dr2Net as Dr2Net
from revwire._couplings import Midpoint as Midpoint
from revwire._couplings import Momentum as Momentum
from revwire._couplings import RandomBdia as RandomBdia
from revwire._couplings import Re2TAL as Re2TAL
from revwire._errors import BudgetError as BudgetError
from revwire._errors import CaptureError as CaptureError
from revwire._errors import ConversionError as ConversionError
from revwire._errors import CouplingError as CouplingError
from revwire._errors import RangeError as RangeError
from revwire._errors import ReconstructionError as ReconstructionError
from revwire._errors import RevwireError as RevwireError
from revwire._errors import UnsupportedTransformError as UnsupportedTransformError
from revwire._plan import Forecast as Forecast
from revwire._plan import Plan as Plan
from revwire._profile import Profile as Profile
from revwire._profile import profile as profile
from revwire._recouple import CouplingSchedule as CouplingSchedule
from revwire._recouple import set_coupling as set_coupling
from revwire._verify import Check as Check
from revwire._verify import verify as verify

__version__ = "0.1.0"
