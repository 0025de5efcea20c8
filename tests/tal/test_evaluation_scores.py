"""Video-level class scores, in each of their forms."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from benchmarks.tal import annotations, scores
from benchmarks.tal.scores import ScoreError

DATA = os.environ.get("REVWIRE_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="needs published scores: set REVWIRE_DATA")


def written(path, data):
    path.write_text(json.dumps(data))
    return path


def test_cuhk(tmp_path):
    path = written(
        tmp_path / "c.json",
        {"class": ["run", "jump", "sit down"], "results": {"x": [0.1, 0.7, 0.2], "v_y": [0.6, 0.1, 0.3]}},
    )
    found = scores.read(path, ["jump", "run", "SitDown"])
    assert found.top("x") == ((0, 0.7), (2, 0.2))
    assert found.top("v_x", 1) == ((0, 0.7),)
    assert found.top("y", 5) == ((1, 0.6), (2, 0.3), (0, 0.1))


def test_one_class_a_video(tmp_path):
    found = scores.read(written(tmp_path / "c.json", {"v_x": {"class": "run", "score": 0.5}}), ["jump", "run"])
    assert found.top("x") == ((1, 0.5),)
    with pytest.raises(KeyError, match="no video-level scores for video 'z'; 1 videos have some"):
        found.top("z")


def test_untrimmednet(tmp_path):
    table = np.zeros((3, 101), np.float32)
    table[1, scores.UCF101["Diving"] - 1], table[1, scores.UCF101["Billiards"] - 1], table[1, 0] = 0.5, 0.25, 1
    np.save(tmp_path / "u.npy", table)
    found = scores.read(tmp_path / "u.npy", ["Billiards", "Diving"])
    assert found.top("video_test_0000002") == ((1, 0.5), (0, 0.25))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"results": {}}, "it has 'results' but no 'class'"),
        (
            {"results": {"x": [1]}, "class": ["run", "jump"]},
            "video 'x' has 1 scores; expected one for each of 2 classes",
        ),
        ({"results": {}, "class": ["fly"]}, "unknown class 'fly'; expected one of 2, such as 'run'"),
        ({"x": [1, 2]}, "expected CUHK's form"),
        ([], "expected CUHK's form"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    with pytest.raises(ScoreError, match=message):
        scores.read(written(tmp_path / "c.json", data), ["run", "jump"])


def test_other_arrays_are_refused(tmp_path):
    np.save(tmp_path / "u.npy", np.zeros((3, 20)))
    with pytest.raises(ScoreError, match=r"it has shape \(3, 20\); expected \(videos, 101\)"):
        scores.read(tmp_path / "u.npy", ["Diving"])
    np.save(tmp_path / "u.npy", np.zeros((3, 101)))
    with pytest.raises(ScoreError, match="not for 'Knitting'"):
        scores.read(tmp_path / "u.npy", ["Diving", "Knitting"])


def right(truth, found):
    """Share of videos whose likeliest class is one that they show."""
    acting = [video for video in truth.videos if video.segments]
    return sum(found.top(v.id, 1)[0][0] in {s.label for s in v.segments} for v in acting) / len(acting)


@needs_data
def test_published_scores_know_their_videos():
    root = Path(DATA)
    truth, _ = annotations.parse(root / "activitynet13/activity_net.v1-3.rebuilt.json")
    assert (
        right(
            truth.subset("validation"), scores.read(root / "activitynet13/video_level_top1_scores.json", truth.classes)
        )
        > 0.88
    )
    truth, _ = annotations.parse(root / "thumos14/thumos14.json")
    assert right(truth.subset("test"), scores.read(root / "thumos14/uNet_test.npy", truth.classes)) > 0.9
