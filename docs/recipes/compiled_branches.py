"""``python compiled_branches.py``: regional compilation."""

import timm
import torch
from torch import nn

import revwire


def main(backend: str = "inductor") -> list[float]:
    """Fine-tune a small ViT whose branches are compiled; returns the losses."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    revwire.convert(model, images)
    for block in model.blocks:  # equal branches share their compiled code
        block.attn.compile(backend=backend)
        block.mlp.compile(backend=backend)
    assert revwire.verify(model, images).bit_exact  # compiled code must compute the same bits twice, and does

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
