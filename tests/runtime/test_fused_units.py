"""Networks on the path of a GPU: its kernels, its deferred checks. Launches are counted, of kernels and of PyTorch.

They run on a CUDA device where there is one, and under Triton's interpreter in a process of its own; see
`tests/streams/test_fused.py`.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import revwire
from cases import spread
from processes import passes_interpreted
from revwire import RangeError, ReconstructionError
from revwire._forwards.converted import chains_of
from revwire._streams import fused
from revwire._streams.samples import glance
from stand_in import as_accelerator
from toys import modes_of

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
RUNS = fused.serves(torch.device(DEVICE))

on_device = pytest.mark.skipif(not RUNS, reason="needs a CUDA device, or Triton's interpreter")


@pytest.mark.skipif(RUNS, reason="this is that process, or a device")
def test_all_of_this_under_the_interpreter():
    passes_interpreted(__file__)


@pytest.fixture(autouse=True)
def deferred(monkeypatch):
    as_accelerator(monkeypatch)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def branch(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x):
        return x + self.branch(x)


def blocks(depth, dtype):
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth))).to(DEVICE, dtype)


def network(depth, coupling="bdia:1/8", dtype=torch.float32):
    return revwire.convert(blocks(depth, dtype), example(dtype), coupling=coupling)


def example(dtype=torch.float32):
    return torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def cast(autocast):
    return torch.autocast(DEVICE, dtype=torch.bfloat16) if autocast else nullcontext()


NO_LAUNCH = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "detach",
    "view",
    "as_strided",
    "select",
    "slice",
    "t.",
    "expand",
    "promote_types",
)
"""Beginnings of the names of operations that give a device nothing to do."""


class Launches(TorchDispatchMode):
    """The names of what a device is given to do: PyTorch's operations, and our kernels, one each."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = f"{function.__name__}."
        random_states = name.startswith("equal") and args[0].numel() == torch.get_rng_state().numel()  # on the host
        if not (random_states or name.startswith(NO_LAUNCH)):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """The mode that is told of each kernel of ours (what the interpreter does for it is none)."""
    mode, kernels = Launches(), fused._kernels()

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(kernels, name)

        def __getitem__(self, grid):
            def launch(*args, **kwargs):
                mode.names.append(self.name)
                with _disable_current_modes():
                    self.kernel[grid](*args, **kwargs)

            return launch

    for name in ("advance", "retreat", "summed", "read", "sample", "scale"):
        monkeypatch.setattr(kernels, name, Counted(name))
    return mode


def counted(run, mode):
    """What a forward launches, and what its backward pass does, as counters."""
    run().backward()  # what is made once
    mode.names.clear()
    with mode:
        loss = run()
    forward = Counter(mode.names)
    mode.names.clear()
    with mode:
        loss.backward()
    return forward, Counter(mode.names)


def training(model, x, autocast):
    def run():
        with cast(autocast):
            return model(x).float().sum()

    return run


@on_device
@pytest.mark.parametrize(
    ("coupling", "dtype", "autocast"), spread(["bdia:1/8", "momentum:1/8", "re2tal"], DTYPES, [False, True])
)
def test_a_unit_launches_four_kernels_forward_and_eight_backward(coupling, dtype, autocast, launches):
    """At most, beside those of its branch, which runs twice. (Deeper networks show what one unit more takes.)"""
    x = example(dtype).requires_grad_()

    def per_unit(make):
        few, many = (counted(training(make(depth), x, autocast), launches) for depth in (3, 5))
        return [{name: (many[i][name] - few[i][name]) / 2 for name in many[i]} for i in range(2)]

    forward, backward = per_unit(lambda depth: network(depth, coupling, dtype))
    plain_forward, plain_backward = per_unit(lambda depth: blocks(depth, dtype))
    casts = autocast and dtype == torch.float32  # the gradient of a sum is cast to that of the branch
    branch = sum(plain_forward.values()) - 1  # the sum
    gradients = sum(plain_backward.values()) - 1 - casts  # the sum of two gradients
    assert sum(forward.values()) - branch <= 4
    assert sum(backward.values()) - branch - gradients <= 8
    assert (forward["advance"], forward["sample"]) == (1, 1)
    assert [backward[name] for name in ("read", "retreat", "sample")] == [1, 1, 1]
    assert backward.get("scale", 0) == (coupling != "re2tal")  # whose gradients are handed on as they are


@on_device
def test_a_checkpointed_unit_launches_as_many_and_glances_at_what_it_saves(launches, monkeypatch):
    """One glance at each tensor but its input and those that others look after, in forward and in recompute."""
    looks = []
    for module in ("saving", "recompute"):
        monkeypatch.setattr(f"revwire._runtime.{module}.glance", lambda t: looks.append(1) or glance(t))

    def counts(depth):
        model, x = network(depth), example().requires_grad_()
        (chain,) = chains_of(model)
        chain.modes, chain.keeps_last = modes_of(["r", *"c" * (depth - 2), "r"]), False
        counted(training(model, x, autocast=False), launches)
        looks.clear()
        found = counted(training(model, x, autocast=False), launches)
        return *(sum(names.values()) for names in found), len(looks) / 2  # it runs twice

    few, many = counts(4), counts(6)
    forward, backward, looked = ((b - a) / 2 for a, b in zip(few, many, strict=True))
    branch, gradients = 4, 17  # norm, product, activation, product; what autograd launches for them
    assert forward - branch <= 4
    assert backward - (branch - 1) - gradients <= 8
    assert looked <= 2 * 10


@on_device
@pytest.mark.parametrize(
    ("coupling", "dtype", "autocast"),
    spread(["bdia:1/8", "momentum:1/4", "dr2net:0.3,1/2", "re2tal"], DTYPES, [False, True]),
)
def test_gradients_are_those_of_stored_activations_and_of_the_plain_form(coupling, dtype, autocast, monkeypatch):
    model, x = network(4, coupling, dtype), example(dtype).requires_grad_()

    def step():
        with cast(autocast):
            out = model(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()])]

    found = step()
    with revwire.stored_activations(model):
        assert all(map(torch.equal, found, step()))
    for name in ("serves", "suits"):
        monkeypatch.setattr(fused, name, lambda *_: False)
    monkeypatch.setattr(fused, "multiples", lambda *_: None)
    monkeypatch.setattr("revwire._streams.kernels.available", lambda: False)
    assert all(map(torch.equal, found, step()))


@on_device
def test_a_network_is_exact():
    assert revwire.verify(network(3), example()).bit_exact


@on_device
def test_a_changed_weight_is_found():
    model = network(4)
    loss = model(example()).sum()
    model[2].up.weight.data.add_(0.1)
    with pytest.raises(ReconstructionError, match=r"2\.up \(chain 0"):
        loss.backward()


@on_device
def test_a_value_out_of_range_names_its_unit():
    model = network(4)
    with torch.no_grad():
        model[2].down.weight.mul_(1e6)
    with pytest.raises(RangeError, match=r"2\.up \(chain 0.*of magnitude .* or more"):
        model(example())
    assert model(example()).isfinite().all()  # the next forward is scaled for what was met


@on_device
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_nan_as_in_the_original(value):
    model = network(4)
    with torch.no_grad():
        model[2].down.weight[0] = value
    with pytest.warns(UserWarning, match="not finite"):
        out = model(example())
    assert not out.isfinite().all()
    assert all(g.isnan().all() for g in torch.autograd.grad(out.sum(), list(model.parameters())))
