"""What only an accelerator asks for, as far as a CPU can show it."""

from collections import UserList
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import revwire
from cases import FAST, each_fast_exact_case
from revwire import ReconstructionError, RevwireError, UnsupportedTransformError
from revwire._budget.advice import reserved
from revwire._runtime.run import apply
from revwire._surroundings.settings import kernels_not_searched
from revwire.measure import _trace, peak_bytes
from revwire.measure._training_step import device_of
from stand_in import as_accelerator, waits
from toys import LARGE, PreNorm, ResidualMlp, mixed, stored, toy

# -- kernels that are searched for -------------------------------------------------------------------------------------


SEEN = UserList()  # no recompute puts it back


class Look(torch.autograd.Function):
    """A kernel that notes whether cuDNN would try algorithms."""

    @staticmethod
    def forward(ctx, x):
        SEEN.append(torch.backends.cudnn.benchmark)
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g + 0 * ctx.saved_tensors[0]


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(Look.apply(x)).tanh()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = Looking(8, 8)

    def forward(self, x):
        return x + self.branch(x)


@pytest.fixture
def searching(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    yield
    assert torch.backends.cudnn.benchmark


@pytest.mark.parametrize("options", [{}, {"chunks": 2}], ids=str)
def test_neither_forward_nor_recompute_of_a_unit_searches_for_kernels(options, searching, monkeypatch):
    """In a backward pass, which has threads of its own, another algorithm may be found."""
    as_accelerator(monkeypatch)
    model, x = nn.Sequential(*(Block() for _ in range(3))), torch.randn(2, 8)
    revwire.convert(model, x, coupling="re2tal", **options)
    for _ in range(2):
        SEEN.clear()
        model(x).sum().backward()
    assert not any(SEEN)
    assert len(SEEN) == 6 * options.get("chunks", 1)
    SEEN.clear()
    with torch.no_grad():
        model(x)
    assert set(SEEN) == {True}


def test_neither_does_a_checkpointed_module(searching, monkeypatch):
    """Its comparisons wait for the end of the backward pass, too."""
    as_accelerator(monkeypatch)
    model, x = nn.Sequential(Looking(8, 8), nn.Dropout(0.1), Block(), Block()), torch.randn(2, 8)
    revwire.convert(model, x, coupling="re2tal", checkpoint=["0"])
    for _ in range(2):
        SEEN.clear()
        with waits(monkeypatch) as found:
            model(x).sum().backward()
    assert len(SEEN) == 6
    assert SEEN[0] is SEEN[-1] is False
    assert sum(found.values()) == 1
    loss = model(x).sum()
    model[0].weight.data.mul_(2)
    with pytest.raises(ReconstructionError, match=r"0 \(checkpointed\): .* it computed other values"):
        loss.backward()


def test_the_setting_is_left_as_it_was_found(searching):
    def fail():
        assert not torch.backends.cudnn.benchmark
        raise KeyError

    with pytest.raises(KeyError), kernels_not_searched():
        fail()


# -- measuring ---------------------------------------------------------------------------------------------------------


class Statistics:
    """A device's allocator, and the devices that it was asked about."""

    def __init__(self):
        self.asked, self.alive, self.peak = [], 100, 0

    def reset_peak_memory_stats(self, device):
        self.asked.append(device)
        self.peak = self.alive

    def memory_allocated(self, device):
        self.asked.append(device)
        return self.alive

    def max_memory_allocated(self, device):
        self.asked.append(device)
        return self.peak

    def hold(self, size):
        self.alive += size
        self.peak = max(self.peak, self.alive)


def test_a_measurement_names_its_device(monkeypatch):
    second, statistics, waited = torch.device("xpu", 1), Statistics(), []
    monkeypatch.setattr(torch, "get_device_module", lambda device: statistics)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)

    def step():
        statistics.hold(30), statistics.hold(-10), statistics.hold(-20)

    assert peak_bytes(step, second) == 30
    assert set(statistics.asked) == set(waited) == {second}


def test_a_device_that_tells_no_peak_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert not _trace.keeps_peak(torch.device("mps", 0))
    with pytest.raises(RevwireError, match=r"got a model on mps:0.*expected a CPU, CUDA or XPU"):
        peak_bytes(lambda: None, "mps:0")


def test_a_step_runs_where_the_model_is():
    with FakeTensorMode():
        model = nn.Linear(2, 2, device="cuda:1")
        assert device_of(model, torch.empty(1)) == torch.device("cuda", 1)
    assert device_of(nn.Linear(2, 2, device="meta"), ()) == torch.device("cpu")


def test_a_budget_says_that_an_allocator_reserves_more():
    assert reserved(torch.device("cpu")) == ()
    assert "bytes of tensors on cuda:1" in reserved(torch.device("cuda", 1))[0]


# -- kernels that save more than values --------------------------------------------------------------------------------


class Fused(torch.autograd.Function):
    """Saves what flash attention does: its result, and the state of its generator."""

    @staticmethod
    def forward(ctx, x):
        out = 2 * x
        ctx.save_for_backward(out, torch.randint(9, (2,)).to(torch.uint64), torch.empty((), dtype=torch.uint64))
        return out

    @staticmethod
    def backward(ctx, g):
        assert len(ctx.saved_tensors) == 3
        return 2 * g


class Attends(PreNorm):
    def forward(self, x):
        return self.down(Fused.apply(self.up(self.norm(x))))


@each_fast_exact_case
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_the_state_of_a_generator_keeps_no_recompute_from_stopping(case, deferred, monkeypatch):
    as_accelerator(monkeypatch, wanted=deferred)
    model, x, runs = mixed(case, "rrcrrr", Attends), torch.randn(LARGE, requires_grad=True), UserList()
    down = model.branches[2].down
    monkeypatch.setattr(down, "forward", lambda x, forward=down.forward: runs.append(1) or forward(x))
    weights = [x, *model.parameters()]
    torch.autograd.grad(model(x).square().sum(), weights)
    runs.clear()
    got = torch.autograd.grad(model(x).square().sum(), weights)
    assert model.chain.run_whole == set()
    assert len(runs) == 2  # its product runs, and ends the recompute when it has saved its input
    with stored(model):
        assert all(map(torch.equal, got, torch.autograd.grad(model(x).square().sum(), weights)))


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_the_capture_of_a_graph_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    model = toy(FAST[-1])
    with FakeTensorMode(), pytest.raises(UnsupportedTransformError, match=r"branches\.0 \(chain 0\): got the capture"):
        apply(model.chain, model.units[0], model.branches[0], torch.empty(2, 8, device="cuda:0"))


# -- float16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("coupling", ["bdia:1/8", "re2tal"])
def test_an_infinity_in_float16_skips_the_step_and_training_goes_on(coupling, deferred, monkeypatch):
    as_accelerator(monkeypatch, wanted=deferred)
    torch.manual_seed(0)
    model, x = nn.Sequential(*(ResidualMlp() for _ in range(4))), torch.randn(4, 8)
    revwire.convert(model, x, coupling=coupling)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-3), torch.amp.GradScaler("cpu", init_scale=2.0)

    def step(x):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    for _ in range(2):
        assert step(x) > 0
    weight = model[1].branch[3].weight.data
    weight[0, 0] = 1e5  # no float16 is so large
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="not finite"):
        loss = step(x)
    assert not loss < float("inf")
    assert all(map(torch.equal, before, [p.detach() for p in model.parameters()]))
    assert scaler.get_scale() == 1.0
    weight[0, 0] = 0.1
    assert 0 < step(x) < float("inf")
