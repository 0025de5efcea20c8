"""The command line where videos are missing, where they are one's own, and where something is wrong: all figures agree,
a checkpoint is enough, and what is wrong is one line.
"""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("typer")

from test_cli_tal import SHORT, run

from benchmarks.tal import __main__ as cli
from benchmarks.tal import runs
from benchmarks.tal.config import load


def changes(place):
    return [f"data.root={place}", f"output={place / 'runs'}", *SHORT, "backbone.options.drop_path_rate=0.0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn videos, three of them for testing, of which one lies elsewhere; and a trained run."""
    place = tmp_path_factory.mktemp("own")
    run("synthesize", "--output", place, "--videos", 9, "--size", 24, "--quiet")
    database = json.loads((place / "annotations.json").read_text())["database"]
    gone = next(name for name, video in database.items() if video["subset"] == "validation")
    (place / "elsewhere").mkdir()
    shutil.move(next((place / "videos").glob(f"*{gone}.*")), place / "elsewhere")
    said = run("train", "--config", "synthetic", "--quiet", *changes(place))
    assert "1 of 3 test videos have no file: they count as missed" in said
    return place


def figures(said):
    return {line.split()[0]: float(line.split()[1]) for line in said.splitlines() if re.match(r"mAP|average", line)}


@pytest.fixture(scope="module")
def scored(folder):
    """A file of detections that is right in all videos that are there."""
    database = json.loads((folder / "annotations.json").read_text())["database"]
    there = {p.stem.removeprefix("v_") for p in (folder / "videos").iterdir()}
    results = {
        name: [a | {"score": 1.0} for a in video["annotations"]]
        for name, video in database.items()
        if name.removeprefix("v_") in there and video["subset"] == "validation"
    }
    path = folder / "right.json"
    path.write_text(json.dumps({"results": results}))
    return path


# -- all videos of the subset count ------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_found", [False, True])
def test_all_figures_are_of_the_same_videos(folder, scored, tmp_path, monkeypatch, only_found):
    """Training's record, a test, its detections scored, and what is drawn, where a third of the videos is missing."""
    right = json.loads(scored.read_text())["results"]
    monkeypatch.setattr(runs.Scorer, "results", lambda self: right)
    option = ["--only-found"] if only_found else []
    place = [*changes(folder), f"output={tmp_path}", "training.steps=1"]
    trained = run("train", "--config", "synthetic", "--quiet", *option, *place)
    record = json.loads(trained[trained.index("[") : trained.rindex("]") + 1])[0]["figures"]
    tested = run("evaluate", "--config", "synthetic", "--quiet", *option, *place)
    again = run("evaluate", "--config", "synthetic", "--predictions", scored, *option, *place)
    curves = []
    monkeypatch.setattr("benchmarks.tal.report.map_curve", lambda curve, path: curves.append(*curve.values()))
    drawn = run("plot", "--config", "synthetic", "--predictions", scored, "--output", tmp_path, *option, *place)
    for said, name in (
        (trained, "have no file"),
        (tested, "have no file"),
        (again, "are not among"),
        (drawn, "are not"),
    ):
        assert (f"1 of 3 test videos {name}" in said and "they count as missed" in said) == (not only_found)
    half = {round(100 * record["mAP@0.50"], 2), figures(tested)["mAP@0.50"], figures(again)["mAP@0.50"]}
    assert half == {round(100 * curves[0]["0.5"], 2)}
    assert (half == {100.0}) == only_found
    assert max(half) > 20


def test_features_that_are_missing_count_as_missed(folder, tmp_path):
    features = tmp_path / "features"
    features.mkdir()
    for video in list(json.loads((folder / "annotations.json").read_text())["database"])[:-2]:
        np.save(features / f"v_{video}.npy", np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32))
    place = [*changes(folder), f"data.features={{path: {features}, channels: 5}}", "sampling.frames=8"]
    said = run("train", "--config", "synthetic", "--quiet", *place, f"output={tmp_path}", "training.steps=1")
    assert re.search(r"[12] of 3 test videos have no features: they count as missed", said)
    checked = run("check", "--config", "synthetic", "--quiet", *place, code=1)
    assert "2 are missing" in checked.replace("1 are missing", "2 are missing")
    assert "not as they should be" in checked


# -- one's own videos --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_all_that_own_videos_need(folder, tmp_path, monkeypatch):
    best = load("synthetic", changes(folder)).folder / "checkpoints" / "best.ckpt"
    alone = shutil.copy(best, tmp_path / "mine.ckpt")
    video = shutil.copy(next((folder / "elsewhere").iterdir()), tmp_path / "holiday.mp4")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REVWIRE_DATA", raising=False)
    said = run("predict", "--checkpoint", alone, "--videos", video, "--quiet")
    results = json.loads((tmp_path / "detections.json").read_text())["results"]
    assert list(results) == ["holiday"]
    assert results["holiday"]
    best_of_all = max(results["holiday"], key=lambda d: d["score"])
    assert f"{best_of_all['score']:.3f}  {best_of_all['label']}" in said
    assert {d["label"] for d in results["holiday"]} <= set(json.loads(_classes(folder)))
    assert (tmp_path / "detections/timeline_holiday.png").stat().st_size > 500
    folder_of_two = tmp_path / "two"
    folder_of_two.mkdir()
    for name in "ab":
        shutil.copy(video, folder_of_two / f"v_{name}.mp4")
    run("predict", "--checkpoint", alone, "--videos", folder_of_two, "--output", "two.json", "--quiet")
    both = json.loads((tmp_path / "two.json").read_text())["results"]
    assert both == {"a": results["holiday"], "b": results["holiday"]}


def _classes(folder):
    database = json.loads((folder / "annotations.json").read_text())["database"].values()
    return json.dumps(sorted({a["label"] for video in database for a in video["annotations"]}))


def test_networks_without_classes_take_them_from_a_file_or_have_none(folder, tmp_path):
    database = json.loads((folder / "annotations.json").read_text())["database"]
    label = json.loads(_classes(folder))[0]
    scores = {name: {"class": label, "score": 0.5} for name in database}
    (tmp_path / "s.json").write_text(json.dumps(scores))
    agnostic = ["class_agnostic=true", f"data.class_scores={tmp_path / 's.json'}", f"output={tmp_path}"]
    run("train", "--config", "synthetic", "--quiet", *changes(folder), *agnostic, "training.steps=1")
    checkpoint = next(tmp_path.rglob("best.ckpt"))
    video = next((folder / "elsewhere").iterdir())
    arguments = ["predict", "--checkpoint", checkpoint, "--videos", video, "--output", tmp_path / "d.json", "--quiet"]
    run(*arguments)
    plain = next(iter(json.loads((tmp_path / "d.json").read_text())["results"].values()))
    assert {d["label"] for d in plain} == {"action"}
    name = video.stem.removeprefix("v_")
    (tmp_path / "own.json").write_text(json.dumps({name: {"class": "a walk", "score": 0.5}}))
    run(*arguments, "--class-scores", tmp_path / "own.json")
    fused = next(iter(json.loads((tmp_path / "d.json").read_text())["results"].values()))
    assert [d | {"score": 2 * d["score"], "label": "action"} for d in fused] == plain
    assert {d["label"] for d in fused} == {"a walk"}


# -- what is wrong -----------------------------------------------------------------------------------------------------


def said_in_one_line(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["tal", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    text = capsys.readouterr().err.strip()
    assert ended.value.code == 2, text
    assert "Traceback" not in text
    return next(line for line in text.splitlines() if line.startswith("error: "))


def rows(folder, name, array):
    (folder / "features").mkdir(exist_ok=True)
    for video in json.loads((folder / "annotations.json").read_text())["database"]:
        np.save(folder / "features" / f"{video}.npy", np.ones((16, 5), np.float32) if array is None else array)
    return "data.features={path: features, channels: 5}", "sampling.frames=8"


BAD = np.full((16, 5), np.nan, np.float32)
WRONG = {
    "an empty subset": (("data.test_subset=testing",), r"data.test_subset: no video is in subset 'testing'; there are"),
    "an unknown coupling": (("memory=bdiaa",), r"got 'bdiaa'"),
    "frames that steps do not divide": (("sampling.steps=7",), r"sampling.frames: expected a whole number of frames"),
    "a label that is not in the map": (("data.classes=[x]",), r"\d+ faults"),
    "a map that is not there": (("data.classes=none.txt",), r"data.classes: got 'none.txt', and there is no"),
    "options that do not fit": (("suppression.sigma=-1.0",), r"suppression: expected max_segments"),
    "no folder of videos": (("data.videos=annotations.json",), r"there is no folder of videos"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_run_that_cannot_be_is_one_line(folder, monkeypatch, capsys, name):
    overrides, message = WRONG[name]
    arguments = ("train", "--config", "synthetic", "--quiet", *changes(folder), *overrides)
    assert re.search(message, said_in_one_line(monkeypatch, capsys, *arguments))


@pytest.mark.parametrize(
    ("array", "overrides", "message"),
    [
        (BAD, (), r"\w+.npy: it holds values that are not finite, in 16 of 16 rows"),
        (np.ones((16, 6), np.float32), (), r"\w+.npy: it has shape \(16, 6\); expected \(rows, 5\)"),
        (np.ones((5, 16), np.float32), (), r"\w+.npy: it is transposed: it has shape \(5, 16\)"),
        (None, ("sampling.frames=16",), r"sampling.frames: expected a row of features for each step, got 16 for 8"),
        (BAD, ("sampling.method=resize", "data.workers=1"), r"\w+.npy: it holds values that are not finite"),
    ],
)
def test_features_that_do_not_fit_are_one_line(folder, tmp_path, monkeypatch, capsys, array, overrides, message):
    shutil.copy(folder / "annotations.json", tmp_path)
    arguments = ("train", "--config", "synthetic", "--quiet", *changes(tmp_path), *rows(tmp_path, "f", array))
    assert re.search(message, said_in_one_line(monkeypatch, capsys, *arguments, *overrides))


def test_files_that_are_not_what_they_should_be_are_one_line(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.json").write_text('{"database": {}}')
    (tmp_path / "thumos.txt").write_text("video_test_0000004 0.2 1.1 23\n")
    torch.save({}, tmp_path / "no.ckpt")
    base, none = ("--config", "synthetic", *changes(folder)), tmp_path / "none.json"
    cases = [
        (("train", *base, f"data.annotations={tmp_path / 'empty.json'}"), "its 'database' holds no video"),
        (("evaluate", *base, "--predictions", none), "none.json: it cannot be read"),
        (
            ("plot", *base, "--predictions", tmp_path / "none.json", "--output", tmp_path),
            "none.json: it cannot be read",
        ),
        (("evaluate", *base, "--predictions", tmp_path / "thumos.txt"), "expected five fields: video, start and end"),
        (("evaluate", *base, "--checkpoint", tmp_path / "no.ckpt"), "it is no checkpoint of a run"),
        (("evaluate", "--checkpoint", "best"), "got 'best' of no run; give --config"),
        (("train", *base, "--resume", "actionformer.levels=1"), "another network: actionformer.levels is 2 there"),
        (("predict", *base, "--videos", folder / "runs"), "there is no video in it"),
        (("predict", *base, "--videos", folder / "annotations.json"), "annotations.json: "),
    ]
    for arguments, message in cases:
        assert message in said_in_one_line(monkeypatch, capsys, *arguments)
