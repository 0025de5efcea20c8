"""Errors. Every one is a `RevwireError` and also the builtin that a caller would expect.

A message has four parts: where (a module path), what was got, what was expected, and the way out.
"""

from __future__ import annotations


class RevwireError(Exception):
    """Base of all errors raised by revwire."""


class CouplingError(RevwireError, ValueError):
    """A coupling, or a combination of a coupling and an arithmetic, that does not exist."""


class CaptureError(RevwireError, RuntimeError):
    """A module whose forward could not be captured as a graph."""


class ConversionError(RevwireError, ValueError):
    """A model that cannot be converted, planned or reverted as asked."""


class NothingToRewireWarning(UserWarning):
    """`convert` found no chain of residual units, and left the model as it was."""


class CalibrationWarning(UserWarning):
    """Examples were no ground for the predictors of a coupling."""


class FunctionLostWarning(UserWarning):
    """Weights that were trained in a form whose function the plain network does not have are about to run in another
    one.
    """


class ReconstructionError(RevwireError, RuntimeError):
    """The backward pass could not rebuild what the forward pass computed; no gradient was returned."""


class RangeError(RevwireError, OverflowError):
    """A value left the range of the fixed-point streams, and it was known too late to scale them anew."""


class UnsupportedTransformError(RevwireError, NotImplementedError):
    """Double backward, forward-mode AD or a `torch.func` transform through a reversible chain."""


class UnsupportedTorchError(RevwireError, RuntimeError):
    """This PyTorch lacks a name that a feature stands on: it is not one of the versions that revwire is tested with."""


class BudgetError(RevwireError, ValueError):
    """A memory budget that is none, or that no mix of stored, checkpointed and reversible units fits.

    Attributes:
        smallest: bytes of the smallest budget that some mix fits, where that was found.
    """

    def __init__(self, message: str, smallest: int | None = None) -> None:
        super().__init__(message)
        self.smallest = smallest
