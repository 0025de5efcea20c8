"""Video files: frames at exact places in every container, and what is wrong with files that are corrupt, truncated or
missing.
"""

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.tal.annotations import Annotations, Video

av = pytest.importorskip("av")
from benchmarks.tal import audit, videos  # noqa: E402  needs av
from benchmarks.tal.videos import VideoError, VideoWarning  # noqa: E402

DATA = os.environ.get("REVWIRE_DATA")
COUNT, SIZE = 90, 64
KINDS = {
    "b-frames.mp4": ("libx264", {"g": "25", "bf": "3", "crf": "10"}),
    "open-gop.mp4": ("libx264", {"g": "20", "bf": "3", "x264-params": "open-gop=1", "crf": "10"}),
    "one-start.mkv": ("libx264", {"g": "250", "crf": "10"}),
    "all-starts.mov": ("libx264", {"g": "1", "crf": "10"}),
    "mpeg4.avi": ("mpeg4", {"g": "12", "q": "2"}),
    "fast-start.mp4": ("libx264", {"g": "25", "crf": "10"}),
}


def picture(number):
    """A frame that shows its number: eight bits as black or white bars above, noise below, so that all frames take room
    in a file.
    """
    bits = np.array([255 * (number >> i & 1) for i in range(8)], np.uint8)
    noise = np.random.default_rng(number).integers(0, 255, (SIZE // 2, SIZE), np.uint8)
    return np.concatenate([bits.repeat(SIZE // 8)[None].repeat(SIZE // 2, 0), noise])[..., None].repeat(3, -1)


def shown(frames):
    """The numbers that frames (n, 3, h, w) show."""
    bars = frames[:, :, : frames.shape[2] // 2].float().mean((1, 2)).unflatten(1, (8, -1)).mean(2) > 127
    return (bars * 2 ** torch.arange(8)).sum(1).tolist()


def encode(path, codec="libx264", options=None, stamps=None, rate=25, container_options=None):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(COUNT):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number if stamps is None else stamps[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("videos")
    for name, (codec, options) in KINDS.items():
        encode(
            made / name,
            codec,
            options,
            container_options={"movflags": "faststart"} if name == "fast-start.mp4" else None,
        )
    return made


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_by_its_number(folder, name):
    assert videos.index(folder / name).frames == COUNT
    assert shown(videos.read(folder / name, range(COUNT))) == list(range(COUNT))
    for number in (0, 1, 19, 20, 21, 24, 25, 26, 49, 50, 74, 75, COUNT - 1):
        assert shown(videos.read(folder / name, [number])) == [number]


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(KINDS)), numbers=st.lists(st.integers(0, COUNT - 1), max_size=12))
def test_any_frames_in_any_order(folder, name, numbers):
    found = videos.read(folder / name, numbers)
    assert len(found) == len(numbers)
    assert not numbers or shown(found) == numbers


def test_frames_of_uneven_length(tmp_path):
    stamps = np.cumsum(np.arange(COUNT) % 3 + 1).tolist()
    path = encode(tmp_path / "v.mp4", options={"g": "12", "crf": "10"}, stamps=stamps)
    numbers = [88, 3, 40, 41, 7]
    assert shown(videos.read(path, numbers)) == numbers
    assert videos.index(path).fps == pytest.approx(25 / 2, rel=0.02)


def test_what_a_file_says(folder):
    said = videos.header(folder / "b-frames.mp4")
    assert (said.frames, said.fps, said.width, said.height, said.duration) == (COUNT, 25, SIZE, SIZE, COUNT / 25)
    assert abs(videos.header(folder / "one-start.mkv").frames - COUNT) <= 1
    assert videos.index(folder / "b-frames.mp4").fps == pytest.approx(25)
    assert videos.index(folder / "b-frames.mp4").duration == pytest.approx(COUNT / 25)


def test_frames_are_scaled_to_the_short_side(folder):
    assert videos.read(folder / "b-frames.mp4", [5], short_side=32).shape == (1, 3, 32, 32)
    assert shown(videos.read(folder / "b-frames.mp4", [5, 77], short_side=32)) == [5, 77]


def test_a_frame_that_is_not_there(folder):
    with pytest.raises(IndexError, match=r"frames 3 to 90 were asked for; it has frames 0 to 89"):
        videos.read(folder / "b-frames.mp4", [90, 3])
    with pytest.raises(IndexError, match="frames -1 to -1 were asked for"):
        videos.read(folder / "b-frames.mp4", [-1], lenient=True)


# -- finding -----------------------------------------------------------------------------------------------------------


def test_files_are_found_by_id(tmp_path):
    for name in ("a.mp4", "v_b.MKV", "deep/er/c.webm", "v_c.txt", "d.avi", "deep/d.mp4", "v_v_e.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = videos.find(tmp_path, ["a", "b", "v_c", "d", "nothing"])
    assert {name: str(path.relative_to(tmp_path)) for name, path in found.items()} == {
        "a": "a.mp4",
        "b": "v_b.MKV",
        "v_c": "deep/er/c.webm",
        "d": "deep/d.mp4",  # of two files the one whose extension comes first
    }
    # of one's own videos none is passed over
    assert set(videos.find(tmp_path)) == {"a", "b", "c", "d.avi", "deep/d.mp4", "v_e"}


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder of videos"):
        videos.find(tmp_path / "nowhere")


# -- files that are broken ---------------------------------------------------------------------------------------------


def cut(source, target, share):
    content = source.read_bytes()
    target.write_bytes(content[: int(len(content) * share)])
    return target


def test_no_video_at_all(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"this is no video" * 100)
    with pytest.raises(VideoError, match=r"v\.mp4: it cannot be opened \(Invalid data"):
        videos.header(path)
    assert "it cannot be opened" in audit.fault(path)
    path = tmp_path / "empty.mp4"
    path.touch()
    assert "it cannot be opened" in audit.fault(path)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="it has no video stream"):
        videos.index(path)


def test_truncated_files(folder, tmp_path):
    # without its table at the end an MP4 file is nothing; with the table in front, the frames up to the cut are there
    assert "it cannot be opened" in audit.fault(cut(folder / "b-frames.mp4", tmp_path / "a.mp4", 0.6))
    path = cut(folder / "fast-start.mp4", tmp_path / "b.mp4", 0.5)
    there = videos.index(path).frames
    assert 10 < there < 80
    assert f"it is truncated: {there} of 90 frames are there" in audit.fault(path)
    mkv = cut(folder / "one-start.mkv", tmp_path / "c.mkv", 0.5)
    assert "it is truncated" in audit.fault(mkv)
    with pytest.raises(IndexError, match="it has frames 0 to"):
        videos.read(path, [there])
    with pytest.warns(
        VideoWarning, match=r"b\.mp4: \d+ of 90 frames cannot be decoded, from frame \d+ on; their neighbours are used"
    ):
        frames = shown(videos.read(path, range(90), lenient=True))
    assert frames[: there - 2] == list(range(there - 2))
    assert frames[-1] == frames[there - 1] <= there


def test_damage_in_the_middle(folder, tmp_path):
    content = bytearray((folder / "b-frames.mp4").read_bytes())
    middle = len(content) // 2
    content[middle - 300 : middle + 300] = bytes(600)
    path = tmp_path / "v.mp4"
    path.write_bytes(bytes(content))
    whole = audit.fault(path, thorough=True)
    assert whole is None or "cannot be decoded" in whole  # decoders hide some damage; whichever, reading goes on
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VideoWarning)
        frames = shown(videos.read(path, range(COUNT), lenient=True))
    wrong = [i for i in range(COUNT) if frames[i] != i]
    assert wrong == [] or wrong[-1] - wrong[0] < 30  # from the damage to the next frame at which decoding can start


def test_an_audit_names_them(folder, tmp_path, capsys):
    shutil.copy(folder / "b-frames.mp4", tmp_path / "v_good.mp4")
    shutil.copy(folder / "b-frames.mp4", tmp_path / "longer.mp4")
    cut(folder / "fast-start.mp4", tmp_path / "cut.mp4", 0.5)
    (tmp_path / "broken.mkv").write_bytes(b"no")
    names = {"good": 3.6, "longer": 30.0, "cut": 3.6, "broken": 3.6, "absent": 3.6}
    annotations = Annotations(tuple(Video(name, "training", duration, ()) for name, duration in names.items()), ())
    for thorough in (False, True):
        result = audit.audit(annotations, tmp_path, thorough=thorough, workers=2, progress=not thorough)
        assert list(result.found) == ["good", "longer"]
        assert result.missing == ("absent",)
        assert set(result.faulty) == {"cut", "broken"}
        assert result.lengths == {"longer": (3.6, 30.0)}
    assert "checking videos" in capsys.readouterr().out
    text = str(result)
    assert "2 videos can be read, 1 are missing, 2 are corrupt or truncated" in text
    for line in (
        "missing: absent",
        "broken.mkv: it cannot be opened",
        "cut.mp4: it is truncated",
        "longer: the file has 3.60 s",
    ):
        assert line in text


@pytest.mark.skipif(not DATA, reason="needs real videos: set REVWIRE_DATA")
@pytest.mark.parametrize(
    "name",
    ["activitynet13/videos/v_GGSY1Qvo990.mp4", "clips/k400_arm_wrestling.mp4", "clips/UCF-101_Rowing_g16_c03.avi"],
)
def test_real_videos(name):
    path = Path(DATA, name)
    with av.open(str(path)) as container:
        decoded = [
            f.reformat(width=40, height=30, format="rgb24", interpolation="BILINEAR").to_ndarray()
            for f in container.decode(video=0)
        ]
    assert videos.index(path).frames == len(decoded)
    numbers = np.random.default_rng(0).integers(0, len(decoded), 8)
    full = videos.read(path, numbers)
    for number, frame in zip(numbers, full, strict=True):
        small = torch.nn.functional.interpolate(frame[None].float(), (30, 40), mode="bilinear", antialias=True)[0]
        differences = [
            np.abs(small.permute(1, 2, 0).numpy() - d).mean() for d in decoded[max(0, number - 2) : number + 3]
        ]
        assert differences[min(2, number)] == min(differences)
    assert audit.fault(path) is None
