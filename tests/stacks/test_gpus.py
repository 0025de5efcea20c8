"""The distributed stacks on two GPUs over NCCL, and compiled branches on one: as on the CPU, against stored
activations.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import Transformer
from table import works
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import Run, assert_trains_as_stored, batches, train

from processes import WORLD, outcomes, passed

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < WORLD, reason="needs two CUDA devices")


def data(rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.cuda(), labels.cuda()) for x, labels in batches(Transformer, seed=rank)]


def data_parallel(rank: int, folder: Path) -> None:
    def run(model: nn.Module) -> Run:
        return train(model.cuda(), data(rank), call=DistributedDataParallel(model, device_ids=[rank]), seed=rank)

    assert_trains_as_stored(Transformer, run)


def fully_sharded(rank: int, folder: Path) -> None:
    def run(model: nn.Module) -> Run:
        options = {
            "mesh": init_device_mesh("cuda", (WORLD,)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        }
        for part in (*model.cuda().blocks, model):
            fully_shard(part, **options)
        return train(model, data(rank), seed=rank)

    assert_trains_as_stored(Transformer, run)


@two_gpus
@works("DistributedDataParallel", "two GPUs (NCCL)")
def test_data_parallel() -> None:
    passed(outcomes({"data_parallel": data_parallel}, "nccl"), "data_parallel")


@two_gpus
@works("FSDP2", "two GPUs (NCCL), bfloat16")
def test_fully_sharded() -> None:
    passed(outcomes({"fully_sharded": fully_sharded}, "nccl"), "fully_sharded")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # Dynamo's own, about itself
@works("torch.compile", "branches compiled by Inductor on a GPU")
def test_compiled_branches() -> None:
    def run(model: nn.Module) -> Run:
        for block in model.cuda().blocks:
            block.mlp.compile()
        return train(model, data(0))

    assert_trains_as_stored(Transformer, run, recomputes=False)
