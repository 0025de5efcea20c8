"""The core once more on the path of an accelerator's tensor: checks read late, the plain form of the arithmetic.

PyTorch's own stand-in for a device (`openreg`) is not among what its wheels hold, so the CPU is treated as one. What
the kernels add is seen by `test_fused_units`.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import revwire
from revwire._forwards.converted import chains_of
from revwire.measure import peak_bytes
from revwire.testing import Step, check_modes
from stand_in import as_accelerator, waits
from toys import Blocks, modes_of

WIDTH = 16
SAMPLES = 6 * 6144
"""Bytes that may be held besides: magnitudes, fingerprints and glances of six units until they are read. One state has
seven times as many.
"""


class Mlp(nn.Module):
    """Two residual adds, the second with an extra input; dropout in the first."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.gate, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x, bias):
        x = x + self.drop(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))
        return x + self.gate(x).tanh() * bias


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x, bias):
        return x + self.second(self.norm(self.first(x)).relu() * bias)


@dataclass(frozen=True)
class Way:
    """A network, and how it runs."""

    name: str
    options: dict[str, Any]
    block: type[nn.Module] = Mlp
    modes: str = ""
    autocast: bool = False
    shape: tuple[int, ...] = field(default=(16, 256, WIDTH))

    def __str__(self):
        return self.name


WAYS = [
    Way("plain", {"coupling": "bdia:1/8"}),
    Way("re2tal", {"coupling": "re2tal"}),
    Way("random signs", {"coupling": "bdia-random"}),
    Way("autocast", {"coupling": "bdia:1/8"}, autocast=True),
    Way("floats, anchors", {"coupling": "re2tal", "exact": False, "anchors": 2}),
    Way("anchors", {"coupling": "bdia:1/8", "anchors": 2}),
    Way("chunks", {"coupling": "bdia:1/8", "chunks": 2}),
    Way("chunks, autocast", {"coupling": "re2tal", "chunks": 2}, autocast=True, shape=(16, 64, WIDTH)),
    Way("modes", {"coupling": "bdia:1/8", "rewire": "everywhere"}, modes="rcprcs"),
    Way(
        "modes, autocast",
        {"coupling": "bdia:1/8", "rewire": "everywhere"},
        modes="rcprcs",
        autocast=True,
        shape=(16, 64, WIDTH),
    ),
    Way("budget", {"coupling": "bdia:1/8", "memory_budget": "least"}),
    Way("convolutions", {"coupling": "bdia:1/8"}, Convolutions, shape=(4, WIDTH, 8, 8)),
    Way("leanest", {}),
]


@pytest.fixture(autouse=True)
def plain_form(monkeypatch):
    monkeypatch.setattr("revwire._streams.kernels.available", lambda: False)


def network(way):
    """The converted network, and its inputs."""
    model = Blocks(way.block).train()
    g = torch.Generator().manual_seed(1)
    channels = (WIDTH, 1, 1) if len(way.shape) == 4 else (WIDTH,)
    inputs = torch.randn(way.shape, generator=g).requires_grad_(), torch.rand(channels, generator=g).requires_grad_()
    revwire.convert(model, inputs, **way.options)
    if way.modes:
        (chain,) = chains_of(model)
        chain.modes, chain.keeps_last = modes_of(way.modes), False
    return model, inputs


def cast(way):
    return torch.autocast("cpu", torch.bfloat16) if way.autocast else nullcontext()


def stepping(model, inputs, way):
    def step():
        torch.manual_seed(3)
        with cast(way):
            loss = model(*inputs).float().square().sum()
        loss.backward()

    return step


class Cast(nn.Module):
    """The network under autocast."""

    def __init__(self, model, way):
        super().__init__()
        self.model, self.way = model, way

    def forward(self, *inputs):
        with cast(self.way):
            return self.model(*inputs)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_bits_peaks_and_waits(way, monkeypatch):
    """As on a CPU, to the bit; as many bytes at the peak; one wait."""
    model, inputs = network(way)
    twin = copy.deepcopy(model)

    def found(model):
        step = stepping(model, inputs, way)
        for _ in range(2):
            step()
        model.zero_grad()
        return Step.of(Cast(model, way), inputs), peak_bytes(step), step

    on_cpu, peak, _ = found(twin)
    as_accelerator(monkeypatch)
    late, late_peak, step = found(model)
    late.assert_like(on_cpu)
    assert late_peak <= peak + SAMPLES
    with waits(monkeypatch) as counted:
        step()
    assert sum(counted.values()) == 1, dict(counted)
    if way.options.get("exact", True):
        rebuilt = Step.of(Cast(copy.deepcopy(model), way), inputs)
        with revwire.stored_activations(model):
            rebuilt.assert_like(Step.of(Cast(model, way), inputs))


@pytest.mark.parametrize("way", WAYS[:7], ids=str)
def test_outputs_are_the_same_in_every_grad_mode(way, monkeypatch):
    as_accelerator(monkeypatch)
    model, inputs = network(way)
    stepping(model, inputs, way)()
    check_modes(Cast(model, way).eval(), inputs)
