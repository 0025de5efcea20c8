"""Trimmed clips in folders, one folder per class, as Kinetics comes: what a backbone is fine-tuned on before it
localizes.

videos/train/abseiling/x.mp4, videos/train/air drumming/y.mp4 .., videos/val/abseiling/z.mp4 ..
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.tal import videos
from benchmarks.tal.errors import EmptyError
from benchmarks.tal.pixels import Transform, transformed
from benchmarks.tal.sampling import Key, choices


class LabelledClips(Dataset[tuple[Tensor, int]]):
    """Items are (frames uint8 (3, frames, height, width), label). Random choices are made from the key, as in
    `clips.Clips`.

    Args:
        folder: with a folder per class in it. classes: their names, in the order of the labels.
        frames, stride: every ``stride``-th frame, ``frames`` of them: from a random place in training, from the middle
            otherwise. A clip that is too short ends with its last frame.
        transform: of pixels. short_side: to which decoded frames are scaled.
        training: whether places are random. seed: of random choices.

    Raises:
        EmptyError: there is no video in the folders of these classes.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        frames: int,
        stride: int,
        transform: Transform,
        *,
        short_side: int,
        training: bool,
        seed: int = 0,
    ) -> None:
        self.frames, self.stride, self.transform = frames, stride, transform
        self.short_side, self.training, self.seed = short_side, training, seed
        self.classes = tuple(classes)
        self.items = [
            (path, label) for label, name in enumerate(classes) for path in sorted(videos.find(folder / name).values())
        ]
        if not self.items:
            raise EmptyError(f"no clips: there is no video in {folder}, in folders named by class")

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        number, seeds = choices(key, self.seed)
        path, label = self.items[number]
        last = max(videos.index(path).frames - 1, 0)
        spare = max(0, last - (self.frames - 1) * self.stride)
        start = int(np.random.default_rng(seeds).integers(0, spare + 1)) if self.training else spare // 2
        numbers = np.minimum(start + np.arange(self.frames) * self.stride, last)
        pixels = videos.read(path, numbers, short_side=self.short_side, lenient=True)
        return transformed(self.transform, pixels, seeds), label


def classes(folder: Path) -> tuple[str, ...]:
    """Names of the folders in a folder.

    Raises:
        EmptyError: there is none.
    """
    found = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir())) if folder.is_dir() else ()
    if not found:
        raise EmptyError(f"{folder}: expected a folder per class")
    return found


def collate(items: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """(frames (batch, 3, frames, height, width), labels (batch,))."""
    return torch.stack([frames for frames, _ in items]), torch.tensor([label for _, label in items])
