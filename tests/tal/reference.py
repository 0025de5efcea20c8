"""Reference tensors of OpenTAD, made and described by `opentad_reference/README.md`, and that of the second set, in the
data root.
"""

import os
from pathlib import Path

import pytest
import torch

from benchmarks.tal.suppression import Suppression

F64 = 1e-10
"""Relative error allowed where the reference is float64, and the module is run in it."""

PRECISIONS = [torch.float64, torch.float32]
NAMES = ["float64", "float32"]


SECOND = "opentad_reference_2"
"""The folder of the second set."""


def load(name, folder="opentad_reference"):
    """A reference file, as it was stored; the test skips where there is none."""
    path = Path(os.environ.get("REVWIRE_DATA", "/nowhere"), folder, f"{name}.pt")
    if not path.exists():
        pytest.skip(f"needs {folder}/{name}.pt below REVWIRE_DATA")
    return torch.load(path, weights_only=True)


def suppression(nms):
    """OpenTAD's settings."""
    return Suppression(
        soft=nms["use_soft_nms"],
        sigma=nms["sigma"],
        min_score=nms["min_score"],
        max_segments=nms["max_seg_num"],
        multiclass=nms["multiclass"],
        voting=nms["voting_thresh"],
    )


def seconds(segments, meta):
    """Of OpenTAD's metas: steps as seconds."""
    if meta["fps"] == -1:
        found = segments / meta["resize_length"] * meta["duration"]
    else:
        found = (segments * meta["snippet_stride"] + meta.get("window_start_frame", 0) + meta["offset_frames"]) / meta[
            "fps"
        ]
    return found.clamp(0, meta["duration"])


def classified(segments, scores, external, video):
    """Segments and scores times those of the classes that an external classifier gives a video."""
    if external is None:
        return segments, scores
    best = external["scores"][video].topk(external["topk"]).values
    return segments.repeat(len(best), 1), torch.cat([scores * score for score in best])


def assert_post(detections, post, nms, ties=0.05):
    """That a batch's detections are, once thinned out and in seconds, what OpenTAD wrote."""
    suppress = suppression({"min_score": 0.0, "multiclass": True} | nms)
    for found, meta in zip(detections, post["metas"], strict=True):
        kept = suppress(found.segments, found.scores, found.labels)
        segments, scores = seconds(kept.segments.double(), meta), kept.scores.double()
        segments, scores = classified(segments, scores, post["external_classifier"], meta["video_name"])
        expected = post["results"][meta["video_name"]]
        assert len(scores) == len(expected["scores"])
        assert_near(scores.sort().values, expected["scores"].sort().values, 1e-4)
        alike = 1 - len(found.scores.unique()) / len(found.scores)
        if alike < ties:  # else suppression has a choice: to VSGN, one place of the padding is like another
            stored = expected["segments"].sort(0).values  # with two decimals
            assert_near(segments.sort(0).values, stored, 0.011)


def assert_near(got, expected, atol):
    torch.testing.assert_close(got.detach().double(), expected.double(), rtol=0, atol=atol)


def relative_error(got, expected):
    """max|got − expected| / max|expected|, over one tensor."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    difference = (got.detach().double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp(min=1e-300)).item()
