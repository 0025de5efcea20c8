"""Clips: grids of frames and steps, what is kept of actions, the same items in every process, and files that cannot be
read.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from benchmarks.tal.annotations import Annotations, Segment, Video, read

av = pytest.importorskip("av")
from benchmarks.tal import pixels, synthetic, videos  # noqa: E402  needs av
from benchmarks.tal.clips import Clips, collate  # noqa: E402
from benchmarks.tal.sampling import Resize, Timing, Truncate, Windows  # noqa: E402

FPS = 10


def video(name="v", duration=60.0, segments=()):
    return Video(name, "training", duration, tuple(Segment(s, e, label) for s, e, label in segments))


def plan(sampling, made, length, part=0, seed=0, fps=FPS):
    return sampling.plan(made, length, fps, part, np.random.default_rng(seed))


# -- time --------------------------------------------------------------------------------------------------------------


@given(st.floats(1, 60), st.floats(0.5, 16), st.floats(0, 1000), st.floats(0, 1))
def test_steps_and_seconds_are_inverse(fps, stride, offset, share):
    timing = Timing(fps, stride, offset, 1e6)
    steps = share * 100
    assert timing.to_steps(timing.to_seconds(steps)) == pytest.approx(steps, abs=1e-6)
    tensor = torch.tensor([steps], dtype=torch.float64)
    torch.testing.assert_close(timing.to_steps(timing.to_seconds(tensor)), tensor)


def test_seconds_are_cut_to_the_video():
    timing = Timing(10, 4, 20, 8.0)
    assert timing.start == 2.0
    assert timing.to_seconds(torch.tensor([-9.0, 0, 5, 99])).tolist() == [0, 2, 4, 8]
    assert timing.to_seconds(-9.0) == 0
    assert timing.to_steps(4.0) == 5


# -- the whole video ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 3000), st.sampled_from([(768, 192), (16, 16), (100, 50)]))
def test_a_resized_video_is_spread_evenly(length, shape):
    frames, steps = shape
    made = plan(Resize(frames, steps), video(duration=length / FPS), length)
    assert len(made.numbers) == frames
    assert made.valid == steps
    assert np.all(np.diff(made.numbers) >= 0)
    assert made.numbers[0] <= length / frames / 2 + 1
    assert made.numbers[-1] >= length - 1 - (length / frames / 2 + 1)
    expected = (np.arange(frames) + 0.5) * length / frames - 0.5  # the middle of each share
    assert np.abs(made.numbers - expected).max() <= 0.5 + 1e-6


def test_steps_of_a_resized_video_are_shares_of_its_duration():
    made = plan(Resize(64, 16), video(duration=20.0, segments=[(5, 10, 1), (0, 20, 0), (3, 3.1, 2)]), 480, fps=24)
    assert made.segments.tolist() == [[4, 8], [0, 16]]
    assert made.labels.tolist() == [1, 0]  # a segment of 1/200 of the video is too short for the grid
    assert made.timing.to_seconds(torch.tensor([4.0, 8, 16])).tolist() == [5, 10, 20]
    # what reaches over the video is cut to it
    assert plan(
        Resize(64, 16), video(duration=20.0, segments=[(15, 24, 1), (21, 24, 0)]), 480, fps=24
    ).segments.tolist() == [[12, 16]]
    # where the file's length and the annotation's differ, shares of the video are what counts
    assert plan(Resize(64, 16), video(duration=20.0, segments=[(5, 10, 1)]), 500, fps=24).segments.tolist() == [[4, 8]]


# -- windows -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5000),
    st.sampled_from([(64, 32, 2), (64, 64, 1), (32, 8, 3)]),
    st.sampled_from([0.0, 0.25, 0.5, 0.75]),
)
def test_windows_cover_the_video(length, shape, overlap):
    sampling = Windows(*shape, overlap=overlap)
    made = [plan(sampling, video(duration=length / FPS), length, part) for part in range(sampling.count(length))]
    seen = {n for p in made for n in p.numbers}
    assert seen >= set(range(0, length, shape[2]))
    assert all(0 <= n < length for n in seen)
    starts = [p.timing.offset for p in made]
    assert starts == sorted(set(starts))
    hops = np.diff(starts)
    assert (hops <= shape[0] * shape[2] * (1 - overlap)).all()
    assert (hops[:-1] == hops[:1]).all()  # all but the last are equal
    step = shape[2] * shape[0] // shape[1]
    for p in made:
        assert p.timing.stride == step
        assert p.numbers[0] == p.timing.offset
        assert 1 <= p.valid <= shape[1]
        assert len(made) == 1 or p.valid >= shape[1] - 1  # only a video shorter than a window is padded


def test_windows_as_in_the_published_configurations():
    """THUMOS: 1024 frames, every second one, 512 steps, half overlapping: a minute at 30 frames a second is one window,
    four are.
    """
    sampling = Windows()
    assert sampling.count(1800) == 1
    offsets = [plan(sampling, video(), 7200, part).timing.offset for part in range(sampling.count(7200))]
    assert offsets == [0, 1024, 2048, 3072, 4096, 5120, 5152]


def test_a_window_knows_its_actions():
    actions = [(0.0, 6.0, 0), (5.0, 9.0, 1), (11.0, 14.0, 2)]
    made = plan(Windows(64, 32, 1, overlap=0.5), video(segments=actions), 600, part=1)  # 3.2 s to 9.6 s
    assert made.timing.to_seconds(torch.from_numpy(made.segments)).tolist() == [[5.0, 9.0]]
    assert made.labels.tolist() == [1]
    assert plan(Windows(64, 32, 1, keep=0.4), video(segments=actions), 600, part=1).labels.tolist() == [0, 1]


def test_a_duration_that_is_too_short_cuts_nothing():
    """As of THUMOS's video_test_0000270."""
    made = plan(Windows(64, 32, 1), video(duration=5.0, segments=[(4.0, 6.0, 0)]), 80)
    assert made.timing.to_seconds(torch.from_numpy(made.segments)).tolist() == [[4, 6]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a whole number of frames per step, got 10 frames on 4 steps"):
        Windows(10, 4, 1).count(100)
    with pytest.raises(ValueError, match="from 0 to below 1, got 1"):
        Windows(overlap=1.0)


# -- random cuts -------------------------------------------------------------------------------------------------------

actions = st.lists(st.tuples(st.floats(0, 290), st.floats(0.2, 20), st.integers(0, 3)), min_size=1, max_size=6)


@settings(deadline=None)
@given(actions, st.integers(10, 3000), st.integers(0, 99))
def test_a_cut_shows_an_action(items, length, seed):
    duration = length / FPS
    made = video(duration=duration, segments=[(s, min(s + n, duration), c) for s, n, c in items if s < duration - 0.1])
    sampling = Truncate(64, 32, 2, keep=0.75)
    cut = plan(sampling, made, length, seed=seed)
    there = math.ceil(length / 2)
    assert len(cut.numbers) == 64
    assert (np.diff(cut.numbers)[: 2 * cut.valid - 1] == 2).all()
    assert cut.valid == (32 if there >= 64 and there > 64 else max(1, min(len(set(cut.numbers)), 64) // 2))
    assert (cut.segments[:, 1] >= cut.segments[:, 0]).all()
    assert (cut.segments >= 0).all()
    assert (cut.segments <= len(set(cut.numbers)) / 2 + 1e-9).all()
    # what is said to be there is there by three quarters, and all such is said
    first, last = cut.numbers[0] / FPS, (cut.numbers[0] + 2 * len(set(cut.numbers))) / FPS
    seconds = cut.timing.to_seconds(torch.from_numpy(cut.segments))
    left = [(max(s.start, first), min(s.end, last), s) for s in dict.fromkeys(made.segments)]
    kept = [(a, b, s.label) for a, b, s in left if b - a >= 0.75 * (s.end - s.start) - 1e-9]
    assert len(kept) == len(cut.labels)
    assert cut.labels.tolist() == [label for *_, label in kept]
    expected = torch.tensor([[a, min(b, duration)] for a, b, _ in kept], dtype=torch.float64).reshape(-1, 2)
    torch.testing.assert_close(seconds, expected, atol=1e-6, rtol=0)


def test_cuts_are_random_and_repeatable():
    made = video(segments=[(t, t + 2.0, 0) for t in range(0, 58, 3)])
    offsets = [plan(Truncate(64, 32, 1), made, 600, seed=seed).timing.offset for seed in range(20)]
    assert len(set(offsets)) > 10
    assert offsets == [plan(Truncate(64, 32, 1), made, 600, seed=seed).timing.offset for seed in range(20)]
    assert all(len(plan(Truncate(64, 32, 1), made, 600, seed=s).labels) for s in range(20))


def test_a_cut_goes_to_an_action_that_is_rare_or_too_long():
    rare = video(duration=10000.0, segments=[(5000.0, 5001.0, 0)])
    assert plan(Truncate(64, 32, 1), rare, 100000).labels.tolist() == [0]
    long = video(segments=[(10.0, 50.0, 0)])
    assert plan(Truncate(64, 32, 1), long, 600).timing.offset == pytest.approx(300 - 32)


def test_a_video_without_actions_is_cut_anywhere():
    assert plan(Truncate(64, 32, 1), video(), 600).segments.shape == (0, 2)


# -- the data set ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    path = synthetic.synthesize(folder, videos=3, size=32, seconds=(4.0, 6.0))
    found = read(path)
    acting = (replace(v, segments=(Segment(0.5, 2.5, 0), Segment(2.0, 3.5, 1))) for v in found.videos)
    return replace(found, videos=tuple(acting)), videos.find(folder)


def data(drawn, sampling=None, transform=None, **options):
    options = {"short_side": 32, "training": False} | options
    return Clips(*drawn, sampling or Truncate(16, 8, 1), transform or pixels.augmentation(24, jitter=0.4), **options)


def test_an_item_is_a_clip(drawn):
    dataset = data(drawn, Resize(16, 8))
    assert len(dataset) == 3
    clip = dataset[1]
    assert clip.video_id == drawn[0].videos[1].id
    assert clip.frames.shape == (3, 16, 24, 24)
    assert clip.frames.dtype == torch.float32
    assert clip.mask.tolist() == [True] * 8
    assert clip.segments.dtype == torch.float32
    assert clip.labels.dtype == torch.long
    assert len(clip.segments) == len(clip.labels)


def test_pixels_are_normalised_or_not(drawn):
    raw = data(drawn, Resize(16, 8), pixels.centre(24), normalize=None)[0].frames
    assert raw.dtype == torch.uint8
    scaled = data(drawn, Resize(16, 8), pixels.centre(24), normalize=((1, 2, 3), (4, 5, 6)))[0].frames
    shape = (3, 1, 1, 1)
    torch.testing.assert_close(
        scaled, (raw - torch.tensor([1.0, 2, 3]).view(shape)) / torch.tensor([4.0, 5, 6]).view(shape)
    )


def test_frames_are_those_of_the_plan(drawn):
    clip = data(drawn, Windows(16, 8, 1, overlap=0), pixels.centre(32), normalize=None)[1]
    path = drawn[1][clip.video_id]
    torch.testing.assert_close(clip.frames.transpose(0, 1), videos.read(path, range(16, 32), short_side=32))
    assert clip.timing.offset == 16


def test_videos_that_are_kept_are_decoded_once(drawn, monkeypatch):
    keys = [(turn, index) for turn in range(3) for index in range(3)]
    plain, kept, decoded = data(drawn, training=True), data(drawn, training=True, keep=True), []
    expected, read_file = [plain[key] for key in keys], videos.read
    monkeypatch.setattr(
        videos, "read", lambda path, *args, **options: decoded.append(path) or read_file(path, *args, **options)
    )
    assert all(same(kept[key], clip) for key, clip in zip(keys, expected, strict=True))
    assert sorted(decoded) == sorted(drawn[1].values())


def test_all_frames_of_a_clip_are_changed_alike():
    still = torch.randint(0, 255, (1, 3, 40, 40), dtype=torch.uint8).expand(6, -1, -1, -1)
    for scale in ((0.08, 1.0), None):
        made = pixels.augmentation(24, scale=scale, jitter=0.4)(still)
        assert made.shape == (6, 3, 24, 24)
        assert (made == made[:1]).all()
    changed = {tuple(pixels.augmentation(24, jitter=0.4)(still)[0].flatten().tolist()) for _ in range(5)}
    assert len(changed) == 5


def same(one, two):
    return torch.equal(one.frames, two.frames) and torch.equal(one.segments, two.segments) and one.timing == two.timing


def test_randaugment_does_the_same_to_all_frames_of_a_clip():
    """Two operations of nine tenths of their strength, drawn anew for each clip."""
    still = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8).expand(4, -1, -1, -1)
    plain, drawn = (pixels.augmentation(24, scale=None, flip=False, operations=n) for n in (0, 2))
    assert torch.equal(plain(still), still)
    made = [drawn(still) for _ in range(12)]
    assert all(torch.equal(clip[0], frame) for clip in made for frame in clip)
    assert all(clip.dtype == torch.uint8 for clip in made)
    assert len({tuple(clip[0].flatten().tolist()) for clip in made}) > 4
    (operations,) = (step for step in drawn.transforms if isinstance(step, v2.RandAugment))
    assert (operations.num_ops, operations.magnitude / (operations.num_magnitude_bins - 1)) == (2, 0.9)


def test_an_item_is_the_same_again_and_differs_between_passes(drawn):
    one, two = data(drawn, seed=3), data(drawn, seed=3)
    torch.manual_seed(0)
    first = one[2, 1]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(first, two[2, 1])
    assert torch.equal(state, torch.get_rng_state())  # the caller's random numbers are left alone
    assert not same(first, one[3, 1])
    assert not same(first, data(drawn, seed=4)[2, 1])
    assert same(one[1], one[0, 1])


def test_workers_load_the_same(drawn):
    keys = [[(0, 0), (0, 1)], [(0, 2), (1, 0)]]
    alone = list(DataLoader(data(drawn), batch_sampler=keys, collate_fn=collate))
    helped = list(DataLoader(data(drawn), batch_sampler=keys, collate_fn=collate, num_workers=1))
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one.frames, two.frames)
        assert one.timings == two.timings


def test_a_batch(drawn):
    dataset = data(drawn)
    batch = collate([dataset[0], dataset[1]])
    assert len(batch) == 2
    assert batch.frames.shape == (2, 3, 16, 24, 24)
    assert batch.mask.shape == (2, 8)
    assert batch.features is None
    assert batch.video_ids == tuple(v.id for v in drawn[0].videos[:2])
    moved = batch.to("meta")
    assert {moved.frames.device.type, moved.segments[1].device.type, moved.labels[0].device.type} == {"meta"}
    assert moved.timings == batch.timings


def test_training_leaves_videos_without_actions_out(drawn):
    annotations, files = drawn
    empty = Annotations(
        (*annotations.videos[:1], Video(annotations.videos[1].id, "training", 5.0, ())), annotations.classes
    )
    assert len(Clips(empty, files, Resize(8, 8), pixels.centre(32), training=True)) == 1
    assert len(Clips(empty, files, Resize(8, 8), pixels.centre(32))) == 2


def test_files_that_are_missing_or_broken_are_named(drawn, tmp_path):
    annotations, files = drawn
    names = [v.id for v in annotations.videos]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.warns(videos.VideoWarning, match=r"1 videos are left out:\n  .*broken\.mp4: it cannot be opened"):
        dataset = Clips(annotations, {names[0]: files[names[0]], names[2]: broken}, Resize(8, 8), pixels.centre(32))
    assert dataset.missing == (names[1],)
    assert list(dataset.unreadable) == [names[2]]
    assert len(dataset) == 1
    with pytest.raises(ValueError, match="no clips: of 3 videos 3 have no file, 0 cannot be opened"):
        Clips(annotations, {}, Resize(8, 8), pixels.centre(32))


def test_a_file_that_breaks_later_is_passed_over(drawn, tmp_path):
    annotations, files = drawn
    name = annotations.videos[0].id
    copy = tmp_path / "v.mp4"
    copy.write_bytes(files[name].read_bytes())
    broken = {**files, name: copy}
    training = Clips(annotations, broken, Resize(8, 4), pixels.centre(32), training=True)
    testing = Clips(annotations, broken, Resize(8, 4), pixels.centre(32), short_side=32, normalize=None)
    copy.write_bytes(b"gone")
    with pytest.warns(videos.VideoWarning, match=f"video '{name}' cannot be read, another is taken: .*v.mp4"):
        assert training[0].video_id == annotations.videos[1].id
    with pytest.warns(videos.VideoWarning, match="the clip is left black"):
        clip = testing[0]
    assert (clip.video_id, clip.mask.tolist(), clip.frames.max().item()) == (name, [True, False, False, False], 0)
    assert clip.frames.shape == (3, 8, 32, 32)


def test_a_truncated_file_keeps_its_grid(tmp_path):
    path = synthetic.synthesize(tmp_path, videos=1, size=64, seconds=(8.0, 8.0), noise=30.0)
    found = read(path)
    name = found.videos[0].id
    whole = videos.find(tmp_path)[name]
    front = tmp_path / "front.mp4"  # with its table in front, so that what follows may be cut off
    with av.open(str(whole)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    content = front.read_bytes()
    expected = Clips(found, {name: front}, Resize(16, 8), pixels.centre(64), normalize=None)[0]
    videos.index.cache_clear()
    front.write_bytes(content[: len(content) // 2])
    with pytest.warns(videos.VideoWarning, match="frames cannot be decoded"):
        clip = Clips(found, {name: front}, Resize(16, 8), pixels.centre(64), normalize=None)[0]
    assert torch.equal(clip.segments, expected.segments)
    same_frames = (clip.frames == expected.frames).all(0).flatten(1).all(1)
    assert same_frames[:6].all()
    assert not same_frames[-1]
