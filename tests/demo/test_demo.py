"""The demo: its real inputs, and the whole run."""

import pytest
import torch

import revwire
from revwire import demo
from revwire.demo import clips, curve, photos, texts
from revwire.demo.costs import Cost, verdict
from revwire.measure import Quartiles


def test_photographs_are_what_the_classifier_says_with_the_preprocessing_of_its_weights():
    inputs = torch.stack([photos.EVALUATION(picture) for picture in photos.photographs()])
    with torch.no_grad():
        top = [photos.CATEGORIES[i] for i in photos.classifier()(inputs).argmax(1)]
    assert top[:4] == ["tiger cat", "espresso", "moped", "tripod"]


def test_clips_decode_to_frames_that_move():
    clip = clips.decoded("bikes.mp4")
    assert clip.shape == (250, 3, 256, 602)
    window = clips.Window(frames=8, side=112)
    cut = window.cut(clip, start=window.starts(clip) - 1)
    assert cut.shape == (3, 8, 112, 112)
    assert (cut[:, 1:] != cut[:, :-1]).float().mean() > 0.5


def test_texts_are_found_by_what_they_are_about():
    passage, cosine = texts.nearest(texts.Reader(), length=128)
    assert [texts.PASSAGES[i] for i in passage] == list(texts.QUESTIONS.values())
    assert cosine.min() > 0.05


def test_excerpts_and_labels_belong_together():
    documents = ["one two three four five six", "seven eight nine ten eleven twelve"]
    (numbers, mask), labels = texts.excerpts(documents, each=2, words=3)
    assert labels.tolist() == [0, 1, 0, 1]
    assert numbers.shape == mask.shape == (4, 5)  # a token each, and the two ends
    words = [set(texts.tokens([document], 16)[0][0].tolist()) for document in documents]
    assert all(set(row.tolist()) <= words[label] for row, label in zip(numbers, labels, strict=True))


def cost(name, peak, seconds):
    return Cost(name, peak * curve.MIB, Quartiles.of([seconds]), Quartiles.of([seconds]))


TABLE = [cost("stored activations", 100, 0.8), cost("checkpoint every block", 10, 1.0), cost("revwire", 5, 1.1)]


def test_the_curve_has_a_letter_for_each_way():
    lines = curve.drawn(TABLE).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[8:].index("C") for line in lines if "C" in line] == [0]  # least memory, most time: top left
    assert [line.split("|")[0].strip() for line in lines if "C" in line] == ["1.10"]
    assert [line.split("|")[0].strip() for line in lines if "A" in line] == ["0.80"]
    assert [line[8:].index("A") for line in lines if "A" in line] == [curve.COLUMNS - 1]
    assert [line.strip() for line in lines if "MiB" in line] == [f"5.0{'100.0 MiB':>{curve.COLUMNS - 3}}"]


def test_ways_that_cost_the_same_lie_side_by_side():
    (row,) = (line for line in curve.drawn([TABLE[0]] * 3).splitlines() if "A" in line)
    assert row.endswith("|ABC")


def test_the_picture_is_one(tmp_path):
    curve.saved(TABLE, "a network", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("peak", "seconds", "said"),
    [
        (5, 1.1, "revwire: 0.50 of checkpointing's peak, in 1.10 of its seconds"),
        (20, 0.9, "revwire: 2.00 of checkpointing's peak, in 0.90 of its seconds"),
        (20, 1.1, "revwire gains nothing here, use checkpointing (2.00 of its peak, in 1.10 of its seconds)"),
        (10, 0.9, "revwire gains nothing here, use checkpointing (1.00 of its peak, in 0.90 of its seconds)"),
    ],
)
def test_the_verdict_says_where_nothing_is_gained(peak, seconds, said):
    assert verdict([*TABLE[:2], cost("revwire", peak, seconds)]) == [said]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(demo.NEEDS, "no_such_module", "no-such-package")
    with pytest.raises(revwire.RevwireError, match=r"the demo needs no-such-package: pip install 'revwire\[demo\]'"):
        demo.run()


@pytest.mark.slow
def test_quick_demo_passes(capsys, tmp_path):
    assert demo.run(quick=True, picture=tmp_path / "curve.png")
    out = capsys.readouterr().out
    for line in (
        "peak of a step: ",
        "top-1 unchanged on 1 of 1",
        "bit-exact: 32 states rebuilt to the bit",
        "checkpoint (own switch)",
        "checkpoint every block",
        "revwire gains nothing here, use checkpointing",
        "the loss went down; the same to the bit",
        "every check passed",
    ):
        assert line in out
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "curve.png").exists()
