"""Training: a resumed run is the run that was not stopped, two processes are one, and all ways to keep activations give
one result.
"""

import csv
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import is_gloo_available

pytest.importorskip("lightning")
pytest.importorskip("av")

from lightning.pytorch.callbacks import Callback
from tiny import PLAIN, TINY

import revwire
from benchmarks.tal import backbones, clips, loading, networks, runs, training
from benchmarks.tal.callbacks import Average
from benchmarks.tal.config import CONFIGS, ConfigError, load
from benchmarks.tal.loading import Batches, TrainingLoader, shared
from benchmarks.tal.synthetic import synthesize

ROOT = Path(__file__).parents[2]


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


# -- resume
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        ("training.test_every=1",),
        ("training.accumulate=2", "training.ema=0.9", "memory=bdia", "localizer=vsgn", "vsgn=VSGN"),
    ],
)
def test_a_resumed_run_ends_with_the_same_losses(tiny, changes):
    changes = [
        c.replace("VSGN", "{channels: 32, strides: [2, 4], max_steps: 8, layers: 1, neighbours: 2}") for c in changes
    ]
    whole, stopped = (tiny(f"name={name}", *changes) for name in ("whole", "stopped"))
    expected = runs.train(whole, progress=False).results[0]["figures"]
    with pytest.raises(RuntimeError, match="power cut"):
        runs.train(stopped, progress=False, further=[PowerCut()])
    assert runs.latest(stopped).name == "step3.ckpt"
    assert list(losses(stopped)) == [0, 1, 2, 3]
    resumed = runs.train(stopped, runs.latest(stopped), progress=False)
    assert [path.name for path in (stopped.folder / "csv").iterdir()] == ["version_0"]
    assert losses(whole) == losses(stopped)
    assert lines(whole) == lines(stopped)
    assert [path.name for path in (stopped.folder / "tensorboard").iterdir()] == ["version_0"]
    assert len(set(losses(whole).values())) == 6
    assert resumed.results[0]["figures"] == expected
    assert runs.evaluate(stopped, runs.latest(stopped), progress=False) == expected
    torch.testing.assert_close(weights(stopped), weights(whole), rtol=0, atol=0)


def lines(config):
    with (config.folder / "csv/version_0/metrics.csv").open() as file:
        return [(row["step"], row["train/loss"], row["test/mAP"]) for row in csv.DictReader(file)]


def test_a_run_without_checkpoint_cannot_be_resumed(tiny):
    with pytest.raises(ConfigError, match="there is no checkpoint to go on from; train without --resume"):
        runs.latest(tiny())


# -- processes
# -------------------------------------------------------------------------------------------------------------


IDLE = ("attn.key.bias", "attn.key_norm.bias")
"""Their gradients are 0 but for rounding, as attention does not see what it adds to all keys; AdamW blows the rounding
up to steps.
"""


ALONE = ("name=alone", *PLAIN, "memory=bdia")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


PAIRS = """
import os, sys
import torch._dynamo
from benchmarks.tal import runs
from benchmarks.tal.__main__ import main
common, port = sys.argv[1:], {ports}
for strategy in {strategies}:
    for rank in "01":
        if not os.fork():
            os.environ.update(RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port[strategy])
            sys.argv[1:] = [*common, f"name={{strategy}}", f"training.strategy={{strategy}}"]
            sys.exit(main())
    if os.wait()[1] | os.wait()[1]:
        sys.exit(strategy)
"""
"""Two processes for each strategy, with the environment that torchrun gives them; what they import is imported once."""
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """Runs in two processes, by strategy."""
    folder = tmp_path_factory.mktemp("together")
    arguments = [f"data.root={data}", f"output={folder}", *TINY, *PLAIN, "training.devices=2", "memory=bdia"]
    code = PAIRS.format(strategies=STRATEGIES, ports={s: port() for s in STRATEGIES})
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--quiet", "--config", "synthetic", *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "test",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {s: load("synthetic", [*arguments, f"name={s}", f"training.strategy={s}"]) for s in STRATEGIES}


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """A run in one process, and its figures."""
    config = load("synthetic", [f"data.root={data}", f"output={tmp_path_factory.mktemp('alone')}", *TINY, *ALONE])
    return config, runs.train(config, progress=False).results[0]["figures"]


@pytest.mark.slow
@pytest.mark.skipif(not is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one_with_the_same_global_batch(alone, together, strategy):
    (alone, figures), both = alone, together[strategy]
    one, two = weights(alone), weights(both)
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(IDLE):
            continue
        torch.testing.assert_close(
            two[name].reshape(one[name].shape),
            one[name],
            rtol=0,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    record = next(both.folder.glob("result.*.json")).read_text()
    assert f'"mAP": {figures["mAP"]:.4f}'[:-1] in record


# -- order
# -----------------------------------------------------------------------------------------------------------------


def test_a_pass_has_every_clip_once_and_each_pass_its_own_order():
    keys = [key for batch in Batches(7, 2, 21, seed=3) for key in batch]
    passes = [[index for turn, index in keys if turn == t] for t in range(6)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 6
    assert keys != [key for batch in Batches(7, 2, 21, seed=4) for key in batch]


def test_processes_share_out_what_one_would_have():
    one = list(Batches(7, 6, 5, seed=0))
    parts = [list(Batches(7, 6, 5, 0, rank, 3)) for rank in range(3)]
    assert [[key for part in batch for key in part] for batch in zip(*parts, strict=True)] == one
    with pytest.raises(ConfigError, match=r"training.batch: got 6 clips for 4 processes; expected a multiple"):
        Batches(7, 6, 5, 0, 0, 4)


def test_test_clips_are_shared_out_evenly_and_none_is_left_out():
    for items in (1, 2, 5, 6):
        parts = [shared(items, rank, 3) for rank in range(3)]
        assert len({len(part) for part in parts}) == 1
        assert {i for part in parts for i in part} == set(range(items))


class Keys(torch.utils.data.Dataset):
    def __getitem__(self, key):
        return torch.tensor(key)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_where_it_stopped(workers):
    def loader():
        return TrainingLoader(
            Keys(), Batches(5, 2, 6, 0), num_workers=workers
        )  # workers read ahead of what is handed over

    whole = [b.tolist() for b in loader()]
    stopped, again = loader(), loader()
    reader = iter(stopped)
    first = [next(reader).tolist() for _ in range(2)]
    again.load_state_dict(stopped.state_dict())
    assert len(again) == 6
    assert first + [b.tolist() for b in again] == whole


# -- how activations are kept
# --------------------------------------------------------------------------------------------


def gradients_of_first_clips(config):
    module, data = runs.prepared(config)
    torch.manual_seed(1)  # of drop-path
    batch = clips.collate([data.training[0, i] for i in range(2)])
    torch.stack(list(module.network(batch).values())).sum().backward()
    return {name: p.grad for name, p in module.network.named_parameters()}


def test_checkpointing_has_the_gradients_of_stored_activations(tiny):
    stored, checkpointed = (gradients_of_first_clips(tiny(f"memory={m}")) for m in ("stored", "checkpoint"))
    assert [name for name, g in stored.items() if g is None] == []
    torch.testing.assert_close(checkpointed, stored, rtol=0, atol=1e-7)


def test_the_leanest_is_the_plain_call(tiny):
    module, _ = runs.prepared(tiny("memory=leanest"))
    plan = revwire.report(module.network.backbone)
    assert plan.peaks is not None
    assert module.network.blocks
    assert all(g is not None for g in gradients_of_first_clips(tiny("memory=leanest")).values())


def test_what_a_spelling_asks_for():
    assert networks.rewiring_of("re2tal") == ("re2tal", 1, None, None)
    assert networks.rewiring_of("bdia:1/8+stays+2chunks") == ("bdia:1/8", 2, "stays", None)
    assert networks.rewiring_of("re2tal+float").exact is False


@pytest.mark.parametrize("config", [path.stem for path in CONFIGS.glob("*re2slowfast*.yaml")])
def test_slowfast_recipes_have_streams_of_floats(config):
    """In fp32 a value of a SlowFast has 3 to 5 times the rounding error in 32-bit fixed point."""
    assert networks.rewiring_of(load(config).memory) == ("re2tal", 1, None, False)


def test_streams_of_floats_are_asked_for(tiny, monkeypatch):
    convert, asked = revwire.convert, []
    monkeypatch.setattr(
        revwire, "convert", lambda *a, **options: asked.append(options["exact"]) or convert(*a, **options)
    )
    for memory in ("re2tal", "re2tal+float"):
        runs.prepared(tiny(f"memory={memory}"))
    assert asked == [None, False]


@pytest.mark.parametrize("memory", ["re2tal", "bdia", "re2tal+2chunks"])
def test_reversible_variants_are_revwires(tiny, memory):
    module, data = runs.prepared(tiny(f"memory={memory}", *PLAIN))
    backbone = module.network.backbone
    coupling, _, chunks = memory.partition("+")
    assert revwire.report(backbone).chains[0].coupling.startswith(coupling)
    assert (max(u.chunks for u in revwire.report(backbone).units) > 1) == bool(chunks)
    batch = clips.collate([data.training[0, i] for i in range(2)])
    found = {}
    for stored in (False, True):
        module.zero_grad()
        with revwire.stored_activations(backbone) if stored else nullcontext():
            torch.stack(list(module.network(batch).values())).sum().backward()
        found[stored] = {name: p.grad.clone() for name, p in backbone.named_parameters()}
    torch.testing.assert_close(found[False], found[True], rtol=1e-4, atol=1e-6)  # float streams, rebuilt


def test_a_frozen_backbone_learns_nothing(tiny):
    found = gradients_of_first_clips(tiny("backbone.frozen=true"))
    assert all((g is None) == name.startswith("backbone.") for name, g in found.items())


def test_an_unknown_way_is_an_error(tiny):
    with pytest.raises(revwire.CouplingError, match="got 'chekpoint'"):
        runs.prepared(tiny("memory=chekpoint"))


@pytest.mark.parametrize("memory", ["re2tal+chunks", "re2tal+0chunks", "bdia+8", "bdia+8.5chunks", "re2tal+stay"])
def test_what_is_no_number_of_chunks_is_an_error(tiny, memory):
    with pytest.raises(ConfigError, match="behind a plus its chunks"):
        runs.prepared(tiny(f"memory={memory}"))


# -- parameters
# ------------------------------------------------------------------------------------------------------------


def test_rates_fall_towards_the_input(tiny):
    config = tiny("training.layer_decay=0.5", "training.backbone_lr=1.0", "training.lr=3.0")
    module, _ = runs.prepared(config)
    names = {id(p): name for name, p in module.network.named_parameters()}
    rates = {
        names[id(p)]: (g["lr"], g["weight_decay"])
        for g in training.groups(module.network, config.training)
        for p in g["params"]
    }
    backbone = {
        name.removeprefix("backbone.network."): rate for name, rate in rates.items() if name.startswith("backbone")
    }
    assert len(module.network.blocks) == 2
    assert backbone["patch_embed.proj.weight"] == (0.25, 0.05)
    assert backbone["layers.0.blocks.0.attn.qkv.weight"] == (0.5, 0.05)
    assert backbone["layers.0.blocks.1.attn.qkv.weight"] == (1.0, 0.05)
    assert backbone["layers.0.blocks.1.attn.qkv.bias"] == (1.0, 0.0)
    assert {rate for name, (rate, _) in rates.items() if name.startswith("head")} == {3.0}
    assert len(rates) == sum(1 for _ in module.network.parameters())


def test_the_schedule_warms_up_and_anneals(tiny):
    factor = training.annealed(tiny("training.warmup=4", "training.steps=104", "training.final=0.1").training)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(54) == pytest.approx(0.55)
    assert factor(104) == factor(200) == pytest.approx(0.1)
    longer = training.annealed(tiny("training.warmup=0", "training.schedule=1000000").training)
    assert longer(100) == pytest.approx(1, abs=1e-6)


class Trainer:
    global_step = 0


def test_the_average_stands_in_while_testing_and_forgets_its_first_weights():
    model, average, trainer = nn.Linear(1, 1, bias=False), Average(0.9), Trainer()
    for step in range(1, 4):
        nn.init.constant_(model.weight, float(step))
        trainer.global_step = step
        average.on_train_batch_end(trainer, model, None, None, 0)
        average.on_train_batch_end(trainer, model, None, None, 1)  # an accumulated part is no step
    expected = 1.0
    for step, decay in ((2, 2 / 11), (3, 3 / 12)):
        expected = decay * expected + (1 - decay) * step
    average.on_validation_start(trainer, model)
    assert model.weight.item() == pytest.approx(expected)
    average.on_validation_end(trainer, model)
    assert model.weight.item() == 3.0
    again = Average(0.9)
    again.load_state_dict(average.state_dict())
    again.on_validation_start(trainer, model)
    assert model.weight.item() == pytest.approx(expected)


def test_weights_load_by_key_whatever_stands_before_them(tiny, tmp_path):
    config = tiny("backbone.weights=mine.pt")
    with pytest.raises(ConfigError, match=r"backbone.weights: there is no .*mine.pt"):
        runs.prepared(config)
    module, _ = runs.prepared(tiny("seed=5"))
    state = {f"network.{name}": value for name, value in module.network.state_dict().items()}
    torch.save({"state_dict": state}, loading.root(config) / "mine.pt")
    loaded = runs.prepared(config)[0].network.backbone.state_dict()
    torch.testing.assert_close(loaded, module.network.backbone.state_dict(), rtol=0, atol=0)


def test_videomae_goes_through_in_clips():
    pytest.importorskip("transformers")
    backbone = networks.Backbone(backbones.VideoMAE(4, 32, 2, 16, 2, 8), clip_frames=4, freeze_norms=False)
    network = networks.Network(backbone, nn.Identity())
    frames = torch.randint(0, 256, (1, 3, 8, 32, 32), dtype=torch.uint8)
    networks.rewire(network, frames, "bdia")
    assert len(network.blocks) == 2
    features = backbone(frames)
    assert features.shape == (1, 16, 4)
    features.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)
