"""``python hf_callback.py``: nothing but the callback, with LoRA; TRL's trainers take it in the same way."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import revwire
from revwire.huggingface import CONFIG_NAME, RevwireCallback


class Sentences(Dataset):
    """Eight sequences of token numbers (16,), which are their own labels."""

    def __init__(self) -> None:
        self.ids = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def main() -> list[float]:
    """Adapt a small language model; returns the losses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, use_cache=False
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    callback = RevwireCallback(coupling="bdia", revert_at_end=True)  # or memory_budget="6GiB" ...
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": not torch.cuda.is_available(), "bf16": True, "logging_steps": 1, "report_to": []}
        arguments = TrainingArguments(folder, max_steps=20, save_steps=10, learning_rate=3e-2, **options)
        trainer = Trainer(model, arguments, train_dataset=Sentences(), callbacks=[callback])
        trainer.train()  # resume_from_checkpoint=True goes on in the form that the checkpoint has
        plan = revwire.load_config(f"{folder}/checkpoint-20/{CONFIG_NAME}")  # beside the weights
    row = trainer.state.log_history[0]  # TensorBoard, W&B ... have the same
    assert plan.units
    assert row["revwire/planned_mib"] < row["revwire/checkpointing_mib"] < row["revwire/stored_mib"]
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
