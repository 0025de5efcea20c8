"""``accelerate launch accelerate_loop.py``, or plain ``python``."""

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import revwire


def main() -> list[float]:
    """Fine-tune a small ViT with accumulated gradients; returns the losses."""
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
    revwire.convert(model, torch.randn(2, 3, 32, 32))  # before `prepare`, which wraps it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), batch_size=4)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    losses = []
    for _ in range(5):
        for images, labels in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    accelerator.unwrap_model(model).eval()
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
