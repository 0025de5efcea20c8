"""What is alive when: values until the code lets go of them, gradients of weights until all their uses are summed."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revwire
from revwire._capture.run import record
from revwire._paper.cuts import cut_of, peak
from revwire._paper.lives import Lives
from revwire._paper.step import Step
from revwire.measure import peak_bytes

CLOSE = 0.01
"""By how much a forecast may miss: the loss, and the records of checkpoints, are not in it."""

WIDTH = 64


class Block(nn.Module):
    """Wide results within, that are gone before they are all made."""

    def __init__(self):
        super().__init__()
        self.norm, self.branch = nn.LayerNorm(WIDTH), nn.Sequential()
        for part in (nn.Linear(WIDTH, 8 * WIDTH), nn.Tanh(), nn.Sigmoid(), nn.Tanh(), nn.Linear(8 * WIDTH, WIDTH)):
            self.branch.append(part)

    def forward(self, x):
        return x + self.branch(self.norm(x))


class Held(nn.Module):
    """What is held around four blocks is there in the forward pass, not where they run again."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        held = x.detach().repeat(1, 24)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + held.mean()


class Shared(nn.Module):
    """One block, four times; and one table of words that are read and written."""

    def __init__(self):
        super().__init__()
        self.words, self.block, self.write = nn.Embedding(512, WIDTH), Block(), nn.Linear(WIDTH, 512, bias=False)
        self.write.weight = self.words.weight

    def forward(self, ids):
        x = self.words(ids)
        for _ in range(4):
            x = self.block(x)
        return self.write(x)


def peak_of(model, x):
    model(x).sum().backward()
    return peak_bytes(lambda: model(x).mean().backward())


def forecast_and_peak(model, x, names):
    """Of a step in which the modules with these names are checkpointed."""
    step = Step(record(model, (x,), {}))
    modules = [model.get_submodule(n) for n in names]
    cuts = [cut_of(step, e.number) for e in step.events if e.is_module and any(e.target is m for m in modules)]
    for m in modules:
        m.forward = partial(checkpoint, m.forward, use_reentrant=False)
    return peak(step, cuts).all, peak_of(model, x)


def test_a_block_that_runs_again_holds_its_own():
    torch.manual_seed(0)
    forecast, measured = forecast_and_peak(Held(), torch.randn(512, 8), [f"blocks.{i}" for i in range(4)])
    assert forecast == pytest.approx(measured, rel=CLOSE)


@pytest.mark.parametrize("names", [[], ["block"]], ids=["stored", "checkpointed"])
def test_gradients_of_weights_wait_for_those_of_their_other_uses(names):
    torch.manual_seed(0)
    model = Shared()
    forecast, measured = forecast_and_peak(model, torch.randint(0, 512, (2, 64)), names)
    assert forecast == pytest.approx(measured, rel=CLOSE)


def test_gradients_of_weights_do_not_grow_with_the_input():
    model, ids = Shared(), torch.randint(0, 512, (2, 64))
    step = Step(record(model, (ids,), {}))
    found = peak(step, ())
    weights = sum(p.nbytes for p in model.parameters())
    assert found.growing < found.all <= found.growing + 3 * weights


class Lets(nn.Module):
    def forward(self, x):
        a = x * 2  # event 1, used last by event 2, held until the end
        b = (a + 1).relu()  # 2, let go of when 3 is over; 3
        b = b.view(-1)  # 4, in the memory of 3
        c = b.exp()  # 5
        del b
        return c + a.sum()  # 6, 7


def test_values_live_until_the_code_lets_go_of_them():
    recording = record(Lets(), (torch.randn(8, 8),), {})
    made = {v.event: recording.released[v.storage] for v in recording.values if v.event >= 0}
    assert made == {1: 8, 2: 4, 3: 6, 4: 6, 5: 8, 6: 8, 7: 8}


def test_a_value_is_counted_once_while_it_lives():
    recording = record(Lets(), (torch.randn(8, 8),), {})
    there = {v.storage for v in recording.values if v.event < 0}
    sizes = {s: size for s, size in recording.storages.items() if s not in there}
    lives = Lives(recording, sizes)
    assert lives.passing(range(8)) == [0, 256, 512, 768, 512, 768, 516, 772]
    kept = {v.storage for v in recording.values if v.event == 1}
    assert lives.passing(range(8), kept) == [0, 0, 256, 512, 256, 512, 260, 516]
    assert lives.passing([2, 3]) == [256, 512]


class Biased(nn.Module):
    """A branch that makes the same wide bias anew in each of its calls, of weights alone."""

    def __init__(self, bias):
        super().__init__()
        self.lin, self.bias = nn.Linear(WIDTH, WIDTH), bias

    def forward(self, x):
        return self.lin(x) * (self.bias.T.contiguous() + 1)


def test_what_a_module_of_a_unit_makes_from_weights_alone_is_not_kept_for_it():
    torch.manual_seed(0)

    class Layer(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.branch = Biased(bias)

        def forward(self, x):
            return x + self.branch(x)

    bias = nn.Parameter(torch.randn(WIDTH, 2048))
    model, x = nn.Sequential(*(Layer(bias) for _ in range(8))), torch.randn(2048, WIDTH)
    converted = revwire.convert(model, x, rewire="everywhere")
    assert peak_of(converted, x) == pytest.approx(revwire.report(converted).peaks.planned, rel=0.05)
