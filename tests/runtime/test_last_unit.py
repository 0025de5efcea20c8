"""The last unit of a model's last chain keeps its activations: one forward at a time, with the same gradients to the
bit.
"""

import copy
import pickle
from collections import UserList

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

import revwire
from cases import FAST, each_fast_case
from revwire._forwards.converted import chains_of
from revwire.measure import saved_bytes
from steps import gradients, gradients_of, leaves_no_other_trace, same, sum_of_squares
from toys import KINDS, LARGE, STREAM, PreNorm, toy


def kept_toy(case, kind=PreNorm, depth=4):
    model = toy(case, kind, depth=depth)
    model.chain.keeps_last = True
    return model


def batch(seed=0):
    return torch.randn(LARGE, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def nothing_recomputed_of(branch, monkeypatch):
    """Counts how often a branch runs."""
    runs, forward = UserList(), branch.forward  # no recompute puts it back
    monkeypatch.setattr(branch, "forward", lambda x: runs.append(1) or forward(x))
    return runs


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_gradients_buffers_and_random_state_are_those_of_stored_activations(case, kind):
    assert leaves_no_other_trace(kept_toy(case, kind), torch.randn(kind.shape, requires_grad=True))


@each_fast_case
def test_only_the_last_unit_runs_once(case, monkeypatch):
    model = kept_toy(case)
    runs = [nothing_recomputed_of(branch, monkeypatch) for branch in model.branches]
    gradients(model, batch())
    assert [len(r) for r in runs] == [2, 2, 2, 1]


@each_fast_case
def test_of_several_forwards_that_wait_only_the_first_keeps_more_than_its_streams(case):
    model, plain = kept_toy(case), toy(case)
    alone = saved_bytes(lambda: plain(batch()))
    first = saved_bytes(lambda: model(batch()))
    both = saved_bytes(lambda: [model(batch()), model(batch())])
    assert first > alone + 2 * STREAM
    assert both <= first + alone + 4096


@each_fast_case
def test_the_next_step_keeps_again_although_the_last_loss_is_still_there(case, monkeypatch):
    model = kept_toy(case)
    runs = nothing_recomputed_of(model.branches[-1], monkeypatch)
    loss = model(batch()).sum()
    loss.backward()
    model(batch(1)).sum().backward()
    assert len(runs) == 2
    assert loss.requires_grad


@each_fast_case
def test_backward_in_any_order_and_twice(case):
    model, a, b = kept_toy(case), batch(0), batch(1)
    one, two = model(a).square().sum(), model(b).square().sum()
    inputs = [a, b, *model.parameters()]
    backwards = (
        torch.autograd.grad(two, inputs[1:], retain_graph=True),
        torch.autograd.grad(one, [a, *inputs[2:]], retain_graph=True),
    )
    again = torch.autograd.grad(one, [a, *inputs[2:]]), torch.autograd.grad(two, inputs[1:])
    assert same(backwards[0], again[1])
    assert same(backwards[1], again[0])


@each_fast_case
def test_only_some_gradients_are_asked_for(case):
    model, x = kept_toy(case), batch()
    every = gradients(model, x)
    loss = model(x).square().sum()
    first = torch.autograd.grad(loss, [model.branches[0].up.weight])
    last = torch.autograd.grad(model(x).square().sum(), [model.branches[-1].up.weight])
    by_name = dict(zip([n for n, _ in model.named_parameters()], every[1:], strict=True))
    assert torch.equal(first[0], by_name["branches.0.up.weight"])
    assert torch.equal(last[0], by_name["branches.3.up.weight"])


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_inside_other_hooks_every_unit_is_rebuilt(case, monkeypatch):
    """Checkpointing expects the same saved tensors in both of its runs."""
    model, x = kept_toy(case), batch()
    true = gradients(model, x)
    torch.manual_seed(3)
    loss = sum_of_squares(checkpoint(model, x, use_reentrant=False))
    assert same(true, gradients_of(loss, model, x))
    runs = nothing_recomputed_of(model.branches[-1], monkeypatch)
    with save_on_cpu():
        again = gradients(model, x)
    assert same(true, again)
    assert len(runs) == 2


@each_fast_case
@pytest.mark.parametrize("which", [0, -1])
def test_a_weight_that_changes_before_backward_is_an_error(case, which):
    model = kept_toy(case)
    loss = model(batch()).square().sum()
    with torch.no_grad():
        model.branches[which].down.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|was modified in place"):
        loss.backward()


@each_fast_case
def test_a_failed_branch_leaves_nothing_behind(case, monkeypatch):
    model, x = kept_toy(case), batch()
    true = gradients(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(model.branches[-1], "forward", lambda x: x @ x)
        with pytest.raises(RuntimeError, match="Expected size"):
            model(x)
    assert same(true, gradients(model, x))


@each_fast_case
def test_copies_and_pickles_while_a_backward_waits(case):
    model, x = kept_toy(case), batch()
    loss = model(x).square().sum()
    for twin in (copy.deepcopy(model.chain), pickle.loads(pickle.dumps(model.chain))):
        assert twin.keeps_last
        assert twin.waiting is None
    assert same(torch.autograd.grad(loss, list(model.parameters())), gradients(model, x)[1:])


class Network(nn.Module):
    """Two chains of different width, and a head of a chosen size."""

    def __init__(self, head):
        super().__init__()
        layer = {"nhead": 2, "dropout": 0.0, "batch_first": True}
        self.narrow = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, dim_feedforward=16, **layer), 2)
        self.widen = nn.Linear(8, 16)
        self.wide = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, dim_feedforward=64, **layer), 2)
        self.head = nn.Sequential(nn.Linear(16, head), nn.GELU(), nn.Linear(head, 2))

    def forward(self, x):
        return self.head(self.wide(self.widen(self.narrow(x))))


def test_only_the_chain_whose_backward_comes_first_keeps_anything():
    model = revwire.convert(Network(head=1), torch.randn(2, 5, 8))
    assert [c.keeps_last for c in chains_of(model)] == [False, True]


def test_not_where_what_follows_the_chain_saves_much():
    model = revwire.convert(Network(head=4096), torch.randn(2, 5, 8))
    assert [c.keeps_last for c in chains_of(model)] == [False, False]


def test_verify_rebuilds_the_last_unit_too():
    model, x = Network(head=1), torch.randn(2, 5, 8)
    revwire.convert(model, x)
    check = revwire.verify(model, x)
    assert check.bit_exact
    assert len(check.units) == 8
