"""Two processes: ``torchrun --nproc-per-node=2 ddp.py``."""

import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import revwire


def main() -> list[float]:
    """Fine-tune a small ViT; returns the losses of this rank."""
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank = distributed.get_rank()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10).to(device)
    images, labels = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device)
    revwire.convert(model, images)  # first convert,
    ddp = DistributedDataParallel(model)  # then wrap: no static_graph, no find_unused_parameters

    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(ddp(images[rank::2]), labels[rank::2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
