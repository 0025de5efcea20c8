"""In-place writes to what a chain was given, or gave out: seen, or harmless and the gradient right."""

import pytest
import torch

from cases import FAST, each_fast_case
from revwire import ReconstructionError
from revwire._runtime import run as runner
from steps import faulty, gradients_of
from toys import Attention, Weightless, attention_extras, inputs_of, stored, toy

FLOAT = [c for c in FAST if not c.exact]


@each_fast_case
@pytest.mark.parametrize("which", [0, 2])
def test_an_extra_input_that_changed(case, which):
    model = toy(case, Attention)
    bias, scale, gates = attention_extras()
    out = model(inputs_of(model, case), bias, scale, gates)[0]
    with torch.no_grad():
        (bias, scale, gates[0])[which].add_(1e-9)
    with faulty("an extra input of it was modified in place"):
        out.sum().backward()


@each_fast_case
def test_a_branch_that_writes_to_its_input(case):
    class Writes(Weightless):
        def forward(self, x):
            with torch.no_grad():
                x.add_(1)
            return super().forward(x)

    model = toy(case, Writes)
    x = inputs_of(model, case).detach() + 0
    with faulty("wrote to its own input in place"):
        model(x)


@pytest.mark.parametrize("case", FLOAT, ids=str)
@pytest.mark.parametrize("depth", [1, 4])
def test_a_write_to_a_stream_in_float_mode(case, depth):
    """The tensors that a chain gives out are its streams: a write to one is seen."""
    model = toy(case)
    x = inputs_of(model, case)
    taps = [x]
    for unit, branch in zip(model.units[:depth], model.branches, strict=False):
        taps.append(runner.apply(model.chain, unit, branch, taps[-1])[0])
    out = taps[-1] * 1
    with torch.no_grad():
        taps[-1].add_(1)
    with pytest.raises(ReconstructionError, match=r"chain 0: got a stream that was written in place.*exact=True"):
        out.sum().backward()


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_a_write_to_an_older_stream_in_float_mode(case):
    model = toy(case)
    taps = [inputs_of(model, case)]
    for unit, branch in zip(model.units[:4], model.branches, strict=False):
        taps.append(runner.apply(model.chain, unit, branch, taps[-1])[0])
    with torch.no_grad():
        taps[-2].add_(1)
    with pytest.raises(ReconstructionError, match="written in place"):
        runner.apply(model.chain, model.units[4], model.branches[4], taps[-1])


@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_a_write_to_a_stream_behind_the_back_of_autograd(case):
    model = toy(case)
    h = inputs_of(model, case)
    for unit, branch in zip(model.units[:2], model.branches, strict=False):
        h = runner.apply(model.chain, unit, branch, h)[0]
    out = h * 1
    h.data.add_(1)
    with faulty("rebuilt input differs"):
        out.sum().backward()


@each_fast_case
def test_writes_that_are_harmless_leave_the_gradient_right(case):
    """To the merged output (both modes), to the input of a chain, to a clone of a tap."""

    def loss(model, x):
        x = x * 1
        out = model(x)
        with torch.no_grad():
            x.mul_(3)
        if case.exact or case.coupling.name == "re2tal":
            out = out.mul_(2)
        return out.sum()

    model = toy(case)
    x = inputs_of(model, case)
    got = gradients_of(loss(model, x), model)
    with stored(model):
        model(x)
        true = gradients_of((model(x) * 2).sum(), model)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * case.stored * float(b.abs().amax()))
