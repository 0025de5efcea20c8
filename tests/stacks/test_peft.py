"""PEFT: LoRA on a converted model, conversion of an adapted one, adapters merged and switched off; frozen backbones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Transformer
from table import works
from torch import nn
from training import Run, assert_trains_as_stored, batches, converted, train

import revwire

peft = pytest.importorskip("peft", reason="needs peft")

STACK = "PEFT"


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["query", "value", "up"], modules_to_save=["head"]
    )
    return peft.get_peft_model(model, config)


def unwrapped(model: nn.Module) -> nn.Module:
    return model.base_model.model if hasattr(model, "base_model") else model


def run(model: nn.Module) -> Run:
    """Train the adapters: of a converted model that is adapted now, or of an adapted one that was converted."""
    wrapped = model if isinstance(model, peft.PeftModel) else adapted(model)
    inner = unwrapped(wrapped)
    trainable = [p for p in wrapped.parameters() if p.requires_grad]
    before = {n: p.detach().clone() for n, p in inner.named_parameters() if not p.requires_grad}
    out = train(inner, batches(Transformer), call=wrapped, optimizer=torch.optim.AdamW(trainable, lr=0.01))
    assert before, "nothing is frozen"
    assert all(torch.equal(before[n], p) for n, p in inner.named_parameters() if not p.requires_grad)
    return out


@pytest.mark.parametrize(
    "order", ["convert, then adapt", "adapt, then convert", "adapt, then convert the model inside"]
)
@works(STACK, "LoRA: convert, then adapt; adapt, then convert")
def test_lora(order: str) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        model = Transformer().train()
        if order == "convert, then adapt":
            return revwire.convert(model, Transformer.example(), rewire="everywhere")
        wrapped = adapted(model).train()
        revwire.convert(
            wrapped if order == "adapt, then convert" else model, Transformer.example(), rewire="everywhere"
        )
        return wrapped

    model, twin = made(), made()
    reversible = run(model)
    owner = twin if order == "adapt, then convert" else unwrapped(twin)
    assert len(revwire.report(owner).units) == 6
    with revwire.stored_activations(owner):
        reversible.assert_like(run(twin))


@works(STACK, "adapters saved, loaded, switched off, and merged")
def test_adapters_afterwards(tmp_path: Path) -> None:
    wrapped = adapted(converted(Transformer))
    inner, x = unwrapped(wrapped), Transformer.example()
    train(inner, batches(Transformer), call=wrapped)
    wrapped.eval()
    out = wrapped(x)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(converted(Transformer), tmp_path).eval()
    plain = converted(Transformer).eval()
    names = {n: p for n, p in plain.named_parameters() if n.endswith("bias") and "head" not in n}
    assert names
    with torch.no_grad(), wrapped.disable_adapter():
        switched_off = wrapped(x)
    assert not torch.equal(switched_off, out)
    merged = wrapped.merge_and_unload()
    assert len(revwire.report(merged).units) == 6
    torch.testing.assert_close(merged(x), out, rtol=0, atol=1e-4)  # W + BA rounds once; in the streams' grid
    assert list(again.state_dict()) == list(adapted(converted(Transformer)).state_dict())
    reverted = revwire.revert(merged)
    assert list(reverted.state_dict()) == list(Transformer().state_dict())


@works("Optimizers and weights", "frozen backbones: all but the head, all but norms, the first blocks")
@pytest.mark.parametrize("trained", ["head", "norm", "blocks.2", "bias"])
def test_frozen_backbones(trained: str) -> None:
    def run(model: nn.Module) -> Run:
        for name, p in model.named_parameters():
            p.requires_grad_(trained in name)
        return train(
            model,
            batches(Transformer),
            optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
        )

    recomputes = trained in (
        "norm",
        "bias",
    )  # else the watched first block gets no gradient, and is not asked for again
    assert_trains_as_stored(Transformer, run, recomputes=recomputes)
