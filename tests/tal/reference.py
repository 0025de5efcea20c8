"""Reference tensors of OpenTAD, made and described by `opentad_reference/README.md` in the data root."""

import os
from pathlib import Path

import pytest
import torch

F64 = 1e-10
"""Relative error allowed where the reference is float64, and the module is run in it."""

PRECISIONS = [torch.float64, torch.float32]
NAMES = ["float64", "float32"]


def load(name):
    """A reference file, as it was stored; the test skips where there is none."""
    path = Path(os.environ.get("REVWIRE_DATA", "/nowhere"), "opentad_reference", f"{name}.pt")
    if not path.exists():
        pytest.skip(f"needs opentad_reference/{name}.pt below REVWIRE_DATA")
    return torch.load(path, weights_only=True)


def relative_error(got, expected):
    """max|got − expected| / max|expected|, over one tensor."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = (got.detach().double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-300)).item()
