"""mAP: against a plain loop on random detections, OpenTAD's figures and published ones; malformed detections by their
place.
"""

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.tal.annotations import AnnotationError, Annotations, Segment, Video
from benchmarks.tal.evaluation import ACTIVITYNET, THUMOS, PredictionError, average_precision, evaluate
from benchmarks.tal.segments.overlap import iou

DATA = os.environ.get("REVWIRE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs published detections: set REVWIRE_DATA")


def truth(*videos, classes=("a", "b")):
    """Annotations of (id, [(class, start, end), …])."""
    return Annotations(
        tuple(
            Video(name, "validation", 100.0, tuple(Segment(s, e, classes.index(label)) for label, s, e in segments))
            for name, segments in videos
        ),
        tuple(classes),
    )


def found(*rows):
    """Detections of (video, class, start, end, score)."""
    results = {}
    for name, label, start, end, score in rows:
        results.setdefault(name, []).append({"label": label, "segment": [start, end], "score": score})
    return results


def plain(annotations, results, threshold):
    """AP of each class at one threshold, by the definition: one detection after the other."""
    aps = {}
    for label, name in enumerate(annotations.classes):
        free = {v.id: [(s.start, s.end) for s in v.segments if s.label == label] for v in annotations.videos}
        count = sum(map(len, free.values()))
        rows = sorted(
            ((d["score"], v, *d["segment"]) for v, items in results.items() for d in items if d["label"] == name),
            key=lambda r: -r[0],
        )
        right, precisions = 0, []
        for i, (_, v, start, end) in enumerate(rows, 1):
            overlaps = []
            for s, e in free.get(v, []):
                meet = max(0.0, min(e, end) - max(s, start))
                overlaps.append(((meet / max((end - start) + (e - s) - meet, 1e-8)), (s, e)))
            overlaps = [o for o in overlaps if o[0] >= threshold]
            if overlaps:
                free[v].remove(max(overlaps)[1])
                right += 1
            precisions.append((right, right / i))
        if count:
            # the area under the highest precision at each recall or above it
            aps[name] = sum(max((p for r, p in precisions if r >= k), default=0.0) for k in range(1, count + 1)) / count
    return aps


# Odd widths and positions: no two overlaps are equal, so the order of ties does not matter.
labels = st.sampled_from("ab")
places = st.floats(0, 90, allow_nan=False, width=32)
lengths = st.floats(0.015625, 40, width=32)
segments = st.lists(st.tuples(labels, places, lengths), max_size=8)
detections = st.lists(st.tuples(st.sampled_from(["v0", "v1", "elsewhere"]), labels, places, lengths), max_size=25)


@settings(deadline=None)
@given(segments, segments, detections, st.randoms(use_true_random=False))
def test_it_is_the_plain_loop(first, second, rows, random):
    annotations = truth(*((f"v{i}", [(c, s, s + n) for c, s, n in items]) for i, items in enumerate((first, second))))
    scores = random.sample(range(1000), len(rows))
    results = found(*((v, c, s, s + n, score) for (v, c, s, n), score in zip(rows, scores, strict=True)))
    assume(not _tied(annotations, results))
    result = evaluate(annotations, results, THUMOS)
    assume(
        sum(result.segments) == sum(len(v.segments) for v in annotations.videos)
    )  # repeated annotations do not count
    for row, threshold in enumerate(THUMOS):
        expected = plain(annotations, results, threshold)
        assert dict(zip(result.classes, result.ap[row], strict=True)) == pytest.approx(expected, abs=1e-12)


def _tied(annotations, results):
    """Whether some detection overlaps two segments equally."""
    for v in annotations.videos:
        spans = np.array([(s.start, s.end) for s in v.segments]).reshape(-1, 2)
        for d in results.get(v.id, []):
            values = iou(np.array(d["segment"]), spans)
            values = np.sort(values[values > 0])
            if len(values) > 1 and np.diff(values).min() < 1e-9:
                return True
    return False


@settings(deadline=None)
@given(segments, st.floats(0.1, 1))
def test_the_truth_itself_scores_one(items, score):
    annotations = truth(("v0", [(c, s, s + n) for c, s, n in items]))
    result = evaluate(annotations, found(*(("v0", c, s, s + n, score) for c, s, n in items)))
    assume(sum(result.segments) == len(items))  # what repeats another does not count
    assert (result.ap == 1.0).all()
    assert result.average == (1.0 if items else 0.0)


@settings(deadline=None)
@given(segments, detections)
def test_scores_count_by_their_order_alone(items, rows):
    annotations = truth(("v0", [(c, s, s + n) for c, s, n in items]))
    one = found(*((v, c, s, s + n, i + 1) for i, (v, c, s, n) in enumerate(rows)))
    two = found(*((v, c, s, s + n, np.exp(i / 10) - 9) for i, (v, c, s, n) in enumerate(rows)))
    assert (evaluate(annotations, one).ap == evaluate(annotations, two).ap).all()


@settings(deadline=None)
@given(segments, detections)
def test_a_false_detection_below_all_changes_nothing(items, rows):
    annotations = truth(("v0", [(c, s, s + n) for c, s, n in items]))
    results = found(*((v, c, s, s + n, i + 1) for i, (v, c, s, n) in enumerate(rows)))
    before = evaluate(annotations, results)
    results.setdefault("elsewhere", []).extend({"label": c, "segment": [0, 1], "score": 0.5} for c in "ab")
    assert (evaluate(annotations, results).ap == before.ap).all()


def test_by_hand():
    annotations = truth(("v", [("a", 0, 10), ("a", 20, 30)]))
    # overlaps 1, 0.8 with a segment that is taken, 0.6
    results = found(("v", "a", 0, 10, 0.9), ("v", "a", 0, 8, 0.8), ("v", "a", 24, 30, 0.7))
    result = evaluate(annotations, results, (0.5, 0.7))
    assert result.ap[:, 0].tolist() == [pytest.approx((1 + 2 / 3) / 2), 0.5]
    assert (result.classes, result.segments, result.detections) == (("a",), (2,), (3,))
    assert result.at(0.7) == 0.5
    assert result.average == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert "mAP@0.70   50.00" in str(result)
    assert result.to_dict()["map"] == {"0.5": pytest.approx(5 / 6), "0.7": 0.5}


def test_the_next_best_segment_is_taken_when_the_best_is():
    annotations = truth(("v", [("a", 0, 10), ("a", 1, 10.5)]))
    results = found(("v", "a", 0, 10, 0.9), ("v", "a", 0, 9.9, 0.8))
    assert evaluate(annotations, results, (0.5,)).average == 1.0


def test_average_precision_of_nothing_is_zero():
    assert average_precision(np.zeros((2, 0), dtype=bool), 3).tolist() == [0, 0]


def test_what_is_left_out_is_said():
    annotations = truth(("v", [("a", 0, 10)]), ("w", [("b", 0, 10)]))
    results = found(
        ("v", "c", 0, 1, 0.5),
        ("u", "a", 0, 1, 0.5),
        ("v", "a", 3, 2, 0.4),
        ("v", "a", 0, 10, 0.3),
        ("w", "b", 0, 10, 1),
    )
    result = evaluate(annotations, results, (0.5,), blocked=["w"])
    assert (result.classes, result.other_labels, result.other_videos, result.without_length) == (
        ("a",),
        {"c": 1},
        {"u": 1},
        1,
    )
    assert result.average == pytest.approx(1 / 3)
    for said in (
        "no segment is labelled 'c'",
        "1 detections lie in 1 videos that are not evaluated",
        "1 detections do not end after",
    ):
        assert said in str(result)


GOOD = {"label": "a", "segment": [0.0, 1.0], "score": 1.0}
TWO = truth(("v_one", [("a", 0, 10)]), ("two", [("a", 0, 10)]), ("three", []))


@pytest.mark.parametrize("name", ["one", "v_one"])
def test_ids_are_the_same_with_and_without_their_prefix(name):
    result = evaluate(TWO, {name: [GOOD | {"segment": [0, 10]}], "v_two": [], "three": []}, (0.5,))
    assert (result.average, result.other_videos, result.missed) == (0.5, {}, 0)
    assert evaluate(TWO, {name: [GOOD | {"segment": [0, 10]}]}, (0.5,), blocked=["v_two"]).average == 1
    with pytest.raises(PredictionError, match="video 'one': it is there already, as 'v_one'"):
        evaluate(TWO, {"v_one": [], "one": []})


def test_videos_without_detections_count_as_missed():
    found_one = {"one": [GOOD | {"segment": [0, 10]}]}
    result = evaluate(TWO, found_one, (0.5,))
    assert (result.average, result.missed, result.videos) == (0.5, 2, 3)
    assert "2 of 3 test videos are not among the detections: they count as missed" in str(result)
    assert result.to_dict()["missed"] == 2
    alone = evaluate(TWO, found_one, (0.5,), only_found=True)
    assert (alone.average, alone.missed, alone.videos) == (1.0, 0, 1)


def test_the_text_of_thumos_is_read(tmp_path):
    annotations = truth(("one", [("Diving", 0, 10)]), ("two", [("GolfSwing", 0, 10)]), classes=("Diving", "GolfSwing"))
    path = tmp_path / "d.txt"
    path.write_text("one 0.0 10.0 26 0.9\n\ntwo\t0 9 GolfSwing 1e-1\n")
    assert evaluate(annotations, path, (0.9,)).average == 1
    path.write_text("one 0.0 10.0 26\n")
    with pytest.raises(PredictionError, match=r"d.txt: line 1: expected five fields: video, start and end in seconds"):
        evaluate(annotations, path)
    path.write_text("one 0.0 10.0 3 0.5\n")
    with pytest.raises(PredictionError, match=r"line 1: class 3 is none of THUMOS-14's 20 \(7, 9, 12"):
        evaluate(annotations, path)
    path.write_text("one 0.0 ten 26 0.5\n")
    with pytest.raises(PredictionError, match=r"video 'one', detection 0: its segment is \['0.0', 'ten'\]"):
        evaluate(annotations, path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(PredictionError, match=r"none.json: it cannot be read \(No such file or directory\)"):
        evaluate(TWO, tmp_path / "none.json")


def test_scores_and_segments_may_be_tensors():
    results = {"v": [{"label": "a", "segment": torch.tensor([0.0, 10.0]), "score": torch.tensor(0.5)}]}
    assert evaluate(truth(("v", [("a", 0, 10)])), results).average == 1.0


MALFORMED = {
    "no score": ({"label": "a", "segment": [0, 1]}, "it has no 'score'"),
    "nothing": ({}, "it has no 'segment' and no 'label' and no 'score'"),
    "nan": ({**GOOD, "score": float("nan")}, "its score is nan; expected a finite number"),
    "word": ({**GOOD, "score": "high"}, "its score is 'high'"),
    "short": ({**GOOD, "segment": [1]}, r"its segment is \[1\]; expected \[start, end\], two finite numbers"),
    "endless": ({**GOOD, "segment": [1, float("inf")]}, r"its segment is \[1, inf\]"),
    "label": ({**GOOD, "label": 3}, "its label is 3; expected the name of a class"),
    "list": ([0, 1, "a", 0.5], "expected an object with 'segment', 'label' and 'score'"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_detections_are_named(tmp_path, name):
    item, message = MALFORMED[name]
    results = {"u": [GOOD], "v": [GOOD, GOOD, item]}
    annotations = truth(("v", [("a", 0, 10)]))
    with pytest.raises(PredictionError, match=f"^detections: video 'v', detection 2: {message}"):
        evaluate(annotations, results)
    path = tmp_path / "d.json"
    path.write_text(json.dumps({"results": results}))
    with pytest.raises(PredictionError, match=re.escape(str(path)) + f": video 'v', detection 2: {message}"):
        evaluate(annotations, path)


def test_all_malformed_detections_are_counted():
    with pytest.raises(PredictionError, match="30 faults") as raised:
        evaluate(truth(("v", [("a", 0, 10)])), {"v": [{}] * 30})
    assert len(raised.value.faults) == 30


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "'results'"),
        ("{}", "'results'"),
        ('{"results": []}', "by the ids of videos, got list"),
    ],
)
def test_another_file_altogether(tmp_path, text, message):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(PredictionError, match=message):
        evaluate(truth(("v", [("a", 0, 10)])), path)


def test_detections_that_are_no_list():
    with pytest.raises(PredictionError, match="video 'v': expected a list of detections, got 'x'"):
        evaluate(truth(("v", [("a", 0, 10)])), {"v": "x"})


def test_a_truth_with_faults_is_not_scored(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"database": {"v": {"subset": "test", "annotations": [{"label": "a"}]}}}))
    with pytest.raises(AnnotationError, match="video 'v', annotation 0: expected an object with 'label' and 'segment'"):
        evaluate(path, {})


@needs_data
def test_the_official_oracle_scores_one():
    root = Path(DATA, "activitynet13")
    result = evaluate(
        root / "activity_net.v1-3.rebuilt.json",
        root / "official_sample_detection_prediction.json",
        ACTIVITYNET,
        subset="validation",
    )
    assert (result.ap == 1.0).all()
    assert len(result.classes) == 200
    assert result.average == 1.0


@needs_data
def test_published_detections_score_as_published():
    root = Path(DATA, "detections/stpn_thumos14")
    result = evaluate(root / "gt.json", root / "results.json", [i / 10 for i in range(1, 10)], subset="test")
    assert 100 * result.map == pytest.approx([52.12, 44.20, 34.70, 26.06, 17.70, 10.09, 4.99, 1.34, 0.10], abs=0.01)


@needs_data
def test_opentad_finds_the_same(tmp_path):
    reference = torch.load(Path(DATA, "opentad_reference/map.pt"), weights_only=True)
    checked = 0
    for key, expected in reference["results"].items():
        case = expected["case"]
        if case == "external":
            folder = Path(DATA, "detections/stpn_thumos14")
            gt, detected = folder / "gt.json", folder / "results.json"
        else:
            texts = reference["inputs"]["random" if case.startswith("random") else case]
            gt, detected = tmp_path / "gt.json", json.loads(texts["det_json"])
            gt.write_text(texts["gt_json"])
        blocked = reference["blocked_videos"] if "blocked" in case else ()
        result = evaluate(gt, detected, expected["tiou_thresholds"], subset=expected["subset"], blocked=blocked)
        assert result.classes == tuple(expected["classes"])
        assert result.segments == tuple(expected["gt_per_class"])
        # Where many scores are equal the reference's own figure moves by so much with the order of the file.
        slack = expected["max_ap_change_under_permutation"] if case.startswith("ties") else 1e-6
        if slack is not None:
            assert np.abs(result.ap - expected["ap"].numpy()).max() <= slack, key
            assert abs(result.average - expected["average_mAP"]) <= slack, key
            checked += 1
    assert checked == len(reference["results"]) - 2  # the spread of ties is known at one set of thresholds


def test_nothing_is_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(truth(), {}).average == 0.0
        assert evaluate(truth(("v", [("a", 0, 1)])), {}).average == 0.0
