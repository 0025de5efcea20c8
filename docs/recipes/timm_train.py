"""``python timm_train.py``: the loop of timm's ``train.py``, and where its network becomes reversible."""

import csv
import tempfile
from pathlib import Path

import timm
import torch
from timm.data import Mixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, random_seed, update_summary
from torchvision.datasets import FakeData

import revwire

EPOCHS = 4


def main() -> list[float]:
    """Fine-tune a small ViT; returns the loss of each epoch."""
    random_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = timm.create_model(  # pretrained=True, or checkpoint_path=, as ever
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=4, drop_path_rate=0.1
    ).to(device)
    data = FakeData(16, (3, 32, 32), num_classes=4)
    loader = create_loader(
        data, (3, 32, 32), batch_size=8, is_training=True, num_workers=0, use_prefetcher=False, device=device
    )

    # Here train.py has model.set_grad_checkpointing(), and before it wraps: EMA, DistributedDataParallel.
    revwire.convert(model, torch.randn(8, 3, 32, 32, device=device))
    assert revwire.report(model).chains  # print it: what was done, and the peak of a step

    mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)
    loss_of = SoftTargetCrossEntropy()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=EPOCHS)
    average, scaler = ModelEmaV3(model, decay=0.9), NativeScaler(device.type)
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(
            model, optimizer, model_ema=average, amp_scaler=scaler, checkpoint_dir=folder, decreasing=True
        )
        for epoch in range(EPOCHS):
            meter = AverageMeter()
            for images, labels in loader:
                images, targets = mixup(images.to(device), labels.to(device))
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    loss = loss_of(model(images), targets)
                scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
                optimizer.zero_grad()
                average.update(model)
                meter.update(loss.item(), len(images))
            scheduler.step(epoch + 1)
            peaks = revwire.report(model).peaks  # of a step on paper, in bytes; with log_wandb=True they go there too
            metrics = {"loss": meter.avg, "planned_mib": peaks.planned / 2**20, "stored_mib": peaks.stored / 2**20}
            update_summary(epoch, metrics, {}, f"{folder}/summary.csv", write_header=epoch == 0)
            saver.save_checkpoint(epoch, meter.avg)
            losses.append(meter.avg)
        first = next(csv.DictReader(Path(folder, "summary.csv").read_text().splitlines()))
        assert float(first["train_planned_mib"]) < float(first["train_stored_mib"])

        plain = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=4)
        plain.load_state_dict(torch.load(f"{folder}/last.pth.tar", weights_only=False)["state_dict"])  # the same keys
    return losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
