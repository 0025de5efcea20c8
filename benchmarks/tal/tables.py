"""The tables of temporal action localization: published recipes beside what was run here, comparisons, memory by
frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

from benchmarks.harness.cells import Table, mib
from benchmarks.harness.record import Row, read

OPENTAD, ADATAD, TRIDET, ACTIONFORMER = (
    f"OpenTAD, configs/{name}" for name in ("re2tal", "adatad", "tridet", "actionformer")
)
PUBLISHED: dict[str, tuple[str, str, str, float | None, str]] = {
    "activitynet_re2swin_t_actionformer": ("ActivityNet-1.3", "Re2Swin-T", "ActionFormer", 36.47, OPENTAD),
    "activitynet_re2slowfast_101_actionformer": ("ActivityNet-1.3", "Re2SlowFast-101", "ActionFormer", 37.55, OPENTAD),
    "activitynet_re2swin_t_vsgn": ("ActivityNet-1.3", "Re2Swin-T", "VSGN", None, ""),
    "activitynet_re2slowfast_101_vsgn": ("ActivityNet-1.3", "Re2SlowFast-101", "VSGN", None, ""),
    "thumos14_re2swin_t_actionformer": ("THUMOS-14", "Re2Swin-T", "ActionFormer", 66.89, OPENTAD),
    "thumos14_re2slowfast_101_actionformer": ("THUMOS-14", "Re2SlowFast-101", "ActionFormer", 70.19, OPENTAD),
    "thumos14_re2swin_t_vsgn": ("THUMOS-14", "Re2Swin-T", "VSGN", None, ""),
    "thumos14_re2slowfast_101_vsgn": ("THUMOS-14", "Re2SlowFast-101", "VSGN", None, ""),
    "activitynet_bdia_swin3d_t_actionformer": (
        "ActivityNet-1.3",
        "Swin3D-T, bdia, no first stage",
        "ActionFormer",
        None,
        "",
    ),
    "thumos14_bdia_swin3d_t_actionformer": ("THUMOS-14", "Swin3D-T, bdia, no first stage", "ActionFormer", None, ""),
    "thumos14_bdia_swin3d_b_actionformer": ("THUMOS-14", "Swin3D-B, bdia, no first stage", "ActionFormer", None, ""),
    "thumos14_bdia_videomae_l_actionformer": (
        "THUMOS-14",
        "VideoMAE-L, bdia, no first stage",
        "ActionFormer",
        None,
        "",
    ),
    "thumos14_adatad_videomae_s_actionformer": ("THUMOS-14", "VideoMAE-S, adapters", "ActionFormer", 69.03, ADATAD),
    "thumos14_adatad_videomae_v2_g_actionformer": (
        "THUMOS-14",
        "VideoMAE v2-g, adapters",
        "ActionFormer",
        77.07,
        ADATAD,
    ),
    "thumos14_full_videomae_s_actionformer": ("THUMOS-14", "VideoMAE-S", "ActionFormer", None, ""),
    "activitynet_adatad_videomae_s_actionformer": (
        "ActivityNet-1.3",
        "VideoMAE-S, adapters",
        "ActionFormer",
        37.81,
        ADATAD,
    ),
    "activitynet_adatad_videomae_v2_g_actionformer": (
        "ActivityNet-1.3",
        "VideoMAE v2-g, adapters",
        "ActionFormer",
        39.86,
        ADATAD,
    ),
    "activitynet_full_videomae_s_actionformer": ("ActivityNet-1.3", "VideoMAE-S", "ActionFormer", None, ""),
    "thumos14_i3d_tridet": ("THUMOS-14", "I3D features", "TriDet", 69.60, TRIDET),
    "activitynet_tsp_tridet": ("ActivityNet-1.3", "TSP features", "TriDet", 36.96, TRIDET),
    "thumos14_i3d_actionformer": ("THUMOS-14", "I3D features", "ActionFormer", 68.44, ACTIONFORMER),
    "activitynet_tsp_actionformer": ("ActivityNet-1.3", "TSP features", "ActionFormer", 37.07, ACTIONFORMER),
    "epic_kitchens_100_slowfast_verb_actionformer": (
        "EPIC-100, verbs",
        "SlowFast features",
        "ActionFormer",
        24.93,
        ACTIONFORMER,
    ),
    "epic_kitchens_100_slowfast_noun_actionformer": (
        "EPIC-100, nouns",
        "SlowFast features",
        "ActionFormer",
        22.33,
        ACTIONFORMER,
    ),
    "ego4d_mq_slowfast_actionformer": ("Ego4D-MQ", "SlowFast features", "ActionFormer", 16.26, ACTIONFORMER),
    "hacs_slowfast_actionformer": ("HACS", "SlowFast features", "ActionFormer", 37.71, ACTIONFORMER),
    "fineaction_videomae_h_actionformer": ("FineAction", "VideoMAE-H features", "ActionFormer", 19.32, ACTIONFORMER),
    "multithumos_i3d_actionformer": ("MultiTHUMOS", "I3D features", "ActionFormer", 39.19, ACTIONFORMER),
    "charades_i3d_actionformer": ("Charades", "I3D features", "ActionFormer", 20.60, ACTIONFORMER),
}
"""Configuration -> data set, backbone, localizer, published average mAP in per cent (None: none is known to us), and
who published it.
"""


def recipes() -> Table:
    """One line per configuration: published, and what runs here gave; empty where nothing was run."""
    head = ["configuration", "data", "backbone", "localizer", "average mAP, published", "average mAP, here"]
    table = [[*head, "peak GiB", "seconds per step", "trained steps"]]
    for name, (data, backbone, localizer, figure, source) in PUBLISHED.items():
        mine = [row for record in read(f"tal_run_{name}") for row in record.results or []]
        published = "" if figure is None else f"{figure:.2f} ({source})"
        table.append(
            [f"`{name}`", data, backbone, localizer, published, *(_run(mine[0]) if mine else ("", "", "", ""))]
        )
    return table


def _run(row: Row) -> tuple[str, str, str, str]:
    figures, peak, seconds = row["figures"], row["peak_bytes"], row["seconds_per_step"]
    return (
        f"{100 * figures['mAP']:.2f}",
        "" if peak is None else f"{peak / 2**30:.2f}",
        f"{seconds:.3f}",
        str(row["steps"]),
    )


def comparison(rows: list[Row]) -> Table:
    """One line per way to keep activations: figures over seeds, and what a step costs."""
    seeds = sorted({row["seed"] for row in rows})
    head = ["activations", "test mAP@0.5, mean", *(f"seed {seed}" for seed in seeds), "average mAP, mean"]
    table = [[*head, "peak MiB of a step", "seconds per step (× stored)", "trained steps"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = {row["seed"]: row for row in rows if row["variant"] == variant}
        half, average = ([row["figures"][key] for row in mine.values()] for key in ("mAP@0.50", "mAP"))
        single = [f"{100 * mine[seed]['figures']['mAP@0.50']:.1f}" if seed in mine else "" for seed in seeds]
        first = next(iter(mine.values()))
        cost = first["cost"]
        peak = "" if cost["peak_bytes"] is None else mib(cost["peak_bytes"])
        figures = [f"{100 * fmean(half):.1f}", *single, f"{100 * fmean(average):.1f}"]
        table.append([variant, *figures, peak, _seconds(cost), str(first["steps"])])
    return table


def _seconds(cost: Row) -> str:
    if cost["seconds"] is None:
        return ""
    ratio = "" if cost["to_stored"] is None else f" ({cost['to_stored']['median']:.2f}×)"
    return f"{cost['seconds']['median']:.3f}{ratio}"


def memory(rows: list[Row]) -> Table:
    """Peak memory by way to keep activations (rows) and frames (columns); what did not fit is said."""
    cases = sorted({(row["batch"], row["frames"]) for row in rows})
    found: Mapping[tuple[str, int, int], Row] = {(row["memory"], row["batch"], row["frames"]): row for row in rows}
    table = [
        [
            "peak MiB of a step",
            *(f"{frames} frames" + (f", batch {batch}" if batch > 1 else "") for batch, frames in cases),
        ]
    ]
    for way in dict.fromkeys(row["memory"] for row in rows):
        peaks = [found[way, batch, frames]["peak_bytes"] for batch, frames in cases]
        table.append([way, *("does not fit" if peak is None else mib(peak, 0) for peak in peaks)])
    return table


def largest(rows: list[Row]) -> Table:
    """The most frames that fit, by way to keep activations."""
    head = ["activations", "clips of a step", "most frames that fit", "to within", ""]
    return [
        head,
        *([r["memory"], str(r["batch"]), str(r["largest_frames"]), str(r["within"]), r["reason"] or ""] for r in rows),
    ]


TABLES: dict[str, Callable[[list[Row]], Table]] = {
    "tal_synthetic": comparison,
    "tal_badminton": comparison,
    "tal_memory_swin_t_64px": memory,
    "tal_memory_videomae_s_adapters_64px": memory,
    "tal_memory_videomae_s_64px": memory,
    "tal_memory_thumos14": memory,
    "tal_largest_thumos14": largest,
    "tal_largest_activitynet": largest,
    "tal_memory_activitynet": memory,
}
SUMMARIES = {"tal_recipes": recipes}
