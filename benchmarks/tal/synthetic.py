"""Videos that are drawn: real MP4 files with annotations in ActivityNet's form, any number of them, from a seed.

Small figures act before a cluttered, drifting, noisy background. Each kind of action has a twin that looks the same in every frame and
differs only in the direction of its motion or the order of its colours:

    clockwise   a figure goes round               its twin goes round the other way
    rise        a figure climbs, again and again  its twin sinks
    sequence    a figure is red, green, blue, …   its twin is blue, green, red, …

Twins, and figures that stand or tremble, come more often than actions do and at the same time. So neither what a single frame shows nor
the amount of motion tells an action from what is none; a backbone has to be trained on it. Mirrored, a clockwise turn is its twin: clips of
these videos must not be flipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from rich.progress import track

FPS = 10
ACTIONS = ("clockwise", "rise", "sequence")
TEST_EVERY = 3
"""One video of so many is for validation; the others are for training."""

Floats = NDArray[np.float32]
COLOURS = np.array([[255, 40, 40], [40, 255, 40], [60, 80, 255]], dtype=np.float32)


@dataclass(frozen=True)
class Act:
    """Something that a figure does from ``start`` to ``end`` seconds. ``forward``: it is the action ``kind``, otherwise its twin."""

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
    """Draw videos, and write them to ``folder/videos`` with their annotations in ``folder/annotations.json``, whose path is returned.

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
    actions = [{"label": act.kind, "segment": [act.start, act.end]} for act in acts if act.forward and act.kind in ACTIONS]
    subset = "validation" if number % TEST_EVERY == TEST_EVERY - 1 else "training"
    return {"subset": subset, "duration": frames / FPS, "fps": FPS, "frames": frames, "annotations": actions}


# -- what happens ------------------------------------------------------------------------------------------------------


def script(duration: float, rng: np.random.Generator) -> list[Act]:
    """Two figures' acts, one after the other with breaks: the first one's are actions in half of the cases, the second one's never."""
    acts = []
    for chance in (0.6, 0.0):
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
    for act in acts:
        _perform(film, act, rng)
    film += rng.normal(0, noise, film.shape).astype(np.float32)
    return film.clip(0, 255).astype(np.uint8)


def _background(frames: int, size: int, rng: np.random.Generator) -> Floats:
    """A blurred pattern larger than the picture that drifts, and figures that stand in it."""
    margin = size // 4
    pattern = _blurred(rng.uniform(30, 170, (7, 7, 3)), size + margin)
    grid = _grid(size + margin)
    for _ in range(rng.integers(6, 12)):
        place = rng.uniform(0, size + margin, 2)
        _paint(pattern[None], _figure(rng, size)(grid, place)[None], rng.uniform(20, 235, 3))
    turn = rng.uniform(0, 2 * math.pi, 2)
    speed = rng.uniform(0.5, 1.5, 2) / FPS
    time = np.arange(frames)[:, None]
    shift = np.round(margin / 2 * (1 + np.sin(turn + speed * time))).astype(int)
    return np.stack([pattern[y : y + size, x : x + size] for y, x in shift])


def _blurred(coarse: NDArray[np.float64], size: int) -> Floats:
    """A coarse pattern (k, k, 3) stretched to (size, size, 3), linearly."""
    at = np.linspace(0, len(coarse) - 1, size)
    low = np.minimum(at.astype(int), len(coarse) - 2)
    part = (at - low)[:, None, None]
    rows = coarse[low] * (1 - part) + coarse[low + 1] * part
    part = part.reshape(1, -1, 1)
    return (rows[:, low] * (1 - part) + rows[:, low + 1] * part).astype(np.float32)


def _grid(size: int) -> Floats:
    return np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).astype(np.float32)


Figure = Callable[[Floats, NDArray[np.float64]], Floats]


def _figure(rng: np.random.Generator, size: int) -> Figure:
    """A random shape: from a grid (h, w, 2) and a place (2,) to how far each pixel is covered (h, w)."""
    radius = rng.uniform(0.07, 0.1) * size
    shape = rng.choice(["disc", "square", "cross", "ring"])

    def cover(grid: Floats, place: NDArray[np.float64]) -> Floats:
        away = np.abs(grid - place.astype(np.float32))
        if shape == "square":
            distance = away.max(-1)
        elif shape == "cross":
            distance = np.maximum(away.max(-1), away.min(-1) + 0.6 * radius)
        else:
            distance = np.hypot(away[..., 0], away[..., 1])
            distance = np.abs(distance - 0.65 * radius) + 0.65 * radius if shape == "ring" else distance
        return (radius - distance + 0.5).clip(0, 1)

    return cover


def _paint(film: Floats, cover: Floats, colour: NDArray[Any]) -> None:
    """Lay a colour (3,) or (frames, 3) over the part of each frame that is covered (frames, h, w), in place."""
    film += cover[..., None] * (np.asarray(colour, dtype=np.float32).reshape(-1, 1, 1, 3) - film)


def _perform(film: Floats, act: Act, rng: np.random.Generator) -> None:
    """Draw an act into its frames."""
    first, last = round(act.start * FPS), min(round(act.end * FPS), len(film))
    size = film.shape[1]
    time = np.arange(last - first) / FPS
    figure, grid = _figure(rng, size), _grid(size)
    centre = rng.uniform(0.3, 0.7, 2) * size
    places = centre + size * _path(act, time if act.forward else -time, rng)
    colours = _colours(act, time, rng)
    cover = np.stack([figure(grid, place) for place in places])
    _paint(film[first:last], cover, colours)


def _path(act: Act, time: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Places (frames, 2), down and right, as shares of the picture, around 0. A twin's time runs backwards."""
    phase, period = rng.random(), rng.uniform(1.0, 1.6)
    turn = time / period + phase
    if act.kind == "clockwise":
        return 0.17 * np.stack([np.sin(2 * math.pi * turn), np.cos(2 * math.pi * turn)], -1)
    if act.kind == "rise":
        return np.stack([0.44 * (0.5 - turn % 1), np.zeros(len(time))], -1)
    if act.kind == "tremble":
        return rng.normal(0, 0.03, (len(time), 2))
    return np.zeros((len(time), 2))


def _colours(act: Act, time: NDArray[np.float64], rng: np.random.Generator) -> Floats:
    """(frames, 3): one for the whole act, or one of three after the other."""
    phase, each = rng.integers(3), rng.uniform(0.25, 0.45)
    order = (phase + (1 if act.forward else -1) * (time / each).astype(int)) % 3
    chosen = COLOURS[order] if act.kind == "sequence" else np.tile(COLOURS[phase], (len(time), 1))
    return chosen * np.float32(rng.uniform(0.7, 1.0))


# -- files -------------------------------------------------------------------------------------------------------------


def encode(frames: NDArray[np.uint8], path: Path | str) -> None:
    """Write frames (frames, height, width, 3) as H.264 in MP4, with a frame every second at which decoding can start."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast", "g": str(FPS), "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
