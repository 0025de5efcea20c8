"""``python lightning_trainer.py``; with several devices, ``strategy="ddp"`` is all that changes."""

import lightning
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import revwire


class Classifier(lightning.LightningModule):
    """A small ViT, converted when it is made: checkpoints have the keys that they would have without."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10)
        revwire.convert(self.model, torch.randn(2, 3, 32, 32))
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
    trainer = lightning.Trainer(
        max_epochs=5, precision="bf16-mixed", gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    trainer.fit(classifier, data)
    return classifier.losses


if __name__ == "__main__":
    losses = main()
    assert losses[-1] < losses[0], losses
