"""The page on one's own videos does what it says: its blocks, in order, on real rallies of badminton."""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("typer")
pytest.importorskip("h5py")

import benchmarks.tal

PAGE = Path(benchmarks.tal.__file__).parent / "own_videos.md"
RALLIES = Path(os.environ.get("REVWIRE_DATA") or "../shared/data") / "badminton"
SHORT = ("training.steps=2", "training.warmup=1", "training.test_every=0", "training.save_every=2")


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf8"), re.DOTALL)


@pytest.mark.skipif(not RALLIES.is_dir(), reason="there are no badminton videos; set REVWIRE_DATA")
def test_the_page_runs_on_rallies(tmp_path, monkeypatch):
    from test_cli_tal import run

    database = json.loads((RALLIES / "rallies_activitynet_style.json").read_text())["database"]
    few = sorted(database, key=lambda name: database[name]["duration"])[:6]
    (tmp_path / "videos").mkdir()
    with (tmp_path / "actions.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["video", "start", "end", "label"])
        for name in few:
            path = next((RALLIES / "videos_320x180").glob(f"{name}.*"))
            (tmp_path / "videos" / path.name).symlink_to(path.resolve())
            table.writerows([name, *a["segment"], a["label"]] for a in database[name]["annotations"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REVWIRE_DATA", raising=False)
    (preparing,) = blocks("python")
    exec(compile(preparing, "own_videos.md", "exec"), {})
    made = json.loads(Path("annotations.json").read_text())["database"]
    for name in few:
        assert made[name]["annotations"] == [
            {"label": a["label"], "segment": a["segment"]} for a in database[name]["annotations"]
        ]
        assert made[name]["duration"] == pytest.approx(database[name]["duration"])
    Path("rallies.yaml").write_text(re.sub("frames: 128\n  steps: 64", "frames: 16\n  steps: 8", blocks("yaml")[0]))
    said = {}
    for line in "".join(blocks("bash")).replace("\\\n", "").splitlines():
        program, command, *arguments = shlex.split(line)[2:]
        assert program == "benchmarks.tal"
        said.setdefault(command, []).append(run(command, *arguments, *(SHORT if command == "train" else ())))
    assert set(said) == {"check", "train", "evaluate", "plot", "analyse", "predict", "extract"}
    assert "mAP@0.50" in said["evaluate"][0]
    assert set(json.loads(Path("found.json").read_text())["results"]) == set(few)
    assert list(Path("plots").glob("*.png"))
    assert "6 videos" in said["extract"][0]
    assert Path("runs/rallies_features").is_dir()
