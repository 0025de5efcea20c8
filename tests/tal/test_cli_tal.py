"""The command line, from drawn videos to a picture of detections; and what it says when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")

from tiny import TINY
from typer.testing import CliRunner

from benchmarks.tal import comparison, runs
from benchmarks.tal.__main__ import app, main
from benchmarks.tal.config import ConfigError, load
from benchmarks.tal.evaluation import evaluate

SHORT = (*TINY, "training.steps=2", "training.save_every=1")


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn videos, and a trained run."""
    place = tmp_path_factory.mktemp("cli")
    run("synthesize", "--output", place, "--videos", 9, "--size", 24, "--quiet")
    run("train", "--config", "synthetic", "--quiet", *changes(place))
    return place


def changes(place):
    return [f"data.root={place}", f"output={place / 'runs'}", *SHORT]


def test_a_run_leaves_all_that_is_needed(folder):
    config = load("synthetic", changes(folder))
    names = {str(path.relative_to(config.folder)) for path in config.folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "predictions.json", "checkpoints/step2.ckpt", "csv/version_0/metrics.csv"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    assert load(config.folder / "config.yaml") == config
    header = (config.folder / "csv/version_0/metrics.csv").read_text().splitlines()[0].split(",")
    assert {
        "train/loss",
        "train/classification",
        "train/regression",
        "cost/seconds",
        "cost/memory_mib",
        "test/mAP",
    } <= set(header)
    record = json.loads(next(config.folder.glob("result.*.json")).read_text())
    assert record["status"] == "ok"
    assert record["results"][0]["steps"] == 2
    assert record["config"]["memory"] == "re2tal"


def test_a_checkpoint_is_tested_and_its_detections_score_the_same(folder):
    config = load("synthetic", changes(folder))
    shown = run("evaluate", "--config", "synthetic", "--quiet", *changes(folder))
    assert "mAP@0.50" in shown
    file = config.folder / "predictions.json"
    scored = run("evaluate", "--config", "synthetic", "--predictions", file, "--recall", *changes(folder))
    assert "AR@100 " in scored
    assert "R5@0.50 " in scored
    for line in scored.splitlines():
        if line.startswith("mAP@0.50"):
            assert line.split()[1] == next(x.split()[1] for x in shown.splitlines() if x.startswith("mAP@0.50"))


def test_detections_in_a_folder_of_videos(folder, tmp_path):
    out = tmp_path / "found.json"
    said = run(
        "predict", "--config", "synthetic", "--videos", folder / "videos", "--output", out, "--quiet", *changes(folder)
    )
    assert "detections in 9 videos" in said
    results = json.loads(out.read_text())["results"]
    assert len(results) == 9
    evaluate(folder / "annotations.json", results)  # is of the form that is evaluated
    tested = json.loads((load("synthetic", changes(folder)).folder / "predictions.json").read_text())["results"]
    assert {video: results[video] for video in tested} == tested


def test_pictures(folder, tmp_path):
    predictions = load("synthetic", changes(folder)).folder / "predictions.json"
    said = run(
        "plot",
        "--config",
        "synthetic",
        "--predictions",
        predictions,
        "--output",
        tmp_path,
        "--most",
        1,
        *changes(folder),
    )
    written = [
        Path(line) for line in "".join(said.split("\n")).replace(".png", ".png\n").replace(".html", ".html\n").split()
    ]
    assert sorted(p.suffix for p in written) == [".html", ".png", ".png"]
    assert all(path.stat().st_size > 500 for path in written)


def test_an_audit_names_what_is_missing_and_what_is_corrupt(folder, tmp_path):
    assert "6 videos can be read, 0 are missing" in run("check", "--config", "synthetic", "--quiet", *changes(folder))
    (tmp_path / "annotations.json").write_text((folder / "annotations.json").read_text())
    (tmp_path / "videos").mkdir()
    names = sorted(path.name for path in (folder / "videos").iterdir())
    for name in names[1:]:
        content = (folder / "videos" / name).read_bytes()
        (tmp_path / "videos" / name).write_bytes(content[: 200 if name == names[1] else None])
    said = run("check", "--config", "synthetic", "--quiet", *changes(tmp_path), code=1)
    assert f"missing: {Path(names[0]).stem}" in said
    assert "1 are corrupt or truncated" in said


def test_memory_grows_less_where_activations_are_rebuilt(tmp_path):
    arguments = [*SHORT, "data.root=nowhere", "backbone.options.depths=[4]"]
    said = run(
        "memory",
        "--config",
        "synthetic",
        "--frames",
        "16,32",
        "--memory",
        "stored,re2tal",
        "--output",
        tmp_path,
        *arguments,
    )
    assert "ok" in said
    record = json.loads(next(tmp_path.glob("tal_memory_synthetic.*.json")).read_text())
    peaks = {(row["memory"], row["frames"]): row["peak_bytes"] for row in record["results"]}
    assert peaks["re2tal", 16] < peaks["stored", 16] < peaks["stored", 32]
    assert peaks["re2tal", 32] - peaks["re2tal", 16] < 0.7 * (peaks["stored", 32] - peaks["stored", 16])
    assert (tmp_path / "tal_memory_synthetic.png").stat().st_size > 500


def test_a_comparison_runs_each_variant_with_each_seed_and_goes_on_where_it_stopped(folder, tmp_path, monkeypatch):
    started = []

    outside = subprocess.run

    def here(command, **options):
        if "benchmarks.tal" not in command:
            return outside(command, **options)
        overrides = command[command.index("--quiet") + 1 :]
        started.append(overrides)
        runs.train(load("synthetic", overrides), progress=False)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(comparison.subprocess, "run", here)
    monkeypatch.setattr(
        comparison, "VARIANTS", {name: comparison.VARIANTS[name] for name in ("stored", "re2tal", "frozen")}
    )
    arguments = ["compare", "--config", "synthetic", "--seeds", 1, "--jobs", 1, "--rounds", 1, "--output", tmp_path]
    changed = [*changes(folder), f"output={tmp_path / 'runs'}", "training.steps=1"]
    run(*arguments, *changed)
    run(*arguments, *changed)
    assert len(started) == 3
    record = json.loads(next(tmp_path.glob("tal_synthetic.*.json")).read_text())
    rows = {row["variant"]: row for row in record["results"]}
    assert list(rows) == ["stored", "re2tal", "frozen"]
    assert (
        rows["frozen"]["cost"]["peak_bytes"]
        < rows["re2tal"]["cost"]["peak_bytes"]
        < rows["stored"]["cost"]["peak_bytes"]
    )
    assert rows["stored"]["cost"]["to_stored"]["median"] == 1


# -- the first stage
# -------------------------------------------------------------------------------------------------------


def clip(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 24, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 24, 24, "yuv420p"
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def test_both_stages_from_clips_in_folders_to_a_localizer(folder, tmp_path):
    for i, place in enumerate(("train/a/1", "train/a/2", "train/b c/3", "val/a/4", "val/b c/5")):
        clip(tmp_path / "clips" / f"{place}.mp4", i)
    cut = ("sampling.frames=8", "sampling.short_side=18", "sampling.crop=16", "sampling.stride=1")
    first = [f"data.root={tmp_path}", "data.videos=clips", f"output={tmp_path}", *SHORT[4:], *cut]
    first = [c for c in first if not c.startswith(("actionformer", "sampling.steps"))]
    one = [
        *first,
        "sampling.steps=4",
        "training.precision=32-true",
        "training.accelerator=cpu",
        "data.workers=0",
        "training.batch=2",
    ]
    assert '"top1"' in run("train", "--config", "kinetics", "--quiet", *one)
    weights = runs.latest(load("kinetics", one))
    shown = run("evaluate", "--config", "kinetics", "--quiet", *one)
    assert "top1" in shown
    second = [*changes(folder), f"output={tmp_path}", f"backbone.weights={weights}", "training.steps=1"]
    assert '"mAP"' in run("train", "--config", "synthetic", "--quiet", *second)


def test_features_take_the_place_of_videos(folder, tmp_path):
    (tmp_path / "features").mkdir()
    for video in json.loads((folder / "annotations.json").read_text())["database"]:
        np.save(
            tmp_path / "features" / f"{video}.npy", np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
        )
    features = f"data.features={{path: {tmp_path / 'features'}, channels: 5}}"
    said = run(
        "train",
        "--config",
        "synthetic",
        "--quiet",
        *changes(folder),
        features,
        "sampling.frames=8",
        f"output={tmp_path}",
    )
    assert '"steps": 2' in said


# -- errors
# ----------------------------------------------------------------------------------------------------------------


def test_what_is_wrong_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tal", "train", "--config", "thumos14", "training.stepz=1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err.strip()
        == "error: command line: unknown key 'training.stepz'; did you mean 'training.steps'?"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "data.annotations=none.json",
            r"data.annotations: got 'none.json', and there is no .*none.json; set it, or data.root",
        ),
        ("class_agnostic=true", r"data.class_scores: got None; expected a file of classes, as class_agnostic is true"),
        ("data.features.path=none", r"data.features: got 'none', and there is no"),
        ("training={strategy: fsdp, ema: 0.9}", r"training.ema: got an average of weights that are sharded"),
        ("task=classification", r"expected a folder per class"),
    ],
)
def test_data_that_do_not_fit_are_named(folder, change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        runs.prepared(load("synthetic", [*changes(folder), change]))


@pytest.mark.slow
@pytest.mark.skipif("REVWIRE_DATA" not in os.environ, reason="needs real videos: set REVWIRE_DATA")
def test_real_videos_go_through_all_of_it(tmp_path):
    pytest.importorskip("torchvision")
    config = load(
        "decoding", [f"output={tmp_path}", "sampling.frames=16", "sampling.steps=8", "actionformer.max_steps=8"]
    )
    with pytest.warns(UserWarning, match="passed over 26 faults"):
        record = runs.train(config, progress=False)
    row = record.results[0]
    assert (row["steps"], row["tested_clips"], row["memory"]) == (1, 2, "re2tal")
    assert row["peak_bytes"] > 2**20
    results = json.loads((config.folder / "predictions.json").read_text())["results"]
    assert set(results) == {"GGSY1Qvo990", "ZNVhz7ctTq0"}
