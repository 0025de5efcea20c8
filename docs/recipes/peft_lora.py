"""``python peft_lora.py``."""

import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import revwire


def main() -> list[float]:
    """Adapt a frozen small ViT by LoRA, and merge the adapters; returns the losses."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["qkv", "fc1"], modules_to_save=["head"]))
    revwire.convert(adapted, images)  # or convert the model first, and adapt it then

    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(adapted(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    revwire.revert(adapted)
    merged = adapted.merge_and_unload()  # the original class and wiring, with the adapters in its weights
    assert type(merged) is type(model)
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
