"""`DistributedDataParallel` on two gloo processes, as it comes: no ``static_graph``, no ``find_unused_parameters``."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from networks import ConvolutionBlock, ConvolutionNet, StagedNet, Transformer
from table import refused, works
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel
from training import Run, assert_trains_as_stored, batches, converted, train, watched, with_backward_hooks

import revwire
from processes import needs_gloo, outcomes, passed

STACK = "DistributedDataParallel"
SMALL_BUCKETS = 0.003  # MB: several for each block, so that their order can be seen


def trains(rank: int, folder: Path, chunks: int | None = None) -> None:
    for network in (Transformer, ConvolutionNet):
        data = batches(network, seed=rank)

        def run(model: nn.Module, data=data) -> Run:
            return train(model, data, call=DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS), seed=rank)

        assert_trains_as_stored(network, run, chunks=chunks)


def trains_checkpointed(rank: int, folder: Path) -> None:
    def run(model: nn.Module) -> Run:
        ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)
        return train(model, batches(StagedNet, seed=rank), call=ddp, seed=rank)

    assert_trains_as_stored(StagedNet, run, checkpoint="stays")


def trains_in_chunks(rank: int, folder: Path) -> None:
    trains(rank, folder, chunks=2)


def hooked(rank: int, folder: Path) -> None:
    """Backward hooks on blocks, which exchange gradients."""
    seen: list[list[tuple[str, Tensor]]] = []

    def run(model: nn.Module) -> Run:
        seen.append([])
        ddp = DistributedDataParallel(with_backward_hooks(model, seen[-1], True), bucket_cap_mb=SMALL_BUCKETS)
        return train(model, batches(Transformer, seed=rank), call=ddp, seed=rank)

    assert_trains_as_stored(Transformer, run)
    reversible, stored = seen
    assert [name for name, _ in reversible] == [name for name, _ in stored]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(reversible, stored, strict=True))


def accumulates(rank: int, folder: Path) -> None:
    def run(model: nn.Module) -> Run:
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = Run()
        torch.manual_seed(rank)
        with watched(model, run):
            for i, (x, labels) in enumerate(batches(Transformer, 6, seed=rank)):
                last = i % 3 == 2
                with nullcontext() if last else ddp.no_sync():
                    loss = nn.functional.cross_entropy(ddp(x), labels)
                    loss.backward()
                run.losses.append(loss.item())
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        return run.finish(model)

    assert_trains_as_stored(Transformer, run)


def unused(rank: int, folder: Path) -> None:
    """With ``find_unused_parameters`` too, where a head is not used."""

    class TwoHeads(Transformer):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(16, 3)

    def run(model: nn.Module) -> Run:
        return train(
            model,
            batches(Transformer, seed=rank),
            call=DistributedDataParallel(model, find_unused_parameters=True),
            seed=rank,
        )

    assert_trains_as_stored(TwoHeads, run)


def communicates_early(rank: int, folder: Path) -> list[str]:
    """What happens in one backward pass, in order: the gradients of a block are there, or a bucket is sent."""
    seen: list[str] = []
    model = converted(lambda: Transformer(6))
    ddp = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKETS)

    def send(_, bucket):  # DDP wants no annotations that are strings
        seen.append("bucket")
        return distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, send)
    for i, block in enumerate(model.blocks):
        block.norm1.weight.register_post_accumulate_grad_hook(lambda _, i=i: seen.append(f"block {i}"))
    x, labels = batches(Transformer, 1)[0]
    for _ in range(2):  # the first pass only tells DDP the order
        seen.clear()
        nn.functional.cross_entropy(ddp(x), labels).backward()
    return seen


class AcrossRanks(nn.Module):
    """Normalises by the mean of all ranks: a collective operation with a gradient, as in `SyncBatchNorm`, which needs a
    GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        total = all_reduce(x.mean((0, 2, 3)).clone()) / distributed.get_world_size()
        return x - total[:, None, None]


class NormalisedAcrossRanks(ConvolutionNet):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.norm = nn.Sequential(AcrossRanks(), nn.Tanh())


def collective_in_a_branch(rank: int, folder: Path) -> None:
    def run(model: nn.Module) -> Run:
        return train(model, batches(ConvolutionNet, seed=rank), call=DistributedDataParallel(model), seed=rank)

    assert_trains_as_stored(NormalisedAcrossRanks, run)


def convert_a_wrapped_model(rank: int, folder: Path) -> str:
    ddp = DistributedDataParallel(Transformer())
    with pytest.raises(revwire.ConversionError) as caught:
        revwire.convert(ddp, Transformer.example(), rewire="everywhere")
    return str(caught.value)


CHECKS = {
    c.__name__: c
    for c in (
        trains,
        trains_in_chunks,
        trains_checkpointed,
        hooked,
        accumulates,
        unused,
        communicates_early,
        collective_in_a_branch,
        convert_a_wrapped_model,
    )
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return outcomes(CHECKS)


@needs_gloo
@works(STACK, "training; batch statistics")
def test_training(found: dict[str, str]) -> None:
    passed(found, "trains")


@needs_gloo
@works(STACK, "units in chunks (`chunks=`)")
def test_chunks(found: dict[str, str]) -> None:
    passed(found, "trains_in_chunks")


@needs_gloo
@works(STACK, "blocks that stay under `checkpoint=`")
def test_checkpointed(found: dict[str, str]) -> None:
    passed(found, "trains_checkpointed")


@needs_gloo
@works(STACK, "full backward hooks on blocks")
def test_backward_hooks(found: dict[str, str]) -> None:
    passed(found, "hooked")


@needs_gloo
@works(STACK, "gradient accumulation and `no_sync`")
def test_accumulation(found: dict[str, str]) -> None:
    passed(found, "accumulates")


@needs_gloo
@works(STACK, "`find_unused_parameters=True`, where the model needs it")
def test_unused_parameters(found: dict[str, str]) -> None:
    passed(found, "unused")


@needs_gloo
@works(STACK, "buckets are sent while the chain's backward runs")
def test_communication_starts_before_the_backward_of_the_chain_ends(found: dict[str, str], figure) -> None:
    seen = re.findall(r"bucket|block \d", passed(found, "communicates_early"))
    assert [s for s in seen if s != "bucket"] == [f"block {i}" for i in reversed(range(6))]
    last = seen.index("block 0")
    before = seen[:last].count("bucket")
    assert before > 0
    assert all(
        "bucket" in seen[seen.index(f"block {i + 1}") : seen.index(f"block {i}")] for i in range(5)
    )  # between any two blocks
    figure(f"{before} of {seen.count('bucket')} buckets before the first block's gradients")


@needs_gloo
@works(
    STACK,
    "collective operations inside branches",
    "they are repeated by the recompute, in the same order on every rank",
)
def test_a_collective_operation_in_a_branch(found: dict[str, str]) -> None:
    passed(found, "collective_in_a_branch")


@needs_gloo
@refused("Conversion itself", "a model that is wrapped in DDP", "convert first, then wrap")
def test_a_wrapped_model(found: dict[str, str]) -> None:
    assert re.search(r"DistributedDataParallel already .*convert it first", passed(found, "convert_a_wrapped_model"))


@works(STACK, "`SyncBatchNorm` in a branch")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's SyncBatchNorm runs on GPUs only")
def test_sync_batch_norm() -> None:
    passed(outcomes({"sync_batch_norm": sync_batch_norm}), "sync_batch_norm")


def sync_batch_norm(rank: int, folder: Path) -> None:
    """Both ranks on one GPU, over gloo."""
    torch.cuda.set_device(rank % torch.cuda.device_count())

    def make() -> nn.Module:
        return nn.SyncBatchNorm.convert_sync_batchnorm(ConvolutionNet())

    def run(model: nn.Module) -> Run:
        data = [(x.cuda(), y.cuda()) for x, y in batches(ConvolutionNet, seed=rank)]
        return train(model.cuda(), data, call=DistributedDataParallel(model), seed=rank)

    assert ConvolutionBlock(8).norm is not None
    assert_trains_as_stored(make, run)
