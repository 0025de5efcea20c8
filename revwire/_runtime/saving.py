"""The pack hooks of a branch."""

from __future__ import annotations

_WROTE_INPUT = "its branch wrote to its own input in place", "a branch that leaves its input as it is"
