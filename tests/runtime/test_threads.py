"""Several threads on one model: the same bits as one thread, or an error; never another gradient."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cases import each_fast_case
from revwire import ReconstructionError
from steps import gradients_of
from toys import Convolution, Dropped, PreNorm, Toy, inputs_of, stored, toy

THREADS = 4


def step_gradients(model, x):
    """Seeds no generator, which threads would share."""
    return gradients_of(model(x).square().sum(), model, x)


def in_threads(function, items):
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


@each_fast_case
@pytest.mark.parametrize("branch", [PreNorm, Convolution], ids=["pre-norm", "convolution"])
def test_steps_in_several_threads(case, branch):
    model = toy(case, branch)
    items = [inputs_of(model, case, seed=seed) for seed in range(8)]
    true = [step_gradients(model, x) for x in items]
    for got, expected in zip(in_threads(lambda x: step_gradients(model, x), items), true, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@each_fast_case
def test_buffers_survive_steps_in_several_threads(case):
    model = toy(case, Convolution)
    before = dict(model.named_buffers())
    items = [inputs_of(model, case, seed=seed) for seed in range(16)]
    in_threads(lambda x: step_gradients(model, x), items)
    assert all(b is before[n] for n, b in model.named_buffers())
    assert all(int(b) == len(items) for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))


@each_fast_case
def test_random_numbers_of_several_threads_are_right_or_refused(case):
    """The CPU has one generator: where threads draw from it at once, a recompute may not meet its own numbers again."""
    model = toy(case, Dropped)
    items = [inputs_of(model, case, seed=seed) for seed in range(8)]

    def attempt(x):
        out = model(x)
        try:
            return torch.autograd.grad(out.square().sum(), x)[0]
        except ReconstructionError as error:
            return error

    for outcome in in_threads(attempt, items):
        assert isinstance(outcome, ReconstructionError) or outcome.isfinite().all()


@each_fast_case
def test_forward_in_one_thread_and_backward_in_another(case):
    model = toy(case, Dropped)
    x = inputs_of(model, case)
    torch.manual_seed(0)
    true = step_gradients(model, x)
    torch.manual_seed(0)
    loss = model(x).square().sum()
    (got,) = in_threads(lambda loss: gradients_of(loss, model, x), [loss])
    assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


@each_fast_case
def test_one_graph_walked_by_several_threads_at_once(case):
    model = toy(case)
    x = inputs_of(model, case)
    true = step_gradients(model, x)
    loss = model(x).square().sum()
    for got in in_threads(lambda _: gradients_of(loss, model, x, retain_graph=True), range(6)):
        assert all(torch.equal(a, b) for a, b in zip(got, true, strict=True))


class Replica(nn.Module):
    """A toy as `torch.nn.parallel.replicate` copies it: modules shallow, parameters as plain tensors, the chain
    shared.
    """

    def __init__(self, model):
        super().__init__()
        self.chain, self.units = model.chain, model.units
        self.weights = []
        self.branches = [self.copied(branch) for branch in model.branches]

    def copied(self, module):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module._parameters.items():
            copy = None if parameter is None else parameter.clone()
            self.weights.append(copy)
            setattr(replica, name, copy)
        for name, child in module._modules.items():
            replica._modules[name] = self.copied(child)
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer.clone()
        return replica

    forward = Toy.forward


@each_fast_case
@pytest.mark.parametrize("branch", [PreNorm, Convolution], ids=["pre-norm", "convolution"])
def test_replicas_in_threads_as_in_data_parallel(case, branch):
    model = toy(case, branch)
    items = [inputs_of(model, case, seed=seed) for seed in range(THREADS)]
    with stored(model):
        outs = [model(x) for x in items]
        true = torch.autograd.grad(torch.stack(outs).square().sum(), list(model.parameters()))
    replicas = [Replica(model) for _ in items]
    outs = in_threads(lambda pair: pair[0](pair[1]), zip(replicas, items, strict=True))
    got = torch.autograd.grad(torch.stack(outs).square().sum(), list(model.parameters()))
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(b.abs().amax()) + 10 * case.stored)
