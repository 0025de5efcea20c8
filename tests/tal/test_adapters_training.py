"""A run of seconds with adapters in frozen blocks, and one in which all of the same network trains."""

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("av")

from lightning.pytorch.callbacks import Callback
from tiny import TINY

from benchmarks.tal import networks, runs, training
from benchmarks.tal.config import load
from benchmarks.tal.synthetic import synthesize

SMALL = "frames: 4, side: 16, layers: 2, channels: 16, heads: 2, patch: 8, drop_path: 0.1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    synthesize(folder, videos=8, size=24, seconds=(6.0, 8.0))
    return folder


def configuration(data, folder, adapters, memory):
    options = f"backbone.options={{{SMALL}, adapters: {adapters}}}"
    changes = (*TINY, "backbone.name=videomae_s", options, f"memory={memory}", "training.batch=2", "training.steps=2")
    return load("synthetic", [f"data.root={data}", f"output={folder}", *changes, "training.backbone_lr=0.01"])


class Watch(Callback):
    """The backbone's parameters before and after."""

    def on_train_start(self, trainer, module):
        self.before = self._of(module)

    def on_train_end(self, trainer, module):
        self.after = self._of(module)

    def _of(self, module):
        return {name: p.detach().clone() for name, p in module.network.backbone.named_parameters()}


@pytest.mark.parametrize(("adapters", "memory"), [("all", "bdia"), ("[1]", "checkpoint"), ("[]", "bdia")])
def test_what_a_run_trains(data, tmp_path, adapters, memory):
    config, watch = configuration(data, tmp_path, adapters, memory), Watch()
    runs.train(config, progress=False, further=[watch])
    changed = {name for name, value in watch.after.items() if not torch.equal(watch.before[name], value)}
    expected = {name for name in watch.after if adapters == "[]" or ".adapter." in name}
    assert expected
    assert changed == expected


def test_only_adapters_are_given_to_the_optimizer(data, tmp_path):
    config = configuration(data, tmp_path, "[1]", "stored")
    network = networks.build(config, 2, networks.NOWHERE)
    given = {id(p) for group in training.groups(network, config.training) for p in group["params"]}
    of_backbone = {name for name, p in network.backbone.named_parameters() if id(p) in given}
    assert {name.rpartition(".adapter.")[0] for name in of_backbone} == {"network.model.encoder.layer.1"}
    assert len(of_backbone) == 9
