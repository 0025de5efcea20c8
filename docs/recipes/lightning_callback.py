"""``python lightning_callback.py``: nothing but the callback; with several devices, ``strategy="ddp"`` is added."""

import tempfile
from pathlib import Path

import lightning
import timm
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from revwire.lightning import RevwireCallback


class Classifier(lightning.LightningModule):
    """A small ViT, of which nothing here knows that it will be reversible."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
        self.losses: list[float] = []

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss of a batch of images (batch, 3, 32, 32) and labels (batch,)."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over all weights."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> list[float]:
    """Fine-tune for a few epochs; returns the losses."""
    lightning.seed_everything(0)
    classifier = Classifier()
    data = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder)
        trainer = lightning.Trainer(
            max_epochs=5, logger=logger, log_every_n_steps=1, callbacks=[RevwireCallback(revert_at_end=True)]
        )
        trainer.fit(classifier, data)  # ckpt_path= goes on in the form that the checkpoint has
        assert "revwire/planned_mib" in Path(logger.log_dir, "metrics.csv").read_text()
    return classifier.losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
