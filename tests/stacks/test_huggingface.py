"""Hugging Face `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from table import works
from torch import distributed as dist
from torch import nn
from torch.utils.data import Dataset
from training import Run

import revwire
from processes import needs_gloo, outcomes, passed

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


def every_process(rank: int, folder: Path) -> None:
    """Batches of another length on each process: all take the plan of the first, and stay in step."""
    from accelerate.state import AcceleratorState, PartialState

    from revwire.huggingface import RevwireCallback

    PartialState._reset_state()
    AcceleratorState._reset_state()
    options: dict[str, Any] = {"memory_budget": "1GiB"} if folder.name.endswith("budget") else {"rewire": "everywhere"}
    trainer = transformers.Trainer(
        language_model(),
        arguments(folder, ddp_backend="gloo"),
        train_dataset=Sentences(),
        callbacks=[RevwireCallback(**options)],
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    plans: list[Any] = [None, None]
    dist.all_gather_object(plans, [(u.path, u.mode) for u in revwire.report(trainer.model).units])
    assert plans[0] == plans[1] != []
    for p in trainer.model.parameters():
        mine = [torch.zeros_like(p) for _ in plans]
        dist.all_gather(mine, p.detach())
        assert torch.equal(*mine)


def every_process_under_a_budget(rank: int, folder: Path) -> None:
    every_process(rank, folder / "budget")


@needs_gloo
@works(STACK, "`RevwireCallback`: the first call of training converts, two processes (DDP)")
def test_callback_in_two_processes() -> None:
    found = outcomes({"plain": every_process, "budget": every_process_under_a_budget})
    passed(found, "plain")
    passed(found, "budget")


@pytest.mark.parametrize("rest", ["SFTTrainer", "DPOTrainer", "DPOTrainer with LoRA"])
def test_trl(rest: str, tmp_path: Path) -> None:
    """Without a row of the table, as TRL is too heavy for the extra; DPO's reference pass may share the model."""
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    from revwire.huggingface import RevwireCallback

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(29))]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    text = [" ".join(f"w{(i + j) % 29}" for j in range(8)) for i in range(16)]
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
    schedule = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    common: dict[str, Any] = {"processing_class": tokens, "callbacks": [RevwireCallback(rewire="everywhere")]}
    if rest == "SFTTrainer":
        data = datasets.Dataset.from_dict({"text": text})
        trainer = trl.SFTTrainer(
            language_model(), trl.SFTConfig(str(tmp_path), **quiet, **schedule), train_dataset=data, **common
        )
    else:
        chosen, rejected = [" w1 w2 w3"] * 16, [" w9 w8"] * 16
        data = datasets.Dataset.from_dict({"prompt": text, "chosen": chosen, "rejected": rejected})
        peft = pytest.importorskip("peft", reason="needs peft")
        shared = {"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])}
        common |= shared if "LoRA" in rest else {"ref_model": language_model()}
        model = language_model()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0  # so that the reference is comparable
        settings = trl.DPOConfig(str(tmp_path), **quiet, **schedule)
        trainer = trl.DPOTrainer(model, args=settings, train_dataset=data, **common)
    trainer.train()
    assert len(revwire.report(trainer.model).units) == 6
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["revwire/planned_mib"] < row["revwire/stored_mib"] for row in rows)
    if "LoRA" in rest:  # the reference is the model itself, without its adapters, which do nothing yet
        assert rows[0]["rewards/margins"] == 0
