"""Lightning's `Trainer`: training, mixed precision, accumulation, checkpoints, resuming, and its DDP strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import ConvolutionNet
from table import works
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import Run, batches, converted

import revwire
from processes import needs_gloo, outcomes, passed

lightning = pytest.importorskip("lightning", reason="needs lightning")

STACK = "Lightning"
pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning, about workers and loggers
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Module(lightning.LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = converted(ConvolutionNet) if model is None else model
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        x, labels = batch
        loss = nn.functional.cross_entropy(self.model(x).float(), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> DataLoader:
    data = [torch.cat(c) for c in zip(*batches(ConvolutionNet, 4), strict=True)]
    return DataLoader(TensorDataset(*data), batch_size=4)


def fit(module: Module, folder: Path, epochs: int = 2, resume: Path | None = None, **options: Any) -> Run:
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, **{**QUIET, "enable_checkpointing": False, **options}
    )
    trainer.fit(module, loader(), ckpt_path=resume)
    return Run(module.losses).finish(module)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"precision": "bf16-mixed"},
    "accumulation and clipping": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}


def compare(folder: Path, **options: Any) -> None:
    module, twin = Module(), Module()
    reversible = fit(module, folder, **options)
    with revwire.stored_activations(twin.model):
        reversible.assert_like(fit(twin, folder, **options), recomputes=False)
    reversible.assert_learnt(Module())


@pytest.mark.parametrize("options", OPTIONS)
@works(STACK, "training; bf16; accumulation and clipping; batch statistics")
def test_training(options: str, tmp_path: Path) -> None:
    compare(tmp_path, **OPTIONS[options])


@works(STACK, "checkpoint, resume, `load_from_checkpoint`")
def test_resuming(tmp_path: Path) -> None:
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    straight = fit(Module(), tmp_path, callbacks=[keep], enable_checkpointing=True)
    resumed = fit(Module(), tmp_path, resume=tmp_path / "epoch=0.ckpt")
    assert resumed.losses == straight.losses[4:]
    resumed.losses = straight.losses
    resumed.assert_like(straight, recomputes=False)
    loaded = Module.load_from_checkpoint(
        tmp_path / "epoch=1.ckpt", model=ConvolutionNet()
    )  # not converted: the same keys
    assert all(torch.equal(t, straight.state[n]) for n, t in loaded.state_dict().items())


def ddp_strategy(rank: int, folder: Path) -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    compare(folder, strategy="ddp", devices=2, plugins=[LightningEnvironment()])


def ddp_callback(rank: int, folder: Path) -> None:
    from lightning.fabric.plugins.environments import LightningEnvironment

    from revwire.lightning import RevwireCallback

    torch.manual_seed(0)
    module = Module(ConvolutionNet())
    callback = RevwireCallback("model", rewire="everywhere")
    fit(module, folder, strategy="ddp", devices=2, plugins=[LightningEnvironment()], callbacks=[callback])
    assert revwire.report(module.model).units
    for p in module.parameters():
        both = [torch.zeros_like(p) for _ in range(2)]
        torch.distributed.all_gather(both, p.detach())
        assert torch.equal(*both)


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    return outcomes({"strategy": ddp_strategy, "callback": ddp_callback})


@needs_gloo
@works(STACK, "DDP strategy, two processes")
def test_ddp_strategy(found: dict[str, str]) -> None:
    passed(found, "strategy")


@needs_gloo
@works(STACK, "`RevwireCallback`: the first call of training converts, two processes (DDP)")
def test_ddp_callback(found: dict[str, str]) -> None:
    passed(found, "callback")
