"""DDP and FSDP2, two processes: the weights after a few steps are those of a plain run. What composes with
checkpointing composes.
"""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cases import FAST
from processes import WORLD, needs_gloo, outcomes, passed
from toys import Convolution, PreNorm, inputs_of, toy


def train(model, call, x, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        torch.manual_seed(rank + 10 * step)
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def trains_as_stored(rank, folder):
    mesh = init_device_mesh("cpu", (WORLD,))
    for case in FAST:
        for branch in (PreNorm, Convolution):
            plain, ddp, fsdp = (toy(case, branch) for _ in range(3))
            x = inputs_of(plain, case, seed=rank)
            plain.chain.stored = True
            true = train(plain, DistributedDataParallel(plain), x, rank)
            mine = train(ddp, DistributedDataParallel(ddp), x, rank)
            for sharded in (*fsdp.branches, fsdp):
                fully_shard(sharded, mesh=mesh)
            for got in (mine, train(fsdp, fsdp, x, rank)):
                for a, b in zip(got, true, strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=10 * case.stored)


@pytest.mark.slow
@needs_gloo
def test_data_parallel_and_fully_sharded_training():
    passed(outcomes({"training": trains_as_stored}), "training")
