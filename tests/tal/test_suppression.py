"""Suppression: against one detection at a time, and against the results of OpenTAD's compiled kernels."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.tal.segments.overlap import iou
from benchmarks.tal.suppression import Suppression, fuse, vote

DATA = os.environ.get("REVWIRE_DATA")
DECAYS = {0: "hard", 1: "linear", 2: "gaussian"}


def plain(segments, scores, how):
    """(index, score) of one class, taken one by one, in float64."""
    left = [(score, i) for i, score in enumerate(scores) if how.soft or how.min_score <= 0 or score > how.min_score]
    taken = []
    while left and len(taken) < how.max_segments:
        best = max(left, key=lambda item: (item[0], -item[1]))
        taken.append((best[1], best[0]))
        rest = []
        for score, i in left:
            if i == best[1]:
                continue
            overlap = float(iou(np.array(segments[best[1]]), np.array(segments[i])))
            factor = 1.0
            if how.soft and how.decay == "gaussian":
                factor = np.exp(-(overlap**2) / how.sigma)
            elif overlap >= how.iou_threshold:
                factor = 1 - overlap if how.soft and how.decay == "linear" else 0.0
            if (score * factor >= how.min_score) if how.soft else factor > 0:
                rest.append((score * factor, i))
        left = rest
    return taken


def tensors(rows):
    """Segments of halves of seconds (no overlap near a threshold), scores all different, labels."""
    segments = torch.tensor([[s / 2, (s + n) / 2] for s, n, _ in rows]).reshape(-1, 2)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
    return segments, (order + 3.0) / (len(rows) + 3), torch.tensor([c for _, _, c in rows], dtype=torch.long)


rows = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(0, 3)), max_size=40)
hows = st.builds(
    Suppression,
    soft=st.booleans(),
    decay=st.sampled_from(["gaussian", "linear", "hard"]),
    sigma=st.sampled_from([0.3, 0.7]),
    iou_threshold=st.sampled_from([0.2345, 0.5432]),
    min_score=st.sampled_from([0.001, 0.0333]),
    max_segments=st.sampled_from([1, 5, 200]),
    multiclass=st.booleans(),
)


@settings(deadline=None)
@given(rows, hows)
def test_it_is_the_plain_loop(items, how):
    segments, scores, labels = tensors(items)
    found = how(segments, scores, labels)
    groups = (
        [torch.nonzero(labels == c)[:, 0].tolist() for c in sorted(set(labels.tolist()))]
        if how.multiclass
        else [range(len(items))]
    )
    expected = [
        (score, group[i])
        for group in groups
        for i, score in plain(segments[list(group)].tolist(), scores[list(group)].tolist(), how)
    ]
    expected = sorted(expected, key=lambda item: -item[0])[: how.max_segments]
    assert found.scores.tolist() == pytest.approx([score for score, _ in expected], abs=1e-5)

    # Decayed scores may be equal but for rounding; then their order is open.
    if len({round(s, 4) for s, _ in expected}) == len(expected):
        indices = [i for _, i in expected]
        assert found.segments.tolist() == segments[indices].tolist()
        assert found.labels.tolist() == labels[indices].tolist()


@settings(deadline=None)
@given(rows, hows)
def test_it_does_not_depend_on_the_order_of_detections(items, how):
    assume(how.decay != "linear")  # its decayed scores are ratios that may be equal
    segments, scores, labels = tensors(items)
    turned = how(segments.flip(0), scores.flip(0), labels.flip(0))
    torch.testing.assert_close(turned.scores, how(segments, scores, labels).scores)


@settings(deadline=None)
@given(rows)
def test_voting_is_a_mean_of_those_that_overlap(items):
    segments, scores, _ = tensors(items)
    moved = vote(segments, segments, scores, 0.7)
    assert moved.shape == segments.shape
    for i, own in enumerate(segments.numpy()):
        near = iou(own, segments.numpy()) >= 0.7
        weights = scores.numpy()[near]
        expected = (weights[:, None] * segments.numpy()[near]).sum(0) / weights.sum()
        assert moved[i].numpy() == pytest.approx(expected, rel=1e-5)


def test_voting_leaves_a_segment_without_length():
    point = torch.tensor([[2.0, 2.0]])
    assert vote(point, torch.tensor([[2.0, 2.0], [1.0, 3.0]]), torch.tensor([0.5, 0.5]), 0.7).tolist() == [[2, 2]]


def test_by_hand():
    segments, scores = torch.tensor([[0.0, 10], [1, 10], [20, 30], [20, 30]]), torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels = torch.tensor([0, 0, 0, 1])
    hard = Suppression(soft=False, iou_threshold=0.5)
    assert hard(segments, scores, labels).scores.tolist() == pytest.approx([0.9, 0.7, 0.6])
    assert Suppression(soft=False, iou_threshold=0.5, multiclass=False)(segments, scores, labels).labels.tolist() == [
        0,
        0,
    ]
    soft = Suppression(sigma=0.5, multiclass=False)(segments, scores, labels)
    assert soft.scores.tolist() == pytest.approx(
        [0.9, 0.7, 0.8 * np.exp(-0.81 / 0.5), 0.6 * np.exp(-1 / 0.5)], rel=1e-4
    )
    voted = Suppression(soft=False, iou_threshold=0.5, multiclass=False, voting=0.7)(segments, scores, labels)
    assert voted.segments[0].tolist() == pytest.approx([0.8 / 1.7, 10])


def test_nothing_in_nothing_out():
    empty = Suppression()(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert [tuple(t.shape) for t in empty] == [(0, 2), (0,), (0,)]
    assert empty.labels.dtype == torch.long


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="unknown decay 'cubic'; expected 'gaussian', 'linear' or 'hard'"):
        Suppression(decay="cubic")
    with pytest.raises(ValueError, match="expected max_segments ≥ 1"):
        Suppression(max_segments=0)
    with pytest.raises(ValueError, match=r"expected \(n, 2\), \(n,\) and \(n,\), got \(3, 2\), \(2,\)"):
        Suppression()(torch.zeros(3, 2), torch.zeros(2), torch.zeros(2))


def test_fused_classes_multiply_their_scores():
    segments, scores = torch.tensor([[0.0, 1], [2, 3]]), torch.tensor([0.5, 0.25])
    fused = fuse(segments, scores, [(7, 0.5), (3, 0.2)])
    assert fused.segments.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert fused.scores.tolist() == pytest.approx([0.25, 0.125, 0.1, 0.05])
    assert fused.labels.tolist() == [7, 7, 3, 3]
    assert len(fuse(segments, scores, []).scores) == 0
    named = fused.as_results(list("abcdefgh"))
    assert named[0] == {"segment": [0.0, 1.0], "label": "h", "score": 0.25}


def _close(found, expected, name):
    """Scores to 1e-6, segments to 1e-5 of their size; where scores are equal their order is open."""
    assert len(found.scores) == len(expected["scores"])
    torch.testing.assert_close(found.scores, expected["scores"], atol=1e-6, rtol=1e-6)
    if name.startswith("tied_scores"):
        return
    rows = [
        sorted(zip(torch.round(s, decimals=4).tolist(), x.tolist(), c.tolist(), strict=True))
        for x, s, c in (found, (expected["segs"], expected["scores"], expected["labels"]))
    ]
    for ours, theirs in zip(*rows, strict=True):
        assert ours[2] == theirs[2]
        # where a segment has no partner to vote with the reference has 0/0
        known = [(a, b) for a, b in zip(ours[1], theirs[1], strict=True) if not np.isnan(b)]
        assert [a for a, _ in known] == pytest.approx([b for _, b in known], rel=1e-5, abs=1e-5)


@pytest.mark.skipif(not DATA, reason="needs OpenTAD's results: set REVWIRE_DATA")
def test_opentad_keeps_the_same():
    reference = torch.load(Path(DATA, "opentad_reference/softnms.pt"), weights_only=True)
    for case in reference["cases"]:
        for run in case["runs"]:
            p = reference["params"][run["params_index"]]
            how = Suppression(
                soft=p["use_soft_nms"],
                decay=DECAYS[p["method"]],
                sigma=p["sigma"],
                iou_threshold=p["iou_threshold"],
                min_score=p["min_score"],
                max_segments=p["max_seg_num"],
                multiclass=p["multiclass"],
                voting=p["voting_thresh"],
            )
            found = how(case["segs"], case["scores"], case["labels"])
            assert not found.segments.isnan().any()
            _close(found, run, case["name"])
        how, every = case["raw_softnms"], {"multiclass": False, "max_segments": 10**6}
        raw = Suppression(decay=DECAYS[how["method"]], sigma=how["sigma"], min_score=how["min_score"], **every)
        found = raw(case["segs"], case["scores"], torch.arange(len(case["scores"])))
        assert torch.equal(found.labels, how["inds"]), case["name"]  # equal scores in the same order, too
        raw = Suppression(soft=False, iou_threshold=case["raw_nms"]["iou_threshold"], **every)
        kept = raw(case["segs"], case["scores"], torch.arange(len(case["scores"])))
        chosen = case["raw_nms"]["inds"]  # of equal scores in the order of an unstable sort
        assert torch.equal(case["scores"][kept.labels], case["scores"][chosen]), case["name"]
        assert torch.equal(kept.labels, chosen) or case["name"].startswith("tied_scores"), case["name"]
