"""A model's own activation checkpointing, switched on before or after conversion: the gradients stay."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, modeling_layers

import revwire

WIDTH = 16


class Block(nn.Module):
    """Pre-norm MLP whose forward checkpoints itself, as newer Hugging Face layers do."""

    def __init__(self, reentrant):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.reentrant = reentrant
        self.checkpointing = False

    def branch(self, x):
        return x + nn.functional.dropout(self.down(self.up(self.norm(x)).relu()), 0.1, self.training)

    def forward(self, x):
        return checkpoint(self.branch, x, use_reentrant=self.reentrant) if self.checkpointing else self.branch(x)


def trained_gradients(model, *inputs, **keywords):
    torch.manual_seed(1)
    out = model(*inputs, **keywords)
    out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
    return torch.autograd.grad(
        out.square().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )


def check(model, switch, example, before):
    if before:
        switch(model, True)
    revwire.convert(model, example)
    units = len(revwire.report(model).units)
    switch(model, True)
    keywords = example if isinstance(example, dict) else {}
    inputs = () if keywords else (example,)
    got = trained_gradients(model, *inputs, **keywords)
    switch(model, False)
    for want in (trained_gradients(model, *inputs, **keywords), _stored(model, inputs, keywords)):
        assert all(a is b or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return units


def _stored(model, inputs, keywords):
    with revwire.stored_activations(model):
        return trained_gradients(model, *inputs, **keywords)


each_time = pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
each_kind = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


@each_time
@each_kind
def test_blocks_that_checkpoint_themselves(before, reentrant):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block(reentrant) for _ in range(4))).train()

    def switch(model, on):
        for block in model[1:]:
            block.checkpointing = on

    assert check(model, switch, torch.randn(3, WIDTH), before) == 4


class Stack(nn.Module):
    """Checkpoints runs of its blocks, as it is told."""

    def __init__(self, runs, reentrant):
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block(reentrant) for _ in range(6))
        self.runs, self.reentrant, self.checkpointing = runs, reentrant, True

    def forward(self, x):
        x = self.stem(x)
        for run in self.runs:
            part = nn.Sequential(*(self.blocks[i] for i in run))
            alone = not self.checkpointing or len(run) == 1
            x = part(x) if alone else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


RUNS = {"all": [(0, 1), (2, 3), (4, 5)], "some": [(0,), (1, 2), (3,), (4,), (5,)], "last": [(0,), (1, 2, 3, 4, 5)]}


def loss_of(model, x):
    torch.manual_seed(1)
    return model(x).square().sum()


def slopes(model, x):
    """Gradients by `backward`, as reentrant checkpointing wants it."""
    model.zero_grad()
    loss_of(model, x).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_a_chain_does_not_reach_beyond_reentrant_checkpoints(runs):
    """Which run twice, the first time without a graph: it begins anew, and says so once."""
    torch.manual_seed(0)
    model, x = Stack(runs, reentrant=True).train(), torch.randn(3, WIDTH)
    revwire.convert(model, x, rewire="everywhere")
    assert len(revwire.report(model).units) == 6
    with pytest.warns(UserWarning, match="reentrant checkpointing: with use_reentrant=False it goes on") as told:
        got = slopes(model, x)
    assert len(told) == 1
    with revwire.stored_activations(model):
        stored = slopes(model, x)
    for want in (slopes(model, x), stored):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_gradients_through_reentrant_checkpoints_are_the_slopes_of_the_loss(runs):
    torch.manual_seed(0)
    model, x = Stack(runs, reentrant=True).double().train(), torch.randn(3, WIDTH).double()
    revwire.convert(model, x, rewire="everywhere")
    with pytest.warns(UserWarning, match="reentrant"):
        slope = slopes(model, x)[0]
    losses, small = [], 1e-6
    for step in (small, -2 * small):
        model.stem.weight.data += step * slope
        losses.append(loss_of(model, x).item())
    assert (losses[0] - losses[1]) / (2 * small) == pytest.approx(slope.square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("runs", RUNS.values(), ids=RUNS)
def test_a_chain_goes_on_through_other_checkpoints(runs):
    torch.manual_seed(0)
    model, x = Stack(runs, reentrant=False).train(), torch.randn(3, WIDTH)
    revwire.convert(model, x, rewire="everywhere")
    got = trained_gradients(model, x)
    for checkpointing in (True, False):
        model.checkpointing = checkpointing
        assert all(torch.equal(a, b) for a, b in zip(got, _stored(model, (x,), {}), strict=True))


class Between(nn.Module):
    """Blocks, and between them a dropout, all in one checkpoint."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block(False) for _ in range(3))
        self.between, self.checkpointing = nn.Dropout(0.3), True

    def body(self, x):
        for block in self.blocks:
            x = self.between(block(x))
        return x.tanh()

    def forward(self, x):
        x = self.stem(x)
        return checkpoint(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)


def test_a_chain_that_begins_anew_does_so_in_the_recompute_of_a_checkpoint():
    torch.manual_seed(0)
    model, x = Between().eval(), torch.randn(3, WIDTH)
    revwire.convert(model, x, rewire="everywhere")
    assert len(revwire.report(model).units) == 3
    model.train()
    with pytest.warns(UserWarning, match=r"something between two units made \(.*The chain begins anew here"):
        got = slopes(model, x)
    with revwire.stored_activations(model):
        stored = slopes(model, x)
    model.checkpointing = False
    for want in (slopes(model, x), stored):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_time
def test_timm(before):
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, drop_path_rate=0.1).train()
    assert check(model, lambda m, on: m.set_grad_checkpointing(on), torch.randn(2, 3, 32, 32), before) == 6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@each_time
@each_kind
@pytest.mark.parametrize("kind", [(BertConfig, BertModel), (LlamaConfig, LlamaModel)], ids=["post-norm", "pre-norm"])
def test_hugging_face(kind, before, reentrant):
    if reentrant and "__call__" in vars(modeling_layers.GradientCheckpointingLayer):
        pytest.skip("layers of older versions are called from within, and autograd.grad refuses to go through that")
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 50,
    }
    model = kind[1](kind[0](**config)).train()

    def switch(model, on):
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_disable()

    ids = torch.randint(0, 50, (2, 7))
    assert (
        check(
            model,
            switch,
            {"input_ids": ids, "use_cache": False} if kind[1] is LlamaModel else {"input_ids": ids},
            before,
        )
        == 6
    )
