"""Pictures of runs: predicted against true segments, mAP against tIoU, memory against frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness.cells import MIB
from benchmarks.harness.figures import drawing, saved
from benchmarks.tal.annotations import Video

Detection = Mapping[str, Any]
"""``{"segment": [start, end], "label": name, "score": number}``, in seconds."""

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")


# -- timelines ---------------------------------------------------------------------------------------------------------


def rows(
    video: Video, detections: Sequence[Detection], classes: Sequence[str], most: int = 20
) -> list[tuple[str, float, float, str, float]]:
    """(kind, start, end, label, score) of what a timeline shows: the true segments, then the ``most`` best
    detections.
    """
    true = [("true", s.start, s.end, classes[s.label], 1.0) for s in video.segments]
    best = sorted(detections, key=lambda d: -d["score"])[:most]
    return true + [("predicted", *map(float, d["segment"]), str(d["label"]), float(d["score"])) for d in best]


def timeline(video: Video, detections: Sequence[Detection], classes: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Draw a video's true and predicted segments as ``timeline_ID.png`` and ``.html`` in ``folder``; returns both
    paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = rows(video, detections, classes)
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(dict.fromkeys(row[3] for row in shown))}
    name = video.id.replace("/", "_")
    png, html = (folder / f"timeline_{name}.{ending}" for ending in ("png", "html"))
    _draw(video, shown, colours).savefig(png, dpi=150)
    html.write_text(_page(video, shown, colours), encoding="utf-8")
    return png, html


def predicted(name: str, detections: Sequence[Detection], folder: Path) -> tuple[Path, Path]:
    """As `timeline`, for a video without annotations: it is drawn up to its last detection."""
    end = max((float(d["segment"][1]) for d in detections), default=1.0)
    return timeline(Video(name, "testing", end, ()), detections, (), folder)


def _draw(video: Video, shown: Sequence[tuple[str, float, float, str, float]], colours: Mapping[str, str]) -> Figure:
    figure, axes = drawing((9, 1.2 + 0.22 * len(shown)))
    for line, (kind, start, end, label, score) in enumerate(shown):
        axes.barh(
            -line,
            end - start,
            left=start,
            height=0.8,
            color=colours[label],
            alpha=1.0 if kind == "true" else 0.25 + 0.75 * score,
        )
        text = f"{label} (true)" if kind == "true" else f"{label} {score:.2f}"
        axes.annotate(text, (start, -line), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7)
    axes.set(xlim=(0, video.duration), xlabel="seconds", yticks=[], title=video.id)
    return figure


def _page(video: Video, shown: Sequence[tuple[str, float, float, str, float]], colours: Mapping[str, str]) -> str:
    bars = []
    for kind, start, end, label, score in shown:
        text = f"{label}, true" if kind == "true" else f"{label}, score {score:.3f}"
        place = f"left:{100 * start / video.duration:.3f}%;width:{100 * (end - start) / video.duration:.3f}%"
        look = f"background:{colours[label]};opacity:{1.0 if kind == 'true' else 0.25 + 0.75 * score:.2f}"
        tip = escape(f"{text}: {start:.2f} to {end:.2f} s")
        bars.append(
            f'<div class="row {kind}"><div class="bar" style="{place};{look}" '
            f'title="{tip}"></div><span>{escape(text)}</span></div>'
        )
    name = escape(video.id)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 13px sans-serif; margin: 2em }}
.row {{ position: relative; height: 18px; margin: 2px 0; background: #f4f4f4 }}
.true {{ outline: 1px solid #888 }}
.bar {{ position: absolute; top: 0; bottom: 0 }}
.row span {{ position: relative; padding-left: 4px; pointer-events: none }}
</style></head><body>
<h1>{name}</h1>
<p>0 to {video.duration:.2f} seconds; outlined rows are annotated, the others predicted, best first.
Point at a bar for its times.</p>
{chr(10).join(bars)}
</body></html>
"""


def table(found: Mapping[str, Sequence[Detection]], most: int = 5) -> str:
    """The ``most`` best detections of each video as lines of text: start, end, score, label."""
    lines = []
    for name, detections in found.items():
        best = sorted(detections, key=lambda d: -d["score"])[:most]
        lines.append(f"{name}: {len(detections)} detections" + (f", the best {most}" if len(detections) > most else ""))
        lines += [f"  {d['segment'][0]:8.2f} to {d['segment'][1]:8.2f} s  {d['score']:.3f}  {d['label']}" for d in best]
    return "\n".join(lines)


# -- curves ------------------------------------------------------------------------------------------------------------


def map_curve(results: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draw mAP against tIoU: ``results`` is run -> (tIoU, as text -> mAP)."""
    figure, axes = drawing((5, 3.5))
    for name, curve in results.items():
        axes.plot([float(t) for t in curve], [100 * m for m in curve.values()], marker="o", label=name)
    axes.set(xlabel="tIoU", ylabel="mAP (%)", ylim=(0, 100))
    return saved(figure, axes, path)


def memory_curve(measured: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw peak memory against frames, from rows with ``memory``, ``frames`` and ``peak_bytes``."""
    figure, axes = drawing((5, 3.5))
    for memory in dict.fromkeys(row["memory"] for row in measured):
        mine = sorted(
            (row["frames"], row["peak_bytes"] / MIB)
            for row in measured
            if row["memory"] == memory and row["peak_bytes"]
        )
        axes.plot(*zip(*mine, strict=True), marker="o", label=memory)
    axes.set(xlabel="frames of a clip", ylabel="peak MiB of a step", ylim=(0, None))
    return saved(figure, axes, path)
