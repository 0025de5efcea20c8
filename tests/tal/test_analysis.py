"""Analyses of errors: by hand, against the evaluation where the two must agree, and as files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_cli_own import run
from test_evaluation import DATA, _tied, detections, found, lengths, needs_data, places, truth

from benchmarks.tal import detection_files
from benchmarks.tal.analysis import EDGES, KINDS, analyse, quantiles
from benchmarks.tal.annotations import parse
from benchmarks.tal.config import ConfigError
from benchmarks.tal.evaluation import THUMOS, evaluate

NONE = {"length": ()}


def test_kinds_of_errors_by_hand():
    annotations = truth(("v", [("a", 0, 10), ("b", 20, 30)]))
    results = found(
        ("v", "a", 0, 10, 0.9),  # right
        ("v", "a", 0, 9, 0.8),  # double
        ("v", "a", 20, 30, 0.7),  # label
        ("v", "a", 5, 20, 0.6),  # place
        ("v", "a", 25, 50, 0.5),  # confusion
        ("v", "a", 60, 70, 0.4),  # background
        ("w", "a", 0, 10, 0.3),  # background: not a video that is evaluated
    )
    ours = analyse(annotations, results, (0.5, 0.95), NONE)
    assert ours.profile[:7].tolist() == np.eye(len(KINDS))[[0, 1, 2, 3, 4, 5, 5]].tolist()
    assert not ours.profile[7:].any()
    assert ours.map == pytest.approx(0.5)  # class b is missed
    assert ours.missed == pytest.approx(0.5)
    assert not any(ours.gains.values())  # what is right comes first
    strict = analyse(annotations, results, (0.5, 0.95), NONE, 0.95)
    assert strict.profile[1].tolist() == np.eye(len(KINDS))[3].tolist()  # 0.9 of a segment is no double, but misplaced


def test_what_is_false_costs_what_it_gains_to_leave_out():
    annotations = truth(("v", [("a", 0, 10)]))
    results = found(("v", "a", 50, 60, 0.9), ("v", "a", 4, 14, 0.8), ("v", "a", 0, 10, 0.7))
    ours = analyse(annotations, results, (0.5,), NONE)
    assert ours.map == pytest.approx(1 / 3)
    assert {kind: gain for kind, gain in ours.gains.items() if gain} == pytest.approx(
        {"place": 1 / 2 - 1 / 3, "background": 1 / 2 - 1 / 3}
    )


def test_parts_of_the_segments():
    segments = [("a", 0, 2), ("a", 10, 30), ("b", 50, 52)]
    annotations = truth(("v", segments), ("w", [("b", 0, 2)]))
    results = found(("v", "a", 0, 2, 0.9), ("v", "a", 80, 90, 0.8), ("v", "b", 50, 52, 0.7))
    edges = {"coverage": (0.1,), "length": (2, 5), "instances": (1,)}
    parts = {(p.trait, p.name): p for p in analyse(annotations, results, (0.5,), edges).parts}
    assert {name: (p.segments, round(p.missed, 3)) for name, p in parts.items()} == {
        ("coverage", "up to 0.1"): (3, 0.333),
        ("coverage", "above 0.1"): (1, 1.0),
        ("length", "up to 2"): (3, 0.333),
        ("length", "2 to 5"): (0, 0.0),
        ("length", "above 5"): (1, 1.0),
        ("instances", "up to 1"): (2, 0.5),
        ("instances", "above 1"): (2, 0.5),
    }
    assert parts["length", "above 5"].map == 0
    assert parts["length", "up to 2"].map == pytest.approx((1 + 1 / 2) / 2)  # a is found, b half
    assert quantiles(annotations, 2) == {"coverage": (0.02,), "length": (2.0,), "instances": (1.5,)}


alike = st.lists(st.tuples(places, lengths, places, lengths), min_size=1, max_size=5)


@settings(deadline=None, max_examples=50)
@given(alike, detections, st.randoms(use_true_random=False))
def test_classes_of_one_size_need_no_normalising(items, rows, random):
    segments = [(c, s, s + n) for a, m, b, n in items for c, s, n in (("a", a, m), ("b", b, n))]
    annotations = truth(("v0", segments), ("v1", []))
    scores = random.sample(range(1000), len(rows))
    results = found(*((v, c, s, s + n, score) for (v, c, s, n), score in zip(rows, scores, strict=True)))
    assume(not _tied(annotations, results))
    result = evaluate(annotations, results, THUMOS)
    assume(result.segments == (len(items), len(items)))
    assert analyse(annotations, results, THUMOS, NONE).map == pytest.approx(result.average, abs=1e-12)


@needs_data
def test_published_detections(tmp_path):
    folder = f"{DATA}/detections/stpn_thumos14"
    read = parse(f"{folder}/gt.json", subsets=None, durations=False)[0]
    edges = {trait: ends for trait, ends in EDGES["thumos14"].items() if trait != "coverage"}  # it has no durations
    ours = analyse(read, detection_files.plain(Path(f"{folder}/results.json")), (0.1, 0.5), edges)
    assert ours.profile[0].sum() == pytest.approx(1)
    assert ours.profile[0, 0] > ours.profile[1, 0] > ours.profile[2, 0]  # the better the score, the more are right
    by_length = [part.map for part in ours.parts if part.trait == "length"]
    assert by_length[0] < by_length[2]  # the shortest are found worst
    assert min(ours.gains.values()) >= 0


def test_at_the_command_line(tmp_path):
    entry = {"subset": "test", "duration": 90, "annotations": [{"label": "a", "segment": [0, 10]}]}
    (tmp_path / "t.json").write_text(json.dumps({"database": {"v": entry}}))
    (tmp_path / "d.txt").write_text("v 50 60 a 0.9\nv 0 10 a 0.5\n")
    place = [f"data.root={tmp_path}", "data.annotations=t.json", "data.classes=null", "data.test_subset=test"]
    given = ["analyse", "--config", "thumos14", "--predictions", tmp_path / "d.txt", "--output", tmp_path / "o"]
    said = run(*given, *place, "--edges", "thumos14")
    assert "Normalised mAP, 50.00, without what is false" in said
    assert "background  +50.00" in said
    written = json.loads((tmp_path / "o/analysis.json").read_text())
    assert written["profile"][0]["background"] == 1
    assert (tmp_path / "o/analysis.png").stat().st_size > 10_000
    page = (tmp_path / "o/analysis.html").read_text()
    assert page.count("<table>") == 3
    assert "data:image/png;base64," in page
    with pytest.raises(ConfigError, match="--edges: got 'x'; expected equal, thumos14, activitynet"):
        run(*given, *place, "--edges", "x")
    with pytest.raises(ConfigError, match=r"--threshold: got 0.2; expected one of"):
        run(*given, *place, "--threshold", 0.2)
