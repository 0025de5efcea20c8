"""DDP and FSDP2, two processes: the weights after a few steps are those of a plain run. What composes with
checkpointing composes.
"""

import os
import socket

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cases import FAST
from toys import Convolution, PreNorm, inputs_of, toy

WORLD = 2


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(model, call, x, rank):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        torch.manual_seed(rank + 10 * step)
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def worker(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
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
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_data_parallel_and_fully_sharded_training():
    mp.spawn(worker, args=(free_port(),), nprocs=WORLD)
