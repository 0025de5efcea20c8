"""The sweep over model zoos: its independent count, its rows, and a sample of its models, chosen for their patterns."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import revwire
from benchmarks.zoo import probe, sweep
from benchmarks.zoo import tables as coverage
from benchmarks.zoo.case import Built, Case
from benchmarks.zoo.count import count

pytestmark = pytest.mark.filterwarnings("ignore::revwire.NothingToRewireWarning")
"""Some models have no chain."""

SAMPLE = {  # besides the models of tests/api/test_named_models.py
    # the pattern: (zoo, model, units that must be rewired, at least)
    "pre-norm, behind a convolutional stem": ("timm_models", "vit_tiny_r_s16_p8_224", 24),
    "layer-scale, and two kinds of blocks": ("timm_models", "cait_xxs24_224", 51),
    "post-norm in the branch, shifted windows": ("timm_models", "swinv2_cr_tiny_224", 24),
    "post-activation": ("timm_models", "res2next50", 12),
    "pre-activation": ("timm_models", "resnetv2_18", 2),
    "nested": ("timm_models", "csatv2", 22),
    "scaled skip": ("timm_models", "poolformerv2_s12", 24),
    "two streams of tokens": ("timm_models", "tnt_s_legacy_patch16_224", 48),
    "no chain at all": ("timm_models", "densenet121", 0),
    "convolutions without activation": ("torchvision_models", "mobilenet_v2", 9),
    "pyramid taps, targets, a dict of losses": ("torchvision_models", "retinanet_resnet50_fpn", 12),
    "squeeze and excitation in the branch": ("pytorchvideo_models", "x3d_xs", 22),
    "post-norm, masks": ("huggingface", "BertModel", 6),
    "weights shared across depth": ("huggingface", "AlbertModel", 8),
    "parallel attention and MLP": ("huggingface", "GPTJForCausalLM", 3),
    "rotary tables, RMS norm, a cache in the output": ("huggingface", "LlamaForCausalLM", 6),
    "encoder and decoder, position bias": ("huggingface", "T5Model", 15),
    "encoder and decoder, post-norm": ("huggingface", "BartModel", 15),
    "two towers": ("huggingface", "CLIPModel", 12),
    "image and text, grids as arguments": ("huggingface", "Qwen2VLForConditionalGeneration", 12),
    "half steps": ("huggingface", "Wav2Vec2ConformerModel", 12),
    "U-shape": ("third_party", "smp.Unet(resnet34)", 13),
    "a list of blocks of functions": ("third_party", "x_transformers.Encoder(macaron)", 12),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'saved_variables' is deprecated:DeprecationWarning")  # pytorchvideo's own backward
@pytest.mark.parametrize("pattern", SAMPLE)
def test_a_model_of_the_zoos(pattern):
    zoo, name, units = SAMPLE[pattern]
    model, example = _built(zoo, name)
    before = _evaluated(model, example)
    revwire.convert(model, example, rewire="everywhere")
    assert len(revwire.report(model).units) >= units
    assert revwire.verify(model, example).bit_exact
    revwire.revert(model)
    assert all(torch.equal(a, b) for a, b in zip(before, _evaluated(model, example), strict=True))


def _built(zoo: str, name: str) -> tuple[nn.Module, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a zoo says while it builds a model is its own affair
        try:
            built = sweep.find(zoo, name).build()
        except ImportError:
            if zoo != "third_party":
                raise
            pytest.skip(f"{name.split('.')[0]} is not installed")
    return built.model, built.example


def _evaluated(model: nn.Module, example: Any) -> list[Tensor]:
    args, kwargs = probe.as_call(probe.fresh(example))
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        out = model(*args, **kwargs)
    model.train()
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


# -- the count -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Runs a function of itself and x; has two linear layers and a norm."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.run = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def two(step):
    """The same step twice."""
    return lambda net, x: step(net, step(net, x))


def in_place(net, x):
    x = x * 1
    x += net.a(x)
    x[:] += net.b(x)
    return x


def nested(net, x):
    def inner(y):
        y = y + net.a(y)
        return y + net.b(y)

    x = x + net.a(inner(net.b(x)))
    return x + net.b(inner(net.a(x)))


def rotary(net, x):
    return net.a(x) * x.cos() + torch.cat([-x[..., 4:], x[..., :4]], -1) * x.sin()


COUNTS = {
    # name: (run, (adds found, in chains, nested))
    "pre-norm": (two(lambda net, x: x + net.a(net.norm(x))), (2, 2, 0)),
    "post-norm": (two(lambda net, x: net.norm(x + net.a(x))), (2, 2, 0)),
    "post-activation": (two(lambda net, x: F.relu(net.a(x) + x)), (2, 2, 0)),
    "layer-scale": (two(lambda net, x: torch.addcmul(x, net.a(x), net.norm.weight)), (2, 2, 0)),
    "scaled skip": (two(lambda net, x: x * 0.5 * net.norm.weight + net.a(x)), (2, 2, 0)),
    "dropped-out skip": (two(lambda net, x: F.dropout(x, 0.5) + net.a(x)), (2, 2, 0)),
    "through views": (two(lambda net, x: x.transpose(0, 1).reshape(5, 3, 8).transpose(0, 1) + net.a(x)), (2, 2, 0)),
    "in place": (in_place, (2, 2, 0)),
    "one sum of parallel branches": (two(lambda net, x: x + net.a(x) + net.b(x)), (2, 2, 0)),
    "nested": (nested, (6, 6, 4)),
    "cut": (two(lambda net, x: x.detach() + net.a(x.detach())), (2, 0, 0)),
    "alone, between projections": (two(lambda net, x: net.b(x + net.a(x))), (2, 0, 0)),
    "projection shortcut": (two(lambda net, x: net.b(x) + net.a(x)), (0, 0, 0)),
    "gate": (two(lambda net, x: x * net.a(x)), (0, 0, 0)),
    "concatenation": (two(lambda net, x: torch.cat([x[..., :4], net.a(x)[..., :4]], -1)), (0, 0, 0)),
    "polynomial": (two(lambda net, x: x + 0.04 * x**3), (0, 0, 0)),
    "rotary": (rotary, (0, 0, 0)),
    "bias of parameters": (two(lambda net, x: net.a(x) + net.b.bias), (0, 0, 0)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_count(name):
    run, expected = COUNTS[name]
    found = count(Net(run), torch.randn(3, 5, 8))
    assert (found.found, found.in_chains, found.nested) == expected


def test_count_says_where():
    net = nn.Sequential(Net(lambda net, x: x + net.a(x)), Net(lambda net, x: x + net.a(x)))
    assert [add.path for add in count(net, torch.randn(3, 5, 8)).adds] == ["0", "1"]


# -- rows ------------------------------------------------------------------------------------------------------------


def measured(run, example=None, more=None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    x = torch.randn(3, 5, 8) if example is None else example
    net = Net(run)
    net.more = more
    probe.measure(Case("toy", "toys", lambda: Built(net, x)), lambda row: rows.append(json.loads(json.dumps(row))))
    return rows[-1]


def test_a_row_of_an_exact_model():
    row = measured(two(lambda net, x: x + net.a(net.norm(x))))
    assert row["failures"] == {}
    assert (row["adds_in_chains"], row["units"], row["missing"], row["chains"], row["patterns"]) == (
        2,
        2,
        0,
        1,
        {"residual": 2},
    )
    assert all(row[check] for check in (*coverage.CHECKS, "eval_forward"))
    assert all(row[f"{method}_{kind}_bytes"] > 0 for method in probe.METHODS for kind in ("saved", "peak"))


def test_a_row_counts_what_lies_in_closed_blocks():
    class Closed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            made = x * 0.5
            x = x + self.a(x)
            made += x  # memory that the second branch would write to, and which is none of its own
            return x + self.b(made)

    row = measured(lambda net, x: net.norm(net.more(x)), more=nn.Sequential(Closed(), Closed(), Closed()))
    assert row["failures"] == {}
    assert (row["units"], row["closed"], row["skipped"]) == (3, 9, [])
    table = coverage.models([row])
    assert "9 in closed blocks" in table[1][-1]
    old = {key: value for key, value in row.items() if key != "closed"}
    assert coverage._closed([row, row]) == "18"
    assert coverage._closed([row, old]) == "–"
    assert "closed" not in coverage.models([old])[1][-1]


def test_a_row_of_a_model_that_fails():
    def fail(net, x):
        raise ValueError("no such input")

    row = measured(fail)
    assert row["failures"]["original"] == "ValueError: no such input"
    assert row["units"] is None
    assert coverage.models([measured(two(lambda net, x: x + net.a(x))) | {"model": "a"}, row])[1][0] == "toy"  # on top


def test_a_model_that_takes_too_long_is_recorded_and_not_run_again(tmp_path):
    cases = [case for case in sweep.listed("timm_models", everything=True) if case.name == "test_vit"]
    seen: list[dict[str, Any]] = []
    (row,) = sweep.rows(cases, tmp_path, jobs=1, limit=0.0, done=seen.append)
    assert "the process passed the limit of 0 s" in row["failures"].values()
    assert sweep.rows(cases, tmp_path, jobs=1, limit=240, done=seen.append) == [row]
    assert seen == [row, row]
