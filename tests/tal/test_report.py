"""Pictures and tables: every segment is drawn where it lies, and a table says what a record holds, and nothing of what
was not run.
"""

import re

import pytest

pytest.importorskip("matplotlib")

from benchmarks.tal import costs, report
from benchmarks.tal import tables as tal_tables
from benchmarks.tal.annotations import Segment, Video
from benchmarks.tal.config import CONFIGS, load

VIDEO = Video("v<1>", "test", 20.0, (Segment(2.0, 6.0, 1),))
FOUND = [
    {"segment": [1.0, 5.0], "label": "jump", "score": 0.25},
    {"segment": [10.0, 20.0], "label": "a & b", "score": 0.75},
    {"segment": [0.0, 1.0], "label": "jump", "score": 0.1},
]


def test_a_timeline_shows_true_segments_and_the_best_detections():
    shown = report.rows(VIDEO, FOUND, ("run", "jump"), most=2)
    assert shown == [
        ("true", 2.0, 6.0, "jump", 1.0),
        ("predicted", 10.0, 20.0, "a & b", 0.75),
        ("predicted", 1.0, 5.0, "jump", 0.25),
    ]


def test_bars_lie_where_segments_lie_and_names_are_escaped(tmp_path):
    png, html = report.timeline(VIDEO, FOUND, ("run", "jump"), tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text()
    places = re.findall(r"left:([\d.]+)%;width:([\d.]+)%", page)
    assert [(float(a), float(b)) for a, b in places] == [(10, 20), (50, 50), (5, 20), (0, 5)]
    assert "v&lt;1&gt;" in page
    assert "<1>" not in page
    assert "a &amp; b, score 0.750: 10.00 to 20.00 s" in page
    same = re.findall(r"background:(#\w+)", page)
    assert same[0] == same[2] == same[3] != same[1]


def test_curves_are_drawn(tmp_path):
    rows = [
        {"memory": m, "frames": f, "peak_bytes": p}
        for m, f, p in (("stored", 16, 2**20), ("stored", 32, None), ("bdia", 16, 2**19))
    ]
    for path in (
        report.memory_curve(rows, tmp_path / "new" / "memory.png"),
        report.map_curve({"a": {"0.5": 0.4, "0.7": 0.2}}, tmp_path / "map.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


def row(variant, seed, half, peak=2**20, seconds=None, ratio=None):
    cost = {"peak_bytes": peak, "seconds": seconds and {"median": seconds}, "to_stored": ratio and {"median": ratio}}
    return {"variant": variant, "seed": seed, "figures": {"mAP@0.50": half, "mAP": half / 2}, "steps": 10, "cost": cost}


def test_a_comparison_is_a_line_per_variant():
    table = tal_tables.comparison(
        [row("stored", 0, 0.5, seconds=1.0, ratio=1.0), row("stored", 1, 0.7), row("frozen", 0, 0.1, None)]
    )
    assert table[1] == ["stored", "60.0", "50.0", "70.0", "30.0", "1.0", "1.000 (1.00×)", "10"]
    assert table[2] == ["frozen", "10.0", "10.0", "", "5.0", "", "", "10"]


def test_what_does_not_fit_is_said():
    rows = [
        {"memory": m, "batch": 1, "frames": f, "peak_bytes": p}
        for m, f, p in (("a", 8, 2**20), ("a", 16, None), ("b", 8, 1), ("b", 16, 2))
    ]
    assert tal_tables.memory(rows)[1] == ["a", "1", "does not fit"]


FIGURE = r"_(re2|adatad)\w+_actionformer|_(i3d|tsp|slowfast|slowfast_verb|slowfast_noun|videomae_h)_\w+$"
"""Names of the recipes of which a figure is published."""


def test_every_recipe_has_a_line_and_nothing_stands_where_nothing_was_run(monkeypatch):
    monkeypatch.setattr(tal_tables, "read", lambda name: [])
    lines = tal_tables.recipes()[1:]
    assert all(line[5:] == ["", "", "", ""] for line in lines)
    localizers = ("actionformer", "tridet", "vsgn")
    recipes = {path.stem for name in localizers for path in CONFIGS.glob(f"*_{name}.yaml")}
    assert {line[0].strip("`") for line in lines} == recipes
    published = {line[0].strip("`"): line[4] for line in lines if line[4]}
    assert set(published) == {name for name in recipes if re.search(FIGURE, name)}


def test_the_most_frames_that_fit_are_found_between_what_fits_and_what_does_not(monkeypatch):
    tried = []

    def measured(variants, **options):
        frames = variants["bdia"].sampling.frames
        assert variants["bdia"].actionformer["max_steps"] == variants["bdia"].sampling.steps == frames // 2
        tried.append(frames)
        return [{"peak_bytes": None if frames > 1300 else 1}]

    monkeypatch.setattr(costs, "measured", measured)
    found = costs.largest(load("thumos14"), "bdia", 1, 256, classes=20)
    assert (found["largest_frames"], found["reason"]) == (1280, None)
    assert tried == [256, 512, 1024, 2048, 1536, 1280]
    monkeypatch.setattr(costs, "measured", lambda *_, **__: [{"peak_bytes": 1}])
    assert (
        costs.largest(load("thumos14"), "bdia", 1, 2**14, classes=20)["reason"] == "no limit was met up to 65536 frames"
    )
