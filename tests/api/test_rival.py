"""`revwire.rival`: the checkpointing that a user would pick, on the same weights, and the model left as it is."""

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import resnet18
from transformers import LlamaConfig, LlamaModel

import revwire
from revwire.measure import saved_bytes
from toys import encoder

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": torch.arange(12).view(1, 12), "use_cache": False}
OWN, EVERY = "checkpoint (own switch)", "checkpoint every block"


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, drop_path_rate=0.1).train()


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaModel(LlamaConfig(num_hidden_layers=4, **sizes)).train()


def attributes(model):
    return [dict(vars(m)) for m in model.modules()]


def run(model, example):
    torch.manual_seed(1)
    out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def saved(model, example):
    return saved_bytes(lambda: run(model, example))


def gradients(model, example):
    return torch.autograd.grad(run(model, example).square().mean(), list(model.parameters()), allow_unused=True)


converted = pytest.mark.parametrize("converted", [False, True], ids=["as it was", "converted"])


@converted
@pytest.mark.parametrize(("make", "example"), [(vit, IMAGE), (llama, TOKENS)])
def test_a_switch_of_its_own_is_taken_and_the_model_left_alone(make, example, converted):
    model, plain = make(), make()
    if converted:
        revwire.convert(model, example)
    before, state = attributes(model), torch.get_rng_state()
    found = revwire.rival(model, example)
    assert (found.name, found.blocks) == (OWN, ())
    assert attributes(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in found.model.parameters()] == [id(p) for p in model.parameters()]
    assert saved(found.model, example) < saved(plain, example) / 2
    for got, want in zip(gradients(found.model, example), gradients(plain, example), strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("where", ["at its root", "in a part of it"])
def test_a_switch_that_has_no_effect_is_none(where):
    model = llama().eval()  # of those that checkpoint in train mode only
    model = model if where == "at its root" else nn.ModuleDict({"part": model})
    model.forward = model.forward if where == "at its root" else model.part.forward
    found = revwire.rival(model, TOKENS)
    assert found.name == EVERY
    assert [name.removeprefix("part.") for name in found.blocks] == [f"layers.{i}" for i in range(4)]
    assert not any(getattr(m, "gradient_checkpointing", False) for m in [*model.modules(), *found.model.modules()])


def test_a_switch_that_refuses_is_none():
    model = timm.create_model("vgg11").train()
    with pytest.raises(AssertionError):
        model.set_grad_checkpointing(True)
    found = revwire.rival(model, IMAGE.repeat(1, 1, 2, 2))
    assert found.name == EVERY
    assert found.blocks[0] == "features.0"


@pytest.mark.parametrize("flag", ["use_checkpoint", "with_cp"])
def test_a_flag_of_its_own(flag):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            setattr(self, flag, False)

        def forward(self, x):
            return x + (checkpoint(self.branch, x, use_reentrant=False) if getattr(self, flag) else self.branch(x))

        def branch(self, x):
            return self.linear(x).relu()

    model = nn.Sequential(Block(), Block())
    assert revwire.rival(model, torch.randn(2, 8)).name == OWN
    assert not getattr(model[0], flag)


@converted
def test_every_block_where_there_is_no_switch(converted):
    torch.manual_seed(0)
    model = resnet18(num_classes=5).train()
    expected = gradients(model.eval(), IMAGE)
    if converted:
        revwire.convert(model, IMAGE)
    found = revwire.rival(model, IMAGE)
    assert found.blocks == tuple(f"layer{i}.{j}" for i in range(1, 5) for j in range(2))
    assert found.name == EVERY
    for got, want in zip(gradients(found.model, IMAGE), expected, strict=True):
        torch.testing.assert_close(got, want)
    plain = revwire.revert(model) if converted else model
    assert saved(found.model.train(), IMAGE) < saved(plain.train(), IMAGE) * 2 / 3  # the stem is no block


def test_checkpointing_that_was_on_is_off_in_the_original_row():
    model = vit()
    model.set_grad_checkpointing(True)
    revwire.convert(model, IMAGE)
    found = revwire.profile(model, IMAGE, repeats=1)
    assert found.rival == OWN
    assert found.checkpoint.saved_bytes < found.original.saved_bytes / 2
    assert model.grad_checkpointing


def test_other_code_of_the_same_model_runs_its_own_wiring():
    model = encoder(3, 32, 4, 64).train()
    x = torch.randn(2, 6, 32)
    expected = run(model, x)
    revwire.convert(model, x, coupling="re2tal")
    torch.testing.assert_close(run(revwire.rival(model, x).model, x), expected, rtol=0, atol=0)
