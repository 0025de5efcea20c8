"""A model's own activation checkpointing, switched on before or after conversion: the gradients stay."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

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


@each_time
def test_timm(before):
    model = timm.create_model("vit_tiny_patch16_224", depth=3, img_size=32, drop_path_rate=0.1).train()
    assert check(model, lambda m, on: m.set_grad_checkpointing(on), torch.randn(2, 3, 32, 32), before) == 6


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
@each_time
@each_kind
@pytest.mark.parametrize("kind", [(BertConfig, BertModel), (LlamaConfig, LlamaModel)], ids=["post-norm", "pre-norm"])
def test_hugging_face(kind, before, reentrant):
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
