"""Features of a backbone: a localizer learns from them what it learns end to end on the frozen backbone; broken off, an
extraction goes on.
"""

import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("typer")
pytest.importorskip("h5py")

from test_cli_own import said_in_one_line
from test_cli_tal import SHORT, run

from benchmarks.tal import extraction, features, loading, networks, runs
from benchmarks.tal.config import load
from benchmarks.tal.features import Extraction

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Of losses and scores in float32: clips go through the backbone alone, and in batches of four."""

WHOLE = ("sampling.method=resize", "sampling.flip=false", "sampling.short_side=16", "sampling.stride=1")
"""Clips that are whole videos, all the same in each pass."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    place = tmp_path_factory.mktemp("extraction")
    run("synthesize", "--output", place, "--videos", 6, "--size", 24, "--quiet")
    return place


def changes(drawn, place, *more):
    return [f"data.root={drawn}", f"output={place / 'runs'}", *SHORT, "training.steps=3", *more]


def learned(config):
    """(the losses of each step, the detections)"""
    losses = []

    class Watch(runs.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    runs.train(config, progress=False, further=[Watch()])
    return losses, json.loads((config.folder / "predictions.json").read_text())["results"]


def test_training_on_features_is_training_on_a_frozen_backbone(drawn, tmp_path):
    given = changes(drawn, tmp_path, *WHOLE, "backbone.frozen=true")
    said = run("extract", "--config", "synthetic", "--output", tmp_path / "made", "--quiet", *given)
    assert "6 videos, 48 rows of 8 channels" in said
    end_to_end, detections = learned(load("synthetic", given))
    on_features, same = learned(load(tmp_path / "made/config.yaml"))
    assert len(end_to_end) == 3
    np.testing.assert_allclose(on_features, end_to_end, **ROUNDING)
    assert end_to_end[0] != end_to_end[1]
    assert detections.keys() == same.keys()
    for name, found in detections.items():
        ours = same[name]
        assert [d["label"] for d in ours] == [d["label"] for d in found]
        for key in ("score", "segment"):
            np.testing.assert_allclose([d[key] for d in ours], [d[key] for d in found], rtol=1e-3, atol=1e-3)


def test_windows_join_to_rows_at_the_seconds_of_their_steps(drawn, tmp_path):
    """A backbone whose pieces are independent gives the same rows in any window; each stands where its step did."""
    given = changes(drawn, tmp_path, "backbone.frozen=true", "backbone.chunk=2", "sampling.overlap=0.5")
    run("extract", "--config", "synthetic", "--output", tmp_path / "made", "--quiet", *given)
    config, reading = load("synthetic", given), load(tmp_path / "made/config.yaml")
    truth = loading.truth(config)
    frames, rows = (loading.dataset(c, truth.test, False) for c in (config, reading))
    backbone = runs.prepared(config)[0].network.backbone.eval()
    assert len(rows) == len(frames) > len(truth.test.videos)  # some have several windows
    for i in range(len(frames)):
        seen, read = frames[i], rows[i]
        valid = int(seen.mask.sum())
        if int(read.mask.sum()) == valid and seen.timing.offset % 8 == 0:
            assert seen.timing.stride == read.timing.stride == 8
            assert (seen.timing.fps, seen.timing.offset) == (read.timing.fps, read.timing.offset)
            torch.testing.assert_close(seen.segments, read.segments)
            with torch.no_grad():
                made = backbone(seen.frames[None])[0]
            torch.testing.assert_close(read.features[:, :valid], made[:, :valid], rtol=1e-4, atol=1e-5)


def test_rows_come_from_the_window_in_whose_middle_they_are_most():
    first, second, last = (np.full((4, 1), value, np.float32) for value in (0, 1, 2))
    whole = extraction._joined([(0, first), (2, second), (3, last)], 4)
    assert whole[:, 0].tolist() == [0, 0, 0, 1, 1, 2, 2]  # of two as good, the first


def test_snippets_are_rows_on_their_own(drawn, tmp_path):
    given = changes(drawn, tmp_path, "backbone.frozen=true")
    output = tmp_path / "made"
    cut = ("--snippet", 4, "--every", 6)
    run("extract", "--config", "synthetic", "--output", output, *cut, "--batch", 3, "--quiet", *given)
    config, reading = load("synthetic", given), load(output / "config.yaml")
    network = runs.prepared(config)[0].network
    source, how = loading.extracted(reading)
    assert how == Extraction(stride=6, snippet=16)
    truth = loading.truth(config).test
    files = loading.videos.find(drawn / "videos")
    for video in truth.videos:
        length = loading.videos.index(files[video.id]).frames
        rows = source.read(video.id)
        assert len(rows) == (length - 16) // 6 + 1
        frames = loading.videos.read(files[video.id], 6 + 4 * np.arange(4), short_side=16)
        network.backbone.steps = None
        with torch.no_grad():
            row = network.backbone.eval()(frames.transpose(0, 1)[None]).mean(2)[0]
        torch.testing.assert_close(rows[1], row, rtol=1e-4, atol=1e-5)
        assert source.told(video).fps == loading.videos.index(files[video.id]).fps


def test_features_of_a_checkpoint_are_those_of_its_rewired_backbone(drawn, tmp_path):
    given = changes(drawn, tmp_path, *WHOLE, "training.steps=1", "memory=re2tal")
    run("train", "--config", "synthetic", "--quiet", *given)
    best = next(tmp_path.rglob("best.ckpt"))
    run("extract", "--checkpoint", best, "--output", tmp_path / "made", "--videos", drawn / "videos", "--quiet")
    config = load("synthetic", given)
    trained = runs.checkpoints.read(best)
    module, data = runs.tested(config, trained)
    clip = data.test[0]
    with torch.no_grad():
        made = module.network.eval().backbone(clip.frames[None])[0]
    rows = features.find(tmp_path / "made/rows").read(clip.video_id)
    torch.testing.assert_close(rows.T, made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hdf5", [False, True])
def test_what_was_broken_off_goes_on_with_the_next_video(drawn, tmp_path, monkeypatch, hdf5):
    config = load("synthetic", changes(drawn, tmp_path, *WHOLE))
    extraction.extract(config, tmp_path / "whole", hdf5=hdf5, progress=False)
    written, write = [], extraction._Rows.write

    def breaking(self, video, rows):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(video)
        write(self, video, rows)

    with monkeypatch.context() as broken:
        broken.setattr(extraction._Rows, "write", breaking)
        with pytest.raises(KeyboardInterrupt):
            extraction.extract(config, tmp_path / "parts", hdf5=hdf5, progress=False)
    with (tmp_path / "parts" / features.LOG).open("a") as log:
        log.write('{"video": "cut o')
    found = extraction.extract(config, tmp_path / "parts", hdf5=hdf5, progress=False)
    assert (found.before, found.done) == (2, 4)
    again = extraction.extract(config, tmp_path / "parts", hdf5=hdf5, progress=False)
    assert (again.before, again.done) == (6, 0)
    one, other = (features.find(tmp_path / name / found.path.name) for name in ("whole", "parts"))
    assert one.entries.keys() == other.entries.keys() == one.rates.keys() == other.rates.keys()
    for name in one.entries:
        assert torch.equal(one.read(name), other.read(name))


def test_files_that_cannot_be_read_are_named_and_the_others_made(drawn, tmp_path):
    folder = tmp_path / "videos"
    shutil.copytree(drawn / "videos", folder)
    broken = sorted(folder.iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:200])
    given = changes(drawn, tmp_path, *WHOLE, f"data.videos={folder}")
    with pytest.warns(loading.videos.VideoWarning):
        said = run("extract", "--config", "synthetic", "--output", tmp_path / "made", "--quiet", *given, code=1)
    assert "5 videos" in said
    assert f"video {broken.stem!r} cannot be read" in said


def test_other_features_in_the_folder_are_refused(drawn, tmp_path, monkeypatch, capsys):
    base = ["extract", "--config", "synthetic", "--output", tmp_path / "made", "--quiet", *changes(drawn, tmp_path)]
    run(*base)
    wrong = {
        "seed=1": r"made in another way (weights)",
        "sampling.crop=8": r"made in another way (sampling)",
        "data.features={path: made/rows, channels: 8}": "features to extract features from",
    }
    for override, message in wrong.items():
        assert message in said_in_one_line(monkeypatch, capsys, *base, override)
    run(*base, "--hdf5")
    assert "give --hdf5" in said_in_one_line(monkeypatch, capsys, *base)
    assert "without --snippet" in said_in_one_line(monkeypatch, capsys, *base, "--every", 3)


def test_a_head_begins_the_same_with_and_without_a_backbone(drawn):
    config = load("synthetic", [*SHORT])
    rows = load("synthetic", [*SHORT, "data.features={path: x, channels: 8}"])
    heads = []
    for one in (config, rows):
        torch.manual_seed(0)
        heads.append(networks.build(one, 2, drawn).head.state_dict())
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
