"""The backbones against OpenTAD's, rewired by `revwire.convert` alone: outputs, gradients, statistics.

Both arithmetics meet the same tolerances: float streams (``exact=False``), which round as OpenTAD's do, and fixed-point
streams, the
default for this coupling: 32 bits for a float32 network, 64 for a float64 one.
"""

import pytest
import torch
from reference import F64, NAMES, PRECISIONS, load, relative_error
from torch import nn

import revwire
from benchmarks.tal.backbones import Backbone, VideoSwin, network_of

OUTPUTS = {"re2swin": 1e-5, "re2slowfast": 5e-5}
GRADIENTS = {"re2swin": 3e-5, "re2slowfast": 1e-4}
"""For float32, as suggested by the reference set."""


def cases(name):
    return range(len(load(name)["cases"]))


@pytest.fixture(scope="module", params=["re2swin", "re2slowfast"])
def reference(request):
    return request.param, load(request.param)


def rewired(reference, dtype, example, exact, train=False):
    network = network_of(reference).to(dtype).train(train)
    return revwire.convert(network, example, coupling="re2tal", exact=exact)


def pieces(case, dtype):
    """[(expected output, its float64 reference, weight in the loss)] of each pathway."""
    names = ["slow", "fast"] if "slow" in case else ["output"]
    weights = [case["loss_weight" if n == "output" else f"loss_weight_{n}"].to(dtype) for n in names]
    return [(case[n], case[f"{n}_f64"], w) for n, w in zip(names, weights, strict=True)]


@pytest.mark.parametrize("exact", [False, True], ids=["float-streams", "exact"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_outputs_and_gradients(reference, dtype, exact):
    name, data = reference
    for case in data["cases"]:
        x = case["input"].to(dtype)
        network = rewired(data, dtype, x, exact, case.get("bn_train", False))
        x = x.clone().requires_grad_()
        stages = watched(network, case["stage_outputs"])
        out = network(x)
        out = out if isinstance(out, tuple) else (out,)
        expected = pieces(case, dtype)
        sum((o * w).sum() for o, (_, _, w) in zip(out, expected, strict=True)).backward()
        tolerance = F64 if dtype == torch.float64 else OUTPUTS[name]
        for got, (stored, stored64, _) in zip(out, expected, strict=True):
            assert relative_error(got, stored64) < tolerance
            assert relative_error(got, stored) < OUTPUTS[name]
        _check_gradients(network, case, dtype, GRADIENTS[name])
        for path, stage in case["stage_outputs"].items():
            assert relative_error(stages[path], stage) < OUTPUTS[name], path
        if "input_grad" in case:
            assert relative_error(x.grad, case["input_grad"]) < GRADIENTS[name]
        if "buffers_after_forward" in case:
            state = network.state_dict()
            assert all(
                relative_error(state[network.own_name(n)], v) < OUTPUTS[name]
                for n, v in case["buffers_after_forward"].items()
            )


def watched(network, paths):
    """The outputs of modules, (batch, channels, time, height, width), once the network has run."""
    seen = {}

    def see(path):
        def hook(module, args, out):
            seen[path] = out.permute(0, 4, 1, 2, 3) if isinstance(network, VideoSwin) else out

        return hook

    for path in paths:
        network.get_submodule(path).register_forward_hook(see(path))
    return seen


def _check_gradients(network, case, dtype, tolerance):
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, expected in case["param_grads"].items():
        assert relative_error(gradients[network.own_name(name)], expected) < tolerance, name
    for name, expected in case.get("param_grads_f64", {}).items():
        assert relative_error(gradients[network.own_name(name)], expected) < (
            F64 if dtype == torch.float64 else tolerance
        ), name
    norms = {name: gradients[network.own_name(name)].double().norm().item() for name in case["all_grad_norms_f64"]}
    assert len(norms) == len(gradients)
    largest = max(case["all_grad_norms_f64"].values())
    for name, expected in case["all_grad_norms_f64"].items():
        # A batch norm over one value per channel makes the gradients before it vanish: those are compared with the
        # largest one.
        assert abs(norms[name] - expected) < (F64 if dtype == torch.float64 else tolerance) * max(
            expected, 1e-3 * largest
        ), name


def test_rebuilt_to_the_bit(reference):
    for case in reference[1]["cases"]:
        network = rewired(reference[1], torch.float32, case["input"], None, case.get("bn_train", False))
        assert revwire.report(network).coverage == 1
        check = revwire.verify(network, case["input"])
        assert check.bit_exact
        assert check.gradient_error == 0


class KeepMask(nn.Module):
    """Stochastic depth whose draws are given."""

    def __init__(self, keep, rate):
        super().__init__()
        self.register_buffer("factor", keep / (1 - rate))

    def forward(self, x):
        return x * self.factor.view(-1, *[1] * (x.dim() - 1))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_stochastic_depth(dtype):
    data = load("re2swin")
    dropped = data["droppath_train"]
    case = data["cases"][dropped["case_index"]]
    config = data["config"] | {"drop_path_rate": dropped["drop_path_rate"]}
    network = network_of({"config": config, "state_dict": data["state_dict"]})
    blocks = [block for layer in network.layers for block in layer.blocks]
    assert [block.drop_path_attn.p for block in blocks] == pytest.approx(dropped["drop_probs"])
    for number, (block, rate) in enumerate(zip(blocks, dropped["drop_probs"], strict=True)):
        block.drop_path_attn = KeepMask(dropped["keep_mask_F"][number], rate)
        block.drop_path_mlp = KeepMask(dropped["keep_mask_G"][number], rate)
    network = revwire.convert(network.to(dtype), case["input"].to(dtype), coupling="re2tal", exact=False)
    out = network(case["input"].to(dtype))
    (out * case["loss_weight"].to(dtype)).sum().backward()
    tolerance = (
        1e-6 if dtype == torch.float64 else OUTPUTS["re2swin"]
    )  # 1 / (1 − p) was rounded to float32 in the reference
    assert relative_error(out, dropped["output_f64"]) < tolerance
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, expected in dropped["param_grads"].items():
        assert relative_error(gradients[network.own_name(name)], expected) < GRADIENTS["re2swin"], name


@pytest.mark.parametrize("dtype", PRECISIONS, ids=NAMES)
def test_the_wrapper(reference, dtype):
    name, data = reference
    wrapper = load("re2wrapper")
    case = wrapper[name]
    backbone = (
        Backbone(network_of(data), steps=case["interpolate_size"], mean=wrapper["mean"], std=wrapper["std"])
        .to(dtype)
        .train()
    )
    frames = case["frames"].squeeze(1)
    revwire.convert(backbone, frames, coupling="re2tal", exact=False)
    tolerance = F64 if dtype == torch.float64 else OUTPUTS[name]
    assert relative_error(backbone(frames), case["output_f64"]) < tolerance  # stored before the mask
    assert relative_error(backbone(frames, case["masks"]), case["output"]) < OUTPUTS[name]
    assert relative_error(backbone(frames), case["output_without_mask"]) < OUTPUTS[name]
    frozen = {n for n, p in backbone.network.named_parameters() if not p.requires_grad}
    assert frozen == {backbone.network.own_name(n) for n in case["frozen_parameter_names"]}
