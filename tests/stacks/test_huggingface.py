"""Hugging Face `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from table import works
from torch import nn
from torch.utils.data import Dataset
from training import Run

import revwire

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="its Trainer needs accelerate")

STACK = "Hugging Face Trainer"
pytestmark = pytest.mark.filterwarnings("ignore")  # of these packages, about each other


class Sentences(Dataset):
    def __init__(self, length: int = 16) -> None:
        self.ids = torch.randint(0, 32, (length, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def language_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, attention_dropout=0.1, use_cache=False, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


def converted() -> nn.Module:
    model = language_model()
    revwire.convert(model, {"input_ids": Sentences().ids[:2]}, rewire="everywhere")
    assert len(revwire.report(model).units) == 6
    return model


def arguments(folder: Path, **options: Any) -> Any:
    common = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5, "per_device_train_batch_size": 2}
    schedule = {"max_steps": 4, "logging_steps": 1, "learning_rate": 0.01, "save_strategy": "no"}
    return transformers.TrainingArguments(output_dir=str(folder), **{**common, **schedule, **options})


def fit(model: nn.Module, folder: Path, resume: str | None = None, **options: Any) -> Run:
    trainer = transformers.Trainer(model, arguments(folder, **options), train_dataset=Sentences())
    trainer.train(resume_from_checkpoint=resume)
    return Run([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]).finish(model)


OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "adafactor": {"optim": "adafactor"},
}


@pytest.mark.parametrize("options", OPTIONS)
@works(STACK, "training; accumulation and clipping; bf16; `gradient_checkpointing=True`; Adafactor")
def test_training(options: str, tmp_path: Path) -> None:
    model, twin = converted(), converted()
    reversible = fit(model, tmp_path, **OPTIONS[options])
    with revwire.stored_activations(twin):
        reversible.assert_like(fit(twin, tmp_path, **OPTIONS[options]), recomputes=False)
    reversible.assert_learnt(converted())


@works(STACK, "checkpoints and resuming; `save_pretrained` and `from_pretrained`")
def test_resuming(tmp_path: Path) -> None:
    straight = fit(converted(), tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed = fit(converted(), tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.losses[-2:] == straight.losses[-2:]
    resumed.losses = straight.losses
    resumed.assert_like(straight, recomputes=False)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a" / "checkpoint-4")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, straight.state[name])
