"""Videos that are drawn: real MP4 files with annotations in ActivityNet's form, any number of them, from a seed.

Patches act before a cluttered, drifting, noisy background. Each kind of action has a twin that looks the same in every
frame and differs only in the direction of its motion or the order of its colours:

    rise        stripes move up        its twin's move down
    advance     stripes move right     its twin's move left
    sequence    red, green, blue, …    its twin is blue, green, red, …

Twins, and patches that stand or tremble, come more often than actions do and at the same time. So neither what a single
frame shows nor the amount of motion tells an action from what is none; a backbone has to be trained on it. Mirrored,
what advances is its twin: clips of these videos must not be flipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

FPS = 10
ACTIONS = ("advance", "rise", "sequence")
TEST_EVERY = 3
"""One video of so many is for validation; the others are for training."""

RADIUS = 0.23
"""Of a patch that acts, as a share of the picture."""

Floats = NDArray[np.float32]
THREE = np.array([[230, 50, 50], [50, 230, 50], [60, 80, 240]], dtype=np.float32)


@dataclass(frozen=True)
class Act:
    """Something that a patch does from ``start`` to ``end`` seconds. ``forward``: it is the action ``kind``, otherwise
    its twin.
    """

    kind: str
    forward: bool
    start: float
    end: float


def synthesize(
    folder: Path | str,
    *,
    videos: int = 90,
    seed: int = 0,
    size: int = 64,
    seconds: tuple[float, float] = (10.0, 14.0),
    noise: float = 12.0,
    progress: bool = False,
) -> Path:
    """Draw videos, and write them to ``folder/videos`` with their annotations in ``folder/annotations.json``, whose
    path is returned.

    Args:
        folder: where; made where it is missing.
        videos: how many; every third is for validation. Video i depends on the seed and i alone.
        seed: of all random choices.
        size: pixels of either side.
        seconds: shortest and longest video.
        noise: standard deviation of each pixel's noise in each frame, in steps of 255.
        progress: show a progress bar.
    """
    (Path(folder) / "videos").mkdir(parents=True, exist_ok=True)
    database = {}
    for number in track(range(videos), "drawing videos", disable=not progress):
        name = f"synthetic_{number:05}"
        rng = np.random.default_rng([seed, number])
        frames = round(rng.uniform(*seconds) * FPS)
        acts = script(frames / FPS, rng)
        encode(draw(acts, frames, size, noise, rng), Path(folder, "videos", f"{name}.mp4"))
        database[name] = _entry(number, frames, acts)
    path = Path(folder) / "annotations.json"
    path.write_text(json.dumps({"version": "synthetic", "database": database}, indent=1) + "\n")
    return path


def _entry(number: int, frames: int, acts: Sequence[Act]) -> dict[str, Any]:
    actions = [
        {"label": act.kind, "segment": [act.start, act.end]} for act in acts if act.forward and act.kind in ACTIONS
    ]
    subset = "validation" if number % TEST_EVERY == TEST_EVERY - 1 else "training"
    return {"subset": subset, "duration": frames / FPS, "fps": FPS, "frames": frames, "annotations": actions}


# -- what happens ------------------------------------------------------------------------------------------------------


def script(duration: float, rng: np.random.Generator) -> list[Act]:
    """Three rows of acts, one after the other with breaks: the first row's are actions more often than not, the others'
    never.
    """
    acts = []
    for chance in (0.6, 0.0, 0.0):
        clock = rng.uniform(0.0, 1.5)
        while (length := rng.uniform(1.0, 1.0 + 3.5 * rng.random())) and clock + length <= duration:
            kind = str(rng.choice(ACTIONS))
            forward = bool(rng.random() < chance)
            if not forward and rng.random() < 0.3:
                kind = str(rng.choice(["stand", "tremble"]))
            acts.append(Act(kind, forward, round(clock, 1), round(clock + length, 1)))
            clock += length + rng.uniform(0.3, 2.0)
    return acts


# -- what is seen ------------------------------------------------------------------------------------------------------


def draw(acts: Sequence[Act], frames: int, size: int, noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """(frames, size, size, 3)"""
    film = _background(frames, size, rng)
    for act in sorted(acts, key=lambda act: act.forward):  # actions in front, so that nothing hides them
        _perform(film, act, rng)
    film += rng.normal(0, noise, film.shape).astype(np.float32)
    return film.clip(0, 255).astype(np.uint8)


def _background(frames: int, size: int, rng: np.random.Generator) -> Floats:
    """A blurred pattern larger than the picture that drifts, and patches that stand in it: (frames, size, size, 3)."""
    margin = size // 4
    pattern = _blurred(rng.uniform(30, 200, (7, 7, 3)), size + margin)
    for _ in range(rng.integers(3, 7)):
        patch = Patch.random(rng, size, rng.uniform(0, size + margin, 2), radius=0.1)
        _paint(
            pattern[None], patch.cover(size + margin), patch.look(size + margin, str(rng.choice(ACTIONS)), np.zeros(1))
        )
    turn, speed = rng.uniform(0, 2 * math.pi, 2), rng.uniform(0.5, 1.5, 2) / FPS
    shift = np.round(margin / 2 * (1 + np.sin(turn + speed * np.arange(frames)[:, None]))).astype(int)
    return np.stack([pattern[y : y + size, x : x + size] for y, x in shift])


def _blurred(coarse: NDArray[np.float64], size: int) -> Floats:
    """A coarse pattern (k, k, 3) stretched to (size, size, 3), linearly."""
    at = np.linspace(0, len(coarse) - 1, size)
    low = np.minimum(at.astype(int), len(coarse) - 2)
    part = (at - low)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part.reshape(1, -1, 1)
    return (rows[:, low] * (1 - part) + rows[:, low + 1] * part).astype(np.float32)


@dataclass(frozen=True)
class Patch:
    """A shape at a ``place`` (down, right), stripes of length ``wave`` in two ``colours``, and which of three colours
    it begins with.
    """

    shape: str
    place: NDArray[np.float64]
    radius: float
    wave: float
    colours: Floats
    first: int

    @classmethod
    def random(cls, rng: np.random.Generator, size: int, place: NDArray[np.float64], radius: float) -> Patch:
        """A patch of about so large a ``radius``, as a share of the picture."""
        dark, light = rng.uniform(0, 90, 3), rng.uniform(165, 255, 3)
        colours = np.stack([dark, light]).astype(np.float32)
        shape = str(rng.choice(["disc", "square", "diamond"]))
        return cls(
            shape,
            place,
            rng.uniform(0.85, 1.15) * radius * size,
            rng.uniform(0.14, 0.2) * size,
            colours,
            int(rng.integers(3)),
        )

    def cover(self, size: int) -> Floats:
        """How far each pixel is covered, (1, size, size)."""
        down, right = np.abs(np.indices((size, size), dtype=np.float32) - self.place.astype(np.float32)[:, None, None])
        distance = {
            "disc": np.hypot(down, right),
            "square": np.maximum(down, right) * 1.13,
            "diamond": (down + right) * 0.8,
        }[self.shape]
        return (self.radius - distance + 0.5).clip(0, 1)[None]

    def look(self, size: int, kind: str, turns: NDArray[np.float64]) -> Floats:
        """What it shows after so many ``turns`` (frames,) of its stripes or colours: (frames, size, size, 3) or
        (frames, 1, 1, 3).
        """
        if kind == "sequence":
            return THREE[(self.first + np.floor(3 * turns).astype(int)) % 3][:, None, None]
        down, right = np.indices((size, size), dtype=np.float32)
        along = -down if kind == "rise" else right
        light = 0.5 + 0.5 * np.sin(2 * math.pi * (along / self.wave - turns[:, None, None].astype(np.float32)))
        return self.colours[0] + light[..., None] * (self.colours[1] - self.colours[0])


def _paint(film: Floats, cover: Floats, look: Floats) -> None:
    """Lay what a patch shows over what it covers, in place."""
    film += cover[..., None] * (look - film)


def _perform(film: Floats, act: Act, rng: np.random.Generator) -> None:
    """Draw an act into its frames."""
    first, last = round(act.start * FPS), min(round(act.end * FPS), len(film))
    size = film.shape[1]
    patch = Patch.random(rng, size, rng.uniform(0.2, 0.8, 2) * size, radius=RADIUS)
    kind = act.kind if act.kind in ACTIONS else str(rng.choice(ACTIONS))
    _paint(film[first:last], patch.cover(size), patch.look(size, kind, _turns(act, kind, last - first, rng)))


def _turns(act: Act, kind: str, frames: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How far stripes or colours have gone at each frame. A twin's time runs backwards."""
    begin, speed = rng.random(), rng.uniform(0.8, 1.3) if kind == "sequence" else rng.uniform(1.5, 2.5)
    if act.kind == "stand":
        return np.full(frames, begin)
    if act.kind == "tremble":
        return begin + rng.uniform(-0.3, 0.3, frames)
    return begin + (1 if act.forward else -1) * speed * np.arange(frames) / FPS


# -- files -------------------------------------------------------------------------------------------------------------


def encode(frames: NDArray[np.uint8], path: Path | str) -> None:
    """Write frames (frames, height, width, 3) as H.264 in MP4, with a frame every second at which decoding can
    start.
    """
    # x264's lookahead runs beside the encoder, and what it has seen by then changes what is written; without it, files
    # repeat.
    options = {
        "crf": "18",
        "preset": "veryfast",
        "g": str(FPS),
        "x264-params": "sync-lookahead=0:rc-lookahead=0:mbtree=0",
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
