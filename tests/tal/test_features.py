"""Features: the same in every kind of file, on the grid of steps, with the actions in their places."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.tal.annotations import Annotations, Segment, Video

h5py = pytest.importorskip("h5py")
pytest.importorskip("av")
from benchmarks.tal import features  # noqa: E402  needs h5py
from benchmarks.tal.clips import collate  # noqa: E402  needs av
from benchmarks.tal.features import Extraction, FeatureError, Features  # noqa: E402
from benchmarks.tal.sampling import Resize, Timing, Truncate, Windows  # noqa: E402


def rows(count, channels=5):
    """Row i is i, i + 0.1, …"""
    return np.arange(count, dtype=np.float32)[:, None] + np.arange(channels, dtype=np.float32) / 10


def annotated(**durations):
    videos = (
        Video(name, "training", d, (Segment(0.25 * d, 0.5 * d, 1), Segment(0.5 * d, d, 0)))
        for name, d in durations.items()
    )
    return Annotations(tuple(videos), ("a", "b"))


def written(folder, kind, arrays):
    """Arrays by id, written in a way."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if kind == "npy":
            np.save(folder / f"{name}.npy", array)
        elif kind == "pt":
            torch.save(torch.from_numpy(array), folder / f"v_{name}.pt")
        elif kind == "pt dict":
            torch.save({"features": torch.from_numpy(array), "stride": 4}, folder / f"{name}.pt")
    if not kind.startswith("h5"):
        return folder
    with h5py.File(folder / "f.h5", "w") as file:
        for name, array in arrays.items():
            file[f"v_{name}/feats" if kind == "h5 groups" else name] = array
    return folder / "f.h5"


@pytest.mark.parametrize("kind", ["npy", "pt", "pt dict", "h5", "h5 groups"])
def test_every_kind_of_file(tmp_path, kind):
    arrays = {"a": rows(7), "b": rows(3)}
    source = features.find(written(tmp_path, kind, arrays))
    for name, array in arrays.items():
        assert name in source
        assert torch.equal(source.read(name), torch.from_numpy(array))
        assert torch.equal(source.read(f"v_{name}"), torch.from_numpy(array))
    assert "c" not in source
    with pytest.raises(FeatureError, match="there are no features of video 'c'"):
        source.read("c")


def test_windows_of_rows(tmp_path):
    source = features.find(written(tmp_path, "npy", {"a": rows(20), "b": rows(5)}))
    dataset = Features(annotated(a=20.0, b=5.0, c=1.0), source, Windows(8, 8, 1, overlap=0.5, keep=0.1))
    assert dataset.missing == ("c",)
    clips = [dataset[i] for i in range(len(dataset))]
    assert [(c.video_id, c.features[0, 0].item(), int(c.mask.sum())) for c in clips] == [
        ("a", 0, 8),
        ("a", 4, 8),
        ("a", 8, 8),
        ("a", 12, 8),
        ("b", 0, 5),
    ]
    for clip in clips[:4]:
        assert torch.equal(clip.features, torch.from_numpy(rows(20)[int(clip.timing.offset) :][:8].T))
    assert clips[1].segments.tolist() == [[1, 6], [6, 8]]
    assert clips[1].timing.to_seconds(clips[1].segments).tolist() == [[5, 10], [10, 12]]
    assert clips[4].features[:, 5:].abs().sum() == 0
    batch = collate(clips)
    assert batch.features.shape == (5, 5, 8)
    assert batch.frames is None


@settings(deadline=None)
@given(
    st.integers(8, 200),
    st.sampled_from([1.0, 4.0, 16.0]),
    st.sampled_from([0.0, 8.0]),
    st.sampled_from([25.0, 30.0]),
    st.integers(0, 9),
)
def test_actions_lie_at_their_seconds(tmp_path_factory, count, stride, offset, fps, seed):
    duration = count * stride / fps
    source = features.find(written(tmp_path_factory.mktemp("f"), "npy", {"a": rows(count)}))
    sampling = Truncate(64, 64, 1, keep=0.01)
    dataset = Features(
        annotated(a=duration), source, sampling, fps=fps, stride=stride, offset=offset, training=True, seed=seed
    )
    clip = dataset[0]
    assert clip.timing.stride == stride
    first, last = clip.timing.start, clip.timing.to_seconds(float(clip.mask.sum()))
    expected = [
        (max(s, first), min(e, last))
        for s, e in ((0.25 * duration, 0.5 * duration), (0.5 * duration, duration))
        if e > first and s < last
    ]
    found = clip.timing.to_seconds(clip.segments).tolist()
    for start, end in found:
        assert any(abs(start - s) < 1e-3 and abs(end - e) < 1e-3 for s, e in expected)
    # a step's row is the one of its moment
    step = int(clip.mask.sum()) - 1
    assert clip.features[0, step] == pytest.approx((clip.timing.offset - offset) / stride + step)


def test_resized_rows_are_interpolated(tmp_path):
    source = features.find(written(tmp_path, "npy", {"a": rows(32)}))
    clip = Features(annotated(a=10.0), source, Resize(64, 16))[0]
    assert clip.features[0].tolist() == pytest.approx(np.arange(16) * 2 + 0.5)
    assert clip.segments.tolist() == [[4, 8], [8, 16]]
    assert clip.timing.to_seconds(clip.segments).tolist() == [[2.5, 5], [5, 10]]
    assert clip.mask.all()


def test_passes_differ_and_repeat(tmp_path):
    source = features.find(written(tmp_path, "npy", {"a": rows(500)}))
    dataset = Features(annotated(a=500.0), source, Truncate(32, 32, 1, keep=0.01), training=True)
    offsets = [dataset[turn, 0].timing.offset for turn in range(10)]
    assert len(set(offsets)) > 5
    assert offsets == [dataset[turn, 0].timing.offset for turn in range(10)]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(4, np.float32), r"float32 of shape \(4,\); expected numbers \(rows, channels\)"),
        (np.zeros((0, 4), np.float32), r"of shape \(0, 4\)"),
        (np.full((2, 2), np.nan, np.float32), "values that are not finite"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    source = features.find(written(tmp_path, "npy", {"a": array}))
    with pytest.raises(FeatureError, match=r"a\.npy: it holds.*" + message if "finite" not in message else message):
        source.read("a")


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(FeatureError, match=r"a\.npy: the features of video 'a' cannot be read"):
        features.find(tmp_path).read("a")
    torch.save({"x": torch.zeros(2, 2), "y": torch.zeros(2, 2)}, tmp_path / "b.pt")
    with pytest.raises(FeatureError, match="expected one array or one called 'features', got x, y"):
        features.find(tmp_path).read("b")


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder and no HDF5 file of features"):
        features.find(tmp_path / "nowhere")
    with pytest.raises(FeatureError, match="there are no features in it"):
        features.find(tmp_path)
    source = features.find(written(tmp_path, "npy", {"z": rows(4)}))
    (tmp_path / "flow").mkdir()
    np.save(tmp_path / "flow/v_z.npy", rows(4))
    with pytest.raises(FeatureError, match=r"video 'z' has features twice, in flow/v_z.npy and .*z.npy; expected one"):
        features.find(tmp_path)
    with pytest.raises(ValueError, match="no clips: of 1 videos 1 have no features"):
        Features(annotated(a=1.0), source, Resize(8, 8))
    with pytest.raises(ValueError, match="a row of features for each step, got 16 for 8 steps"):
        Features(annotated(z=1.0), source, Windows(16, 8, 1))


# -- seconds -----------------------------------------------------------------------------------------------------------


def planned(video, **options):
    """The rows between which the actions of a video of 200 s, of 30 frames each, lie; and its timing."""
    frames = 6000
    rows_ = (frames - 16) // 4 + 1
    how = Extraction(stride=4, **options)
    fps = how.rate(video, rows_)
    return [(s.start * fps / 4, s.end * fps / 4) for s in how.moved(video, fps).segments], how.timed(
        Timing(fps / 4, 1.0, 0.0, 200.0), fps
    )


@pytest.mark.parametrize("fps", [30.0, None])
@pytest.mark.parametrize(
    "options", [{"snippet": 16}, {"offset": 8}, {"snippet": 16, "offset": 8}, {"fps": 30.0, "offset": 8}]
)
def test_a_row_stands_for_the_middle_of_its_snippet_at_the_frame_rate_of_its_video(fps, options):
    """The frame rate is the annotations'; where they have none, rows and duration give it."""
    found, timing = planned(Video("v", "test", 200.0, (Segment(190.0, 199.0, 0),), fps), **options)
    assert found == [pytest.approx((1423, 1490.5))]
    assert [timing.to_seconds(row) for row in found[0]] == pytest.approx([190, 199])
    assert timing.to_seconds(1e6) == 200


def test_each_video_has_its_own_frame_rate(tmp_path):
    videos = (
        Video(name, "training", 200.0, (Segment(190.0, 199.0, 0),), fps) for name, fps in (("a", 30.0), ("b", 25.0))
    )
    source = features.find(written(tmp_path, "npy", {"a": rows(1497), "b": rows(1247)}))
    dataset = Features(Annotations(tuple(videos), ("x",)), source, Windows(2048, 2048, 1), stride=4, snippet=16)
    assert [clip.segments.tolist() for clip in (dataset[0], dataset[1])] == [[[1423, 1490.5]], [[1185.5, 1241.75]]]


@pytest.mark.skipif("REVWIRE_DATA" not in os.environ, reason="needs reference records: set REVWIRE_DATA")
def test_rows_and_seconds_are_opentads():
    records = json.loads(Path(os.environ["REVWIRE_DATA"], "opentad_reference_2/feature_timing.json").read_text())
    thumos = (Extraction(stride=4, snippet=16, whole_frames=True), records["thumos_i3d"]["videos"])
    anet = (Extraction(stride=16, snippet=16, fps=15), records["anet_tsp"]["videos"])
    checked = 0
    for extraction, videos in (thumos, anet):
        for r in videos:
            how = extraction
            actions = (a for a in r["annotations"] if a["label"] != "Ambiguous")
            label = {name: i for i, name in enumerate(records["thumos_i3d"]["classes"])}
            segments = tuple(Segment(*map(float, a["segment"]), label.get(a["label"], 0)) for a in actions)
            counted = r["frame"] / r["duration"] if "frame" in r else None
            video = Video(r["video"], "test", r["duration"], segments, counted)
            fps = how.rate(video, r["feature_rows"])
            moved = dict.fromkeys((s.start, s.end, s.label) for s in how.moved(video, fps).segments)
            found = np.array([s[:2] for s in moved]).reshape(-1, 2) * fps / how.stride
            if "gt_rows" in r:
                expected, slack = np.reshape(r["gt_rows"], (-1, 2)), 2e-6 * np.abs(found).max(initial=1)
                np.testing.assert_allclose(found, expected, rtol=0, atol=slack)
                checked += len(found)
            how = replace(how, stride=r["meta"]["snippet_stride"], offset=r["meta"]["offset_frames"])  # of rows as read
            timing = how.timed(Timing(fps / how.stride, 1.0, 0.0, r["duration"]), fps)
            seconds = [[timing.to_seconds(float(row)) for row in pair] for pair in r["rows"]]
            np.testing.assert_allclose(seconds, r["seconds"], rtol=0, atol=2e-6 * np.max(r["seconds"]))
            checked += len(seconds)
    assert checked == 305


# -- what is not as it should be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (rows(7, 4), r"a\.npy: it has shape \(7, 4\); expected \(rows, 5\), by data.features.channels"),
        (rows(7).T, r"a\.npy: it is transposed: it has shape \(5, 7\); expected \(rows, 5\)"),
        (np.where(rows(7) == 3, np.nan, rows(7)), r"a\.npy: it holds values that are not finite, in 1 of 7 rows"),
    ],
)
def test_rows_of_another_form_are_named(tmp_path, array, message):
    source = features.find(written(tmp_path, "npy", {"a": array.astype(np.float32)}))
    with pytest.raises(FeatureError, match=message):
        Features(annotated(a=7.0), source, Windows(8, 8, 1), channels=5)


def test_one_file_is_a_source(tmp_path):
    source = features.find(written(tmp_path, "npy", {"a": rows(7), "b": rows(3)}) / "a.npy")
    assert list(source.entries) == ["a"]
    assert torch.equal(source.read("v_a"), torch.from_numpy(rows(7)))
    found = features.unannotated(source, Extraction(stride=4, snippet=16, fps=10))
    assert [(v.id, v.duration) for v in found.videos] == [("a", 4.0)]
    with pytest.raises(FeatureError, match=r"set data\.features\.fps"):
        features.unannotated(source, Extraction(stride=4))
