"""THUMOS-14's own protocol: by hand, and by a plain loop over events, as its toolkit goes."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli_own import run
from test_evaluation import DATA, detections, found, needs_data, segments, truth

from benchmarks.tal.annotations import AnnotationError, parse
from benchmarks.tal.config import ConfigError
from benchmarks.tal.evaluation import THUMOS, evaluate
from benchmarks.tal.thumos import marked

STPN = f"{DATA}/detections/stpn_thumos14"


def overlap(a, b):
    meet = min(a[1], b[1]) - max(a[0], b[0])
    return meet / (max(a[1], b[1]) - min(a[0], b[0])) if meet > 0 else 0.0


def plain(annotations, results, threshold):
    """AP of each class: videos by name, in each the detections by score, and every segment in turn takes one."""
    aps = {}
    for label, name in enumerate(annotations.classes):
        flags, count = [], 0
        for video in sorted({*results, *(v.id for v in annotations.videos)}):
            entry = annotations.video(video)
            true = [(s.start, s.end) for s in entry.segments if s.label == label] if entry else []
            doubtful = entry.doubtful if entry else ()
            rows = sorted((d for d in results.get(video, ()) if d["label"] == name), key=lambda d: -d["score"])
            taken = [False] * len(rows)
            for segment in true:
                free = [(-overlap(segment, d["segment"]), i) for i, d in enumerate(rows) if not taken[i]]
                if free and -min(free)[0] > threshold:
                    taken[min(free)[1]] = True
            count += len(true)
            for right, row in zip(taken, rows, strict=True):
                if right or not any(overlap(span, row["segment"]) > 0 for span in doubtful):
                    flags.append((row["score"], right))
        if count:
            ordered = [right for _, right in sorted(flags, key=lambda f: -f[0])]
            precisions = [sum(ordered[: i + 1]) / (i + 1) for i, right in enumerate(ordered) if right]
            aps[name] = sum(precisions) / count
    return aps


@settings(deadline=None, max_examples=60)
@given(segments, segments, detections, st.lists(st.integers(0, 5), min_size=25, max_size=25))
def test_it_is_the_plain_loop(first, second, rows, scores):
    annotations = truth(
        *((f"v{i}", [(c, s, s + n) for c, s, n in items]) for i, items in enumerate((first, second))), ("w", [])
    )
    doubtful = {"v0": ((10.0, 12.0),), "v1": ()}
    videos = tuple(v.__class__(**{**vars(v), "doubtful": doubtful.get(v.id, ())}) for v in annotations.videos)
    annotations = annotations.__class__(videos, annotations.classes)
    results = found(*((v, c, s, s + n, score) for (v, c, s, n), score in zip(rows, scores, strict=False)))
    ours = evaluate(annotations, results, THUMOS, protocol="thumos14")
    for row, threshold in enumerate(THUMOS):
        expected = plain(annotations, results, threshold)
        assert dict(zip(ours.classes, ours.ap[row], strict=True)) == pytest.approx(expected, abs=1e-12)


def test_by_hand(tmp_path):
    annotations = truth(("v", [("a", 0, 10), ("a", 0, 10), ("a", 50, 60)]))
    results = found(("v", "a", 90, 99, 0.9), ("v", "a", 0, 10, 0.8), ("v", "a", 0, 9, 0.7), ("v", "a", 50, 55, 0.6))
    # the first is false; a second segment at 0 counts, and takes the third; half of a segment is not more than a half
    assert evaluate(annotations, results, (0.5,), protocol="thumos14").average == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert evaluate(annotations, results, (0.4,), protocol="thumos14").average == pytest.approx(
        (1 / 2 + 2 / 3 + 3 / 4) / 3
    )
    path = tmp_path / "Ambiguous_test.txt"
    path.write_text("v_v  95.0 96.0\n\nelsewhere 1 2\n")  # what is false there does not count
    doubtful = marked(annotations, path)
    assert evaluate(doubtful, results, (0.5,), protocol="thumos14").average == pytest.approx(2 / 3)
    assert evaluate(doubtful, results, (0.5,)).average == evaluate(annotations, results, (0.5,)).average
    path.write_text("v 95.0\n")
    with pytest.raises(AnnotationError, match="line 1: expected a video, and its start and end in seconds; got 'v 95"):
        marked(annotations, path)
    with pytest.raises(AnnotationError, match=r"none.txt: it cannot be read"):
        marked(annotations, tmp_path / "none.txt")


def test_ambiguous_segments_of_annotations_stand_apart(tmp_path):
    actions = [{"label": "a", "segment": [0, 1]}, {"label": "Ambiguous", "segment": [2, "3"]}]
    entry = {"subset": "test", "duration": 9, "annotations": actions}
    (tmp_path / "t.json").write_text(json.dumps({"database": {"v": entry}}))
    read, faults = parse(tmp_path / "t.json")
    assert (read.classes, read.videos[0].doubtful, faults) == (("a",), ((2.0, 3.0),), ())


@needs_data
def test_published_detections(tmp_path):
    """Those figures are published by ActivityNet's protocol; THUMOS's is stricter, most where much is found."""
    thresholds = np.arange(1, 10) / 10
    by_activitynet = evaluate(f"{STPN}/gt.json", f"{STPN}/results.json", thresholds)
    by_thumos = evaluate(f"{STPN}/gt.json", f"{STPN}/results.json", thresholds, protocol="thumos14")
    assert 100 * by_activitynet.map == pytest.approx([52.12, 44.2, 34.7, 26.06, 17.7, 10.09, 4.99, 1.34, 0.1], abs=6e-3)
    annotations = parse(f"{STPN}/gt.json", subsets=None, durations=False)[0]
    results = json.loads(Path(f"{STPN}/results.json").read_text())["results"]
    for row in (0, 4):
        assert by_thumos.map[row] == pytest.approx(np.mean(list(plain(annotations, results, thresholds[row]).values())))
    assert (by_thumos.map < by_activitynet.map).all()


def test_at_the_command_line(tmp_path):
    annotations = {"v": {"subset": "test", "duration": 9, "annotations": [{"label": "a", "segment": [0, 1]}]}}
    (tmp_path / "t.json").write_text(json.dumps({"database": annotations}))
    (tmp_path / "d.txt").write_text("v 5 6 a 0.9\nv 0 1 a 0.5\n")
    (tmp_path / "Ambiguous_test.txt").write_text("v 5.5 7\n")
    place = [f"data.root={tmp_path}", "data.annotations=t.json", "data.classes=null", "data.test_subset=test"]
    given = ["evaluate", "--config", "thumos14_i3d_tridet", "--protocol", "thumos14", *place]
    scored = [*given, "--predictions", tmp_path / "d.txt"]
    assert "average    50.00" in run(*scored)
    assert "average   100.00" in run(*scored, "--ambiguous", tmp_path / "Ambiguous_test.txt")
    with pytest.raises(ConfigError, match="got a checkpoint; expected --predictions"):
        run(*given)
