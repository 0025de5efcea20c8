"""Drawn videos: real files, repeatable, and twins that nothing but time tells from actions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tal.annotations import read

av = pytest.importorskip("av")
from benchmarks.tal import audit, synthetic, videos  # noqa: E402  needs av
from benchmarks.tal.synthetic import ACTIONS, FPS, Act  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, read(synthetic.synthesize(folder, videos=6, size=48, seconds=(5.0, 7.0)))


def test_files_and_annotations_agree(made):
    folder, annotations = made
    assert [len(annotations.subset(name).videos) for name in ("training", "validation")] == [4, 2]
    result = audit.audit(annotations, folder, thorough=True, progress=False)
    assert len(result.found) == 6
    assert (result.missing, result.faulty, result.lengths) == ((), {}, {})
    for video in annotations.videos:
        said = videos.header(result.found[video.id])
        assert (said.frames, said.fps, said.width, said.height) == (round(video.duration * FPS), FPS, 48, 48)
        assert 5 <= video.duration <= 7


def test_a_seed_makes_the_same_videos_however_many(made, tmp_path):
    folder, annotations = made
    few = read(synthetic.synthesize(tmp_path / "few", videos=3, size=48, seconds=(5.0, 7.0)))
    assert [v.segments for v in few.videos] == [v.segments for v in annotations.videos[:3]]
    assert all(
        (tmp_path / "few/videos" / f.name).read_bytes() == f.read_bytes()
        for f in sorted((folder / "videos").iterdir())[:3]
    )
    other = read(synthetic.synthesize(tmp_path / "other", videos=3, seed=1, size=48, seconds=(5.0, 7.0)))
    assert other.videos[0].duration != few.videos[0].duration


def test_progress_is_shown(tmp_path, capsys):
    synthetic.synthesize(tmp_path, videos=1, size=16, seconds=(1.0, 1.0), progress=True)
    assert "drawing videos" in capsys.readouterr().out


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(4, 60))
def test_scripts_have_actions_and_more_that_is_none(seed, duration):
    acts = synthetic.script(duration, np.random.default_rng(seed))
    assert all(0 <= a.start < a.end <= duration + 0.05 for a in acts)
    assert all(a.end - a.start >= 0.9 for a in acts)
    actions = [a for a in acts if a.forward]
    assert {a.kind for a in actions} <= set(ACTIONS)
    for one, two in itertools.pairwise(sorted(actions, key=lambda a: a.start)):
        assert one.end < two.start


def test_every_kind_of_act_comes_up():
    acts = [a for seed in range(60) for a in synthetic.script(12.0, np.random.default_rng(seed))]
    forward = [a for a in acts if a.forward]
    assert {a.kind for a in forward} == set(ACTIONS)
    assert {a.kind for a in acts if not a.forward} == {*ACTIONS, "stand", "tremble"}
    assert 0.12 < len(forward) / len(acts) < 0.35
    lengths = [a.end - a.start for a in forward]
    assert max(lengths) > 2.5 * min(lengths)


def films(kind, seed):
    """An action and its twin, alike in all else, without noise."""
    return [
        synthetic.draw([Act(kind, forward, 0.0, 3.0)], 30, 48, 0.0, np.random.default_rng(seed))
        for forward in (True, False)
    ]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", ACTIONS)
def test_a_twin_differs_in_its_course_only(kind, seed):
    action, twin = (film.astype(float) for film in films(kind, seed))
    assert np.abs(action[0] - twin[0]).max() == 0
    assert np.abs(action[3:] - twin[3:]).max() > 50
    # pixel by pixel, the same values in another order
    where = np.abs(action - twin).max((0, 3)) > 20
    assert where.sum() > 30
    assert np.abs(action.mean(0)[where] - twin.mean(0)[where]).mean() < 25
    assert np.abs(action.std(0)[where] - twin.std(0)[where]).mean() < 15
    change = [np.abs(np.diff(film, axis=0)).mean() for film in (action, twin)]
    assert change[0] == pytest.approx(change[1], rel=0.15)  # the same amount of motion


def drift(film, axis):
    """How much a film looks like itself one pixel on along an axis, minus one pixel back, in the next frame."""
    grey = film.astype(float).mean(-1)
    grey -= grey.mean(0)
    return sum((np.roll(a, way, axis) * b).sum() * way for a, b in itertools.pairwise(grey) for way in (1, -1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "axis", "sign"), [("advance", 1, 1), ("rise", 0, -1)])
def test_stripes_move_as_they_are_called(kind, axis, sign, seed):
    action, twin = films(kind, seed)
    assert sign * drift(action, axis) > 0
    assert sign * drift(twin, axis) < 0


@pytest.mark.parametrize("seed", range(5))
def test_colours_come_in_their_order(seed):
    action, twin = films("sequence", seed)
    for film, step in ((action, 1), (twin, 2)):
        spot = film[:, film.astype(float).std(0).mean(-1) > 60].mean(1)  # (frames, 3) where it changes
        order = [k for k, _ in itertools.groupby(spot.argmax(-1).tolist())]
        assert len(order) > 4
        assert {(b - a) % 3 for a, b in itertools.pairwise(order)} == {step}
