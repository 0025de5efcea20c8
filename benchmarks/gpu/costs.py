"""Seconds and peak bytes of a step: stored activations, checkpointing, the plain call, the paper's coupling, and
budgets.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import revwire
from benchmarks.gpu.device import first_line, peaks, settled
from benchmarks.gpu.subjects import Setting, Subject, subject
from benchmarks.harness.record import Row
from benchmarks.memory.steps import step
from revwire.measure import paired_seconds

STORED, CHECKPOINT, PLAIN, RE2TAL = "stored activations", "checkpointing", "revwire", "revwire re2tal"
SAME, BETWEEN = "revwire, checkpointing's bytes as budget", "revwire, half-way to stored as budget"
NETWORKS = "ViT-L/16", "Swin3D-B", "Llama-like, 8k tokens", "Llama-like, 32k tokens"
CLIPS = "Re2Swin-T and ActionFormer"
MOST_SECONDS, ROUNDS = 8.0, 9
"""For the timed rounds of the methods that take turns; slow ones have fewer, but never less than two."""

Step = Callable[[], object]
Method = Callable[[nn.Module, Tensor], nn.Module]


def plain(model: nn.Module, x: Tensor) -> nn.Module:
    """The plain call."""
    return revwire.convert(twin(model), x)


def re2tal(model: nn.Module, x: Tensor) -> nn.Module:
    """The paper's coupling, wherever there is a chain."""
    return revwire.convert(twin(model), x, coupling="re2tal")


METHODS: dict[str, Method] = {
    STORED: lambda model, x: model,
    CHECKPOINT: lambda model, x: revwire.rival(model, x).model,
    PLAIN: plain,
    RE2TAL: re2tal,
}


def twin(model: nn.Module) -> nn.Module:
    """A copy on the very same weights and buffers: all methods have one ``.grad``."""
    return copy.deepcopy(model, {id(t): t for t in chain(model.parameters(), model.buffers())})


def rows(network: str, setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per method on a network: first those without a budget, then those whose budgets follow from them."""
    device, found = setting.device, subject(network, setting)
    base: Row = {"network": network, "batch": found.batch, "length": found.length}
    model, x = found.made(device), found.input(device)
    one = partial(_step, found, device)
    first = list(_in_turn(METHODS, model, x, one, found, device))
    yield from (base | row for row in first)
    most = {row["method"]: row["peak_bytes"] for row in first}
    if not most[CHECKPOINT]:
        return
    budgets = {SAME: most[CHECKPOINT]}
    if most[STORED]:
        budgets[BETWEEN] = (most[CHECKPOINT] + most[STORED]) // 2
    methods: dict[str, Method] = {CHECKPOINT: METHODS[CHECKPOINT]}
    methods |= {name: partial(_planned, budget) for name, budget in budgets.items()}
    for row in _in_turn(methods, model, x, one, found, device):
        if row["method"] != CHECKPOINT:
            yield base | row | {"budget_bytes": budgets[row["method"]]}


def clips(setting: Setting, done: set[str]) -> Iterator[Row]:
    """A row per way of keeping activations, at the shapes of a published configuration."""
    from benchmarks.tal import costs
    from benchmarks.tal.config import load

    config = load("synthetic", SMALL_CLIPS) if setting.tiny else load("thumos14_re2swin_t_actionformer")
    batch = config.training.batch
    base: Row = {"network": CLIPS, "batch": batch, "length": config.sampling.frames}
    data = costs.noise(config, batch, setting.device)
    memories = {STORED: "stored", CHECKPOINT: "checkpoint", PLAIN: "leanest", RE2TAL: "re2tal"}

    def make(memory: str, *_: Any) -> nn.Module:
        return costs.network(replace(config, memory=memory), 20, setting.device)

    def one(model: nn.Module, batch: Any) -> None:
        costs.step(model, batch, "bf16-mixed")()

    methods = {name: partial(make, memory) for name, memory in memories.items()}
    for row in _in_turn(methods, None, data, one, None, setting.device):
        yield base | row


SMALL_CLIPS = (
    *("sampling.frames=16", "sampling.steps=8", "sampling.short_side=18", "sampling.crop=16", "sampling.stride=4"),
    "backbone.options={embed_dim: 8, depths: [2], num_heads: [2], window_size: [2, 2, 2], drop_path_rate: 0.2, "
    "weight_std: 0.02}",
    "actionformer={channels: 16, levels: 2, window: 3, max_steps: 8, loss_normalizer: 4, head_layers: 1}",
    "training.batch=2",
)
"""The drawn videos of `benchmarks.tal`, in seconds."""


def _planned(budget: int, model: nn.Module, x: Tensor) -> nn.Module:
    return revwire.convert(twin(model), x, memory_budget=budget)


def _step(found: Subject, device: torch.device, model: nn.Module, x: Tensor) -> None:
    step(model, x, lambda: found.around(device))


def _in_turn(
    methods: dict[str, Any],
    model: Any,
    x: Any,
    one: Callable[[Any, Any], None],
    found: Subject | None,
    device: torch.device,
) -> Iterator[Row]:
    """Peaks of each method, then seconds of those that fit, taking turns."""
    steps: dict[str, Step] = {}
    rows: dict[str, Row] = {}
    for name, method in methods.items():
        rows[name] = {"case": name, "method": name}
        rows[name] |= dict.fromkeys(
            ("peak_bytes", "reserved_bytes", "convert_seconds", "seconds", "to_checkpointing", "reason")
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                start = perf_counter()
                with found.around(device) if found else nullcontext():
                    changed = method(model, x)
                rows[name]["convert_seconds"] = perf_counter() - start
                run = partial(one, changed, x)
                rows[name] |= peaks(run, device)
                steps[name] = run
        except Exception as error:  # noqa: BLE001 - a record says why, and the next method is measured
            rows[name]["reason"] = first_line(error)
        settled(device)
    if steps:
        start = perf_counter()
        paired_seconds(steps, 0, device)
        rounds = max(2, min(ROUNDS if device.type == "cuda" else 2, int(MOST_SECONDS / (perf_counter() - start))))
        timings = paired_seconds(steps, rounds, device)
        for name in steps:
            ratio = asdict(timings.ratio(name, CHECKPOINT)) if CHECKPOINT in steps else None
            rows[name] |= {"seconds": asdict(timings.seconds(name)), "to_checkpointing": ratio, "rounds": rounds}
    yield from rows.values()
