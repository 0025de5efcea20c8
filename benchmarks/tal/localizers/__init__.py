"""Localizers: features of a video -> scored segments."""

from benchmarks.tal.localizers.actionformer import ActionFormer as ActionFormer
from benchmarks.tal.localizers.localizer import Localizer as Localizer
from benchmarks.tal.localizers.published import load_published as load_published
from benchmarks.tal.localizers.published import localizer_of as localizer_of
from benchmarks.tal.localizers.tridet import TriDet as TriDet
from benchmarks.tal.localizers.vsgn import VSGN as VSGN

LOCALIZERS = {"actionformer": ActionFormer, "tridet": TriDet, "vsgn": VSGN}
"""By the name that a configuration uses."""
