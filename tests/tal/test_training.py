"""Training: a resumed run is the run that was not stopped, two processes are one, and how activations are kept changes no more than rounding."""

import csv
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("av")

from lightning.pytorch.callbacks import Callback

from benchmarks.tal import runs
from benchmarks.tal.config import ConfigError, load
from benchmarks.tal.synthetic import synthesize

ROOT = Path(__file__).parents[2]

TINY = (
    *("data.drawn={}", "data.annotations=annotations.json", "data.videos=videos", "measure=false"),
    *("sampling.frames=16", "sampling.steps=8", "sampling.short_side=18", "sampling.crop=16", "sampling.stride=4"),
    "backbone.options={embed_dim: 8, depths: [2], num_heads: [2], window_size: [2, 2, 2], drop_path_rate: 0.2}",
    "actionformer={channels: 16, levels: 2, window: 3, max_steps: 8, loss_normalizer: 4, head_layers: 1, drop_path: 0.1}",
    *("training.batch=4", "training.steps=6", "training.warmup=2", "training.save_every=3"),
)
"""A run of seconds, in which all that is random is there: drop-path, augmentation, order."""

PLAIN = ("backbone.options.drop_path_rate=0.0", "actionformer.drop_path=0.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    synthesize(folder, videos=12, size=24, seconds=(6.0, 8.0))
    return folder


@pytest.fixture
def tiny(data, tmp_path):
    return lambda *changes: load("synthetic", [f"data.root={data}", f"output={tmp_path}", *TINY, *changes])


def losses(config, version=0):
    """Step -> loss."""
    with (config.folder / f"csv/version_{version}/metrics.csv").open() as file:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]}


def weights(config):
    return torch.load(runs.latest(config), weights_only=True)["state_dict"]


class PowerCut(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            raise RuntimeError("power cut")


# -- resume ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [(), ("training.accumulate=2", "training.ema=0.9", "memory=bdia", "localizer=vsgn", "vsgn=VSGN")])
def test_a_resumed_run_ends_with_the_same_losses(tiny, changes):
    changes = [c.replace("VSGN", "{channels: 32, strides: [2, 4], max_steps: 8, layers: 1, neighbours: 2}") for c in changes]
    whole, stopped = (tiny(f"name={name}", *changes) for name in ("whole", "stopped"))
    expected = runs.train(whole, progress=False).results[0]["figures"]
    with pytest.raises(RuntimeError, match="power cut"):
        runs.train(stopped, progress=False, further=[PowerCut()])
    assert runs.latest(stopped).name == "step3.ckpt"
    resumed = runs.train(stopped, runs.latest(stopped), progress=False)
    assert list(losses(stopped, 1)) == [3, 4, 5]
    assert losses(whole) == losses(stopped) | losses(stopped, 1)
    assert len(set(losses(whole).values())) == 6
    assert resumed.results[0]["figures"] == expected
    torch.testing.assert_close(weights(stopped), weights(whole), rtol=0, atol=0)


def test_a_run_without_checkpoint_cannot_be_resumed(tiny):
    with pytest.raises(ConfigError, match="there is no checkpoint to go on from; train without --resume"):
        runs.latest(tiny())
