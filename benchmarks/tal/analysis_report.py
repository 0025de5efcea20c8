"""An analysis of errors as text, as a picture, and as one HTML file that holds both."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.tal.analysis import KINDS, Analysis

_COLOURS = ("#228833", "#66ccee", "#ee6677", "#ccbb44", "#aa3377", "#bbbbbb")

Rows = Sequence[Sequence[str]]


def tables(found: Analysis) -> Iterator[tuple[str, Rows]]:
    """(what it shows, rows with their heading first), shares in per cent."""
    profile = [[f"{number}G", *(f"{100 * share:.1f}" for share in row)] for number, row in enumerate(found.profile, 1)]
    yield (
        f"Detections by rank, in multiples of a class's segments (G), at tIoU {found.threshold:g}",
        [["rank", *KINDS], *profile],
    )
    gains = [[kind, f"{100 * gain:+.2f}"] for kind, gain in found.gains.items()]
    yield f"Normalised mAP, {100 * found.map:.2f}, without what is false", [["without", "gain"], *gains]
    parts = [[p.trait, p.name, str(p.segments), f"{100 * p.map:.2f}", f"{100 * p.missed:.1f}"] for p in found.parts]
    whole = ["all", "", str(sum(p.segments for p in found.parts if p.trait == found.parts[0].trait))]
    yield (
        "Segments by what they are",
        [
            ["trait", "part", "segments", "normalised mAP", "missed"],
            *parts,
            [*whole, f"{100 * found.map:.2f}", f"{100 * found.missed:.1f}"],
        ],
    )


def text(found: Analysis) -> str:
    """All tables, in columns."""
    lines = []
    for title, rows in tables(found):
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines += [title, *("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows), ""]
    return "\n".join(lines).rstrip()


def write(found: Analysis, folder: Path) -> tuple[Path, Path, Path]:
    """``analysis.json``, ``.png`` and ``.html`` in a folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture, page = (folder / f"analysis.{ending}" for ending in ("json", "png", "html"))
    data.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    draw(found).savefig(picture, dpi=150)
    page.write_text(_page(found, picture.read_bytes()), encoding="utf-8")
    return data, picture, page


def draw(found: Analysis) -> Figure:
    """The profile, what leaving errors out gains, and both figures of each part."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    (profile, gains), (worth, missed) = figure.subplots(2, 2)
    bottom = [0.0] * len(found.profile)
    ranks = [f"{number}G" for number in range(1, len(found.profile) + 1)]
    for kind, colour, shares in zip(KINDS, _COLOURS, 100 * found.profile.T, strict=True):
        profile.bar(ranks, shares, bottom=bottom, color=colour, label=kind)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    profile.set(ylabel="% of detections", title=f"Detections by rank, tIoU {found.threshold:g}")
    profile.legend(fontsize=7)
    gains.bar(list(found.gains), [100 * gain for gain in found.gains.values()], color=_COLOURS[1:])
    gains.set(ylabel="normalised mAP (points)", title="Gain without false detections")
    names = [f"{part.trait}\n{part.name}" for part in found.parts]
    for axes, values, whole, title in (
        (worth, [part.map for part in found.parts], found.map, "Normalised mAP (%)"),
        (missed, [part.missed for part in found.parts], found.missed, "Segments that are missed (%)"),
    ):
        axes.bar(range(len(names)), [100 * value for value in values], color="#4477aa")
        axes.axhline(100 * whole, color="#888888", linestyle="--")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axes.set_title(title)
    return figure


def _page(found: Analysis, picture: bytes) -> str:
    body = []
    for title, rows in tables(found):
        head, *rest = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for row, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True)
        )
        lines = "\n".join(f"<tr>{row}</tr>" for row in (head, *rest))
        body.append(f"<h2>{escape(title)}</h2>\n<table>\n{lines}\n</table>")
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Errors</title><style>
body {{ font: 13px sans-serif; margin: 2em }}
td, th {{ padding: 1px 8px; text-align: right }}
tr:nth-child(even) {{ background: #f4f4f4 }}
img {{ max-width: 100% }}
</style></head><body>
<h1>Errors</h1>
<img alt="The same in pictures" src="data:image/png;base64,{image}">
{chr(10).join(body)}
</body></html>
"""
