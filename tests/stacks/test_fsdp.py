"""FSDP2 (`fully_shard`) and tensor parallelism (`parallelize_module`) on two gloo processes."""

from __future__ import annotations

import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import ConvolutionNet, StagedNet, Transformer
from table import refused, works
from torch import Tensor, nn
from torch.distributed import checkpoint as sharded_checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import Run, assert_trains_as_stored, batches, converted, train, watched, with_backward_hooks

import revwire
from processes import WORLD, needs_gloo, outcomes, passed
from revwire._forwards.converted import chains_of
from revwire._runtime.unit import Mode

STACK = "FSDP2"
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (WORLD,))


def sharded(model: nn.Module, by: str, **options: Any) -> nn.Module:
    """``model`` sharded by the layers of its units, by their modules, by block, or as a whole; the root in any case."""
    blocks = list(model.blocks)  # type: ignore[arg-type]
    layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    parts = {
        "layer": layers,
        "unit": [part for block in blocks for part in block.children()],
        "block": blocks,
        "root": [],
    }[by]
    for part in (*parts, model):
        fully_shard(part, mesh=mesh(), **options)
    return model


MODES: tuple[Mode, ...] = ("reversible", "checkpointed", "checkpointed", "reversible", "stored", "checkpointed")


def trains(
    rank: int,
    folder: Path,
    *,
    by: str,
    network: Any = Transformer,
    chunks: int | None = None,
    modes: tuple[Mode, ...] | None = None,
    checkpoint: str | None = None,
    **options: Any,
) -> list[float]:
    """The losses; warnings of revwire (a chain that begins anew, say) are errors."""
    warnings.filterwarnings("error", message=r".*\(chain \d+\)")

    def run(model: nn.Module) -> Run:
        for chain in chains_of(model):
            chain.modes = modes
        sharded(model, by, **options)

        def all_sharded() -> None:
            assert all(isinstance(p, DTensor) for p in model.parameters())

        return train(model, batches(network, seed=rank), before_step=all_sharded, seed=rank)

    return assert_trains_as_stored(network, run, chunks=chunks, checkpoint=checkpoint).losses


def hooked(rank: int, folder: Path, *, by: str, exchanging: bool, **options: Any) -> None:
    """Backward hooks on blocks, registered before they are sharded or after: they see the same in both runs."""
    warnings.filterwarnings("error", message=r".*\(chain \d+\)")
    for first in (True, False):
        seen: list[list[tuple[str, Tensor]]] = []

        def run(model: nn.Module, first: bool = first, seen: Any = seen) -> Run:
            seen.append([])
            model = with_backward_hooks(model, seen[-1], exchanging) if first else model
            model = sharded(model, by, **options)
            model = model if first else with_backward_hooks(model, seen[-1], exchanging)
            return train(model, batches(Transformer, seed=rank), seed=rank)

        assert_trains_as_stored(Transformer, run)
        reversible, stored = seen
        assert (
            [name for name, _ in reversible]
            == ["2", "2", "2", "1", "1", "1", "0", "0", "0"] * 3
            == [name for name, _ in stored]
        )
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(reversible, stored, strict=True))


def accumulates(rank: int, folder: Path) -> None:
    """Accumulation without communication, and clipping by the norm of all shards."""

    def run(model: nn.Module) -> Run:
        sharded(model, "block")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = Run()
        torch.manual_seed(rank)
        with watched(model, run):
            for i, (x, labels) in enumerate(batches(Transformer, 4, seed=rank)):
                last = i % 2 == 1
                model.set_requires_gradient_sync(last)  # type: ignore[operator]
                loss = nn.functional.cross_entropy(model(x), labels)
                loss.backward()
                run.losses.append(loss.item())
                if last:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
        return run.finish(model)

    assert_trains_as_stored(Transformer, run)


def saves_and_resumes(rank: int, folder: Path) -> None:
    """Four steps in one go, and two before and two after a sharded checkpoint, which another model loads: the same."""

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = sharded(converted(Transformer, seed=seed), "block")
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    data = batches(Transformer, 4, seed=rank)
    model, optimizer = make(seed=0)
    train(model, data[:2], optimizer=optimizer, seed=rank)
    names = ("model", "optimizer")
    sharded_checkpoint.save(
        dict(zip(names, get_state_dict(model, optimizer), strict=True)), checkpoint_id=str(folder / "checkpoint")
    )
    straight = train(model, data[2:], optimizer=optimizer, seed=rank)

    other, optimizer = make(seed=1)
    state = dict(zip(names, get_state_dict(other, optimizer), strict=True))
    sharded_checkpoint.load(state, checkpoint_id=str(folder / "checkpoint"))
    set_state_dict(other, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    train(other, data[2:], optimizer=optimizer, seed=rank).assert_like(straight, recomputes=False)


def tensor_parallel(rank: int, folder: Path) -> None:
    by_columns = ("attention.query", "attention.key", "attention.value", "mlp.up")
    plan = {f"blocks.*.{name}": ColwiseParallel() for name in by_columns}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("attention.out", "mlp.down")}
    make = partial(Transformer, dropout=0.0)  # dropout between the split layers would differ by rank

    def run(model: nn.Module) -> Run:
        return train(parallelize_module(model, mesh(), plan), batches(Transformer))

    make.example = Transformer.example  # type: ignore[attr-defined]
    parallel = assert_trains_as_stored(make, run)
    alone = train(converted(make), batches(Transformer))
    parallel.assert_like(alone, tolerance=1e-5, recomputes=False)  # sums over ranks in another order, in float32


def convert_a_wrapped_model(rank: int, folder: Path) -> str:
    model = Transformer()
    fully_shard(model.blocks[0], mesh=mesh())
    with pytest.raises(revwire.ConversionError) as caught:
        revwire.convert(model, Transformer.example(), rewire="everywhere")
    return str(caught.value)


CHECKS = {
    **{f"by_{by}": partial(trains, by=by) for by in ("unit", "block", "root")},
    **{f"by_{by}_with_statistics": partial(trains, by=by, network=ConvolutionNet) for by in ("unit", "block", "root")},
    **{f"chunks_by_{by}": partial(trains, by=by, chunks=2) for by in ("unit", "block", "root")},
    **{f"modes_by_{by}": partial(trains, by=by, modes=MODES) for by in ("layer", "unit", "block", "root")},
    **{
        f"checkpointed_by_{by}": partial(trains, by=by, network=StagedNet, checkpoint="stays")
        for by in ("unit", "block", "root")
    },
    "modes_in_chunks": partial(trains, by="layer", modes=MODES, chunks=2),
    "keeps_whole_weights": partial(trains, by="block", reshard_after_forward=False),
    "keeps_whole_weights_of_units": partial(trains, by="unit", reshard_after_forward=False),
    **{f"half_by_{by}": partial(trains, by=by, mp_policy=HALF) for by in ("unit", "block", "root")},
    **{f"hooked_by_{by}": partial(hooked, by=by, exchanging=by == "root") for by in ("unit", "block", "root")},
    "hooked_half": partial(hooked, by="block", exchanging=True, mp_policy=HALF),
    **{c.__name__: c for c in (accumulates, saves_and_resumes, tensor_parallel, convert_a_wrapped_model)},
}


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return outcomes(CHECKS)


@needs_gloo
@pytest.mark.parametrize("by", ["unit", "block", "root"])
@works(STACK, "per unit, per block, on the root alone; batch statistics")
def test_training(found: dict[str, str], by: str) -> None:
    losses = passed(found, f"by_{by}")
    passed(found, f"by_{by}_with_statistics")
    assert losses == passed(found, "by_root"), "the chain is another function when it is sharded otherwise"


@needs_gloo
@works(STACK, "units in chunks (`chunks=`)")
def test_chunks(found: dict[str, str]) -> None:
    assert passed(found, "chunks_by_unit") == passed(found, "chunks_by_block") == passed(found, "chunks_by_root")


@needs_gloo
@works(STACK, "the modes of a memory budget")
def test_modes(found: dict[str, str]) -> None:
    losses = {passed(found, f"modes_by_{by}") for by in ("layer", "unit", "block", "root")}
    assert losses == {passed(found, "by_root")}
    assert passed(found, "modes_in_chunks") == passed(found, "chunks_by_root")


@needs_gloo
@works(STACK, "blocks that stay under `checkpoint=`")
def test_checkpointed(found: dict[str, str]) -> None:
    assert len({passed(found, f"checkpointed_by_{by}") for by in ("unit", "block", "root")}) == 1


@needs_gloo
@works(STACK, "`reshard_after_forward`, on and off")
def test_resharding(found: dict[str, str]) -> None:
    assert passed(found, "keeps_whole_weights") == passed(found, "by_block")
    assert passed(found, "keeps_whole_weights_of_units") == passed(found, "by_block")


@needs_gloo
@pytest.mark.parametrize("by", ["unit", "block", "root"])
@works(STACK, "`MixedPrecisionPolicy`", "the streams stay in float32 or fixed point, whatever the weights are cast to")
def test_mixed_precision(found: dict[str, str], by: str) -> None:
    assert passed(found, f"half_by_{by}") == passed(found, "half_by_block")


@needs_gloo
@works(STACK, "full backward hooks on blocks, registered before or after sharding")
def test_backward_hooks(found: dict[str, str]) -> None:
    for name in ("hooked_by_unit", "hooked_by_block", "hooked_by_root", "hooked_half"):
        passed(found, name)


@needs_gloo
@works(STACK, "gradient accumulation, clipping")
def test_accumulation(found: dict[str, str]) -> None:
    passed(found, "accumulates")


@needs_gloo
@works(STACK, "sharded save and load (`torch.distributed.checkpoint`)")
def test_sharded_checkpoints(found: dict[str, str]) -> None:
    passed(found, "saves_and_resumes")


@needs_gloo
@works(
    "Tensor parallelism",
    "`parallelize_module` on the layers of branches",
    "convert first; dropout between split layers differs by rank",
)
def test_tensor_parallelism(found: dict[str, str]) -> None:
    passed(found, "tensor_parallel")


@needs_gloo
@refused("Conversion itself", "a model of which a part is sharded by FSDP", "convert first, then shard")
def test_a_wrapped_model(found: dict[str, str]) -> None:
    assert re.search(r"FSDPModule already \(at blocks\.0\).*convert it first", passed(found, "convert_a_wrapped_model"))
