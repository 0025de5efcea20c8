"""DDP and FSDP2, two processes: the weights after a few steps are those of a plain run. What composes with
checkpointing composes.
"""

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import revwire
from cases import FAST
from processes import WORLD, needs_gloo, outcomes, passed
from toys import WIDTH, Convolution, PreNorm, encoder, inputs_of, toy


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


def predicts_alike(rank, folder):
    """Each process has examples of its own, and all take the predictors of the first."""
    torch.manual_seed(0)
    model = encoder(2, WIDTH)
    x = torch.sin(torch.linspace(0, 9, 64).view(1, -1, 1) * torch.arange(1, WIDTH + 1) + rank)
    revwire.convert(model, x, coupling="innovation:1/2", rewire="everywhere")
    mine = [c.map.down for chain in revwire.report(model).chains for u in chain.units[:-1] if (c := u.scheme).map]
    for t in (both := [t.clone() for t in mine]):
        distributed.broadcast(t, 1)
    assert mine
    assert all(torch.equal(a, b) for a, b in zip(mine, both, strict=True))
    assert revwire.verify(model, x).bit_exact


@pytest.mark.slow
@needs_gloo
def test_data_parallel_and_fully_sharded_training():
    found = outcomes({"training": trains_as_stored, "predictors": predicts_alike})
    passed(found, "training")
    passed(found, "predictors")
