"""Measuring a training step: peak bytes, saved bytes, seconds."""

from __future__ import annotations

from revwire.measure.arithmetic import arithmetic_seconds
from revwire.measure.memory import peak_bytes, saved_bytes
from revwire.measure.timing import Quartiles, Timings, paired_seconds

__all__ = ["Quartiles", "Timings", "arithmetic_seconds", "paired_seconds", "peak_bytes", "saved_bytes"]
