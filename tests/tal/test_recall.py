"""Recall: by hand, by a plain loop, and OpenTAD's figures."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SECOND, load
from test_evaluation import found, truth

from benchmarks.tal.annotations import parse
from benchmarks.tal.evaluation import ACTIVITYNET, evaluate
from benchmarks.tal.recall import average_recall, recall_at, summary

EXACT = 1e-9


@pytest.fixture(scope="module")
def reference():
    return load("recall", SECOND)


def inputs(reference, case, folder):
    """(annotations, detections) of a case."""
    if case == "external":
        stored = Path(os.environ["REVWIRE_DATA"], "detections/stpn_thumos14")
        gt, detected = stored / "gt.json", json.loads((stored / "results.json").read_text())
    else:
        texts = (
            reference["inputs"]["new"]
            if case == "new"
            else load("map")["inputs"]["random" if case.startswith("random") else case]
        )
        gt, detected = folder / "gt.json", json.loads(texts["det_json"])
        gt.write_text(texts["gt_json"])
    return parse(gt, subsets=None, ignore=(), durations=False)[0], detected["results"]


def test_average_recall_is_opentads(reference, tmp_path):
    checked = 0
    for name, stored in reference["results"].items():
        if stored.get("opentad_fails"):
            continue
        annotations, detections = inputs(reference, stored["case"], tmp_path)
        ours = average_recall(
            annotations.subset(stored["subset"]),
            detections,
            stored["tiou_thresholds"],
            most=stored["max_avg_nr_proposals"],
            blocked=load("map")["blocked_videos"] if "blocked" in name else (),
        )
        assert ours.recall == pytest.approx(stored["recall"].numpy(), abs=EXACT), name
        assert ours.proposals == pytest.approx(stored["proposals_per_video"].numpy(), abs=EXACT), name
        assert ours.area == pytest.approx(stored["AUC"], abs=EXACT), name
        for count, value in stored["AR"].items():
            assert ours.at(int(count)) == pytest.approx(value, abs=EXACT), name
        checked += 1
    assert checked > 10


def test_recall_at_k_is_opentads(reference, tmp_path):
    for case, stored in reference["topk"].items():
        annotations, detections = inputs(reference, case, tmp_path)
        annotations = annotations.subset(stored["subset"])
        ours = recall_at(annotations, detections, stored["tiou_thresholds"], stored["top_k"])
        assert ours == pytest.approx(stored["recall"].numpy(), abs=EXACT), case
        assert ours.mean(2) == pytest.approx(stored["mean_recall"].numpy(), abs=EXACT)
        result = evaluate(annotations, detections, stored["tiou_thresholds"])
        assert result.classes == tuple(stored["classes"])
        assert result.average == pytest.approx(stored["average_mAP"], abs=EXACT)


def test_by_hand():
    annotations = truth(("v", [("a", 0, 10), ("b", 20, 30)]), ("w", [("a", 0, 10)]))
    results = found(("v", "b", 0, 10, 0.9), ("v", "b", 20, 28, 0.8), ("w", "a", 50, 60, 0.7), ("w", "a", 0, 10, 0.6))
    # one proposal a video reaches one segment of three, two reach all where 0.8 of a segment is enough
    ours = average_recall(annotations, results, (0.5, 0.9), most=2)
    assert ours.recall == pytest.approx(np.array([[1 / 3, 1.0], [1 / 3, 2 / 3]]))
    assert ours.proposals == pytest.approx([1, 2])
    assert ours.at(2) == pytest.approx(5 / 6)
    assert ours.area == pytest.approx((1 / 3 + 5 / 6) / 2 / 2)
    at = recall_at(annotations, results, (0.5,), (1, 2))
    assert at[0].tolist() == [[0.0, 0.0], [0.5, 1.0]]  # of class a in v nothing is detected
    assert "AR@100     83.33" in summary(annotations, results, (0.5, 0.9))


def test_nothing_found_is_no_recall():
    annotations = truth(("v", [("a", 0, 10)]))
    assert not average_recall(annotations, {}).recall.any()
    assert average_recall(annotations, {}).area == 0
    assert not recall_at(annotations, {}, ACTIVITYNET, (1,)).any()
    assert not average_recall(truth(("v", [])), found(("v", "a", 0, 1, 0.5))).recall.any()
    assert not average_recall(annotations, found(("v", "a", 0, 10, 0.5)), blocked=("v",)).recall.any()


spans = st.tuples(st.integers(0, 40), st.integers(1, 20)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(deadline=None)
@given(st.lists(spans, min_size=1, max_size=5, unique=True), st.lists(spans, max_size=12), st.integers(1, 3))
def test_recall_at_k_is_a_plain_loop(segments, detected, k):
    annotations = truth(("v", [("a", *span) for span in segments]))
    results = found(*(("v", "a", *span, 1 - i / 20) for i, span in enumerate(detected)))

    def overlap(a, b):
        meet = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return meet / (a[1] - a[0] + b[1] - b[0] - meet)

    best = detected[: k * len(segments)]
    reached = sum(any(overlap(s, d) >= 0.5 for d in best) for s in segments)
    assert recall_at(annotations, results, (0.5,), (k,))[0, 0, 0] == pytest.approx(reached / len(segments))
