"""The error that says what a recompute found changed."""

from __future__ import annotations

from revwire._errors import ReconstructionError
from revwire._runtime.chain import Chain
from revwire._runtime.unit import Unit

WROTE_INPUT = "its branch wrote to its own input in place", "a branch that leaves its input as it is"
"""What `fault` is to say of that."""


def fault(unit: Unit, chain: Chain, got: str, expected: str) -> ReconstructionError:
    """The error that says what changed between the forward of a unit and its backward."""
    path = unit.path
    return ReconstructionError(
        f"{path} ({chain.name}): between forward and backward, {got}; expected {expected}. Usual causes: weights, "
        "buffers or inputs changed before backward, a non-deterministic kernel "
        "(torch.use_deterministic_algorithms(True)), random numbers from a generator of the module's own or drawn by "
        "several threads at once. Gradients of this pass are not valid: zero them; then exclude the module "
        f"(convert(..., exclude=[{path!r}])) or run under revwire.stored_activations(model)"
    )
