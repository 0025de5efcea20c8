"""Two processes: ``torchrun --nproc-per-node=2 fsdp2.py``."""

import timm
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import revwire


def main() -> list[float]:
    """Fine-tune a small ViT whose weights are sharded by block, in bfloat16; returns the losses of this rank."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank)

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10).to(kind)
    images, labels = torch.randn(8, 3, 32, 32, device=kind), torch.arange(8, device=kind)
    revwire.convert(model, images)  # first convert, then shard
    options = {"mesh": init_device_mesh(kind, (world,)), "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(images[rank::2]).float(), labels[rank::2])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
