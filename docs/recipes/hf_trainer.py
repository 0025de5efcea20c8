"""``python hf_trainer.py``."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import revwire


class Sentences(Dataset):
    """Eight sequences of token numbers (16,), which are their own labels."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def main() -> list[float]:
    """Train a small language model; returns the losses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, use_cache=False
    )
    model = LlamaForCausalLM(config)
    data = Sentences()
    revwire.convert(
        model, {"input_ids": data.ids[:2]}
    )  # leave gradient_checkpointing off: there is nothing left to checkpoint
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": not torch.cuda.is_available(), "bf16": True, "logging_steps": 1, "report_to": []}
        arguments = TrainingArguments(folder, max_steps=5, learning_rate=1e-2, **options)
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()  # from_pretrained reads it, converted or not
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
