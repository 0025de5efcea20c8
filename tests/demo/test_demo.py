"""The demo: its real inputs, and the whole run."""

import pytest
import torch

import revwire
from revwire import demo
from revwire.demo import clips, photos


def test_photographs_are_what_the_classifier_says_with_the_preprocessing_of_its_weights():
    inputs = torch.stack([photos.EVALUATION(picture) for picture in photos.photographs()])
    with torch.no_grad():
        top = [photos.CATEGORIES[i] for i in photos.classifier()(inputs).argmax(1)]
    assert top[:4] == ["tiger cat", "espresso", "moped", "tripod"]


def test_crops_and_labels_belong_together():
    batch, labels = photos.crops(photos.photographs(), each=2)
    assert batch.shape == (12, 3, photos.SIDE, photos.SIDE)
    assert labels.bincount().tolist() == [2] * 6


def test_clips_decode_to_frames_that_move():
    clip = clips.decoded("bikes.mp4")
    assert clip.shape == (250, 3, 256, 602)
    window = clips.Window(frames=8, side=112)
    cut = window.cut(clip, start=window.starts(clip) - 1)
    assert cut.shape == (3, 8, 112, 112)
    assert (cut[:, 1:] != cut[:, :-1]).float().mean() > 0.5


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(demo.NEEDS, "no_such_module", "no-such-package")
    with pytest.raises(revwire.RevwireError, match=r"the demo needs no-such-package: pip install 'revwire\[demo\]'"):
        demo.run()


@pytest.mark.slow
def test_quick_demo_passes(capsys):
    assert demo.run(quick=True)
    out = capsys.readouterr().out
    for line in (
        "peak of a step: ",
        "top-1 unchanged",
        "bit-exact",
        "checkpoint every block",
        "the loss went down; the same to the bit",
    ):
        assert line in out
