"""Checkpoints: the last weights and the best ones are there, and each can be used alone."""

import dataclasses

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("av")

from tiny import PLAIN, TINY

from benchmarks.tal import checkpoints, loading, runs
from benchmarks.tal.config import ConfigError, load
from benchmarks.tal.synthetic import synthesize


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    synthesize(folder, videos=9, size=24, seconds=(6.0, 8.0))
    return folder


@pytest.fixture
def tiny(data, tmp_path):
    return lambda *changes: load("synthetic", [f"data.root={data}", f"output={tmp_path}", *TINY, *PLAIN, *changes])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """(configuration, figures) of a run of one step."""
    place = tmp_path_factory.mktemp("run")
    changes = (*TINY, *PLAIN, "training.steps=1", "backbone.mean=[1, 2, 3]", "training.ema=0.9")
    config = load("synthetic", [f"data.root={data}", f"output={place}", *changes])
    return config, runs.train(config, progress=False).results[0]["figures"]


def names(config):
    return sorted(path.name for path in (config.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(("steps", "every"), [(3, 2), (2, 5)])
def test_the_last_weights_are_saved_whatever_save_every_is(tiny, steps, every):
    config = tiny(f"training.steps={steps}", f"training.save_every={every}")
    row = runs.train(config, progress=False).results[0]
    assert names(config) == ["best.ckpt", "best.json", f"step{steps}.ckpt"]
    assert checkpoints.read(runs.latest(config)).step == steps
    assert runs.evaluate(config, runs.latest(config), progress=False) == row["figures"]


def test_the_best_weights_are_kept(tiny, monkeypatch):
    """Figures of the tests at steps 1 to 4 and at the end; the second is the best, where nothing else is saved."""
    config = tiny("training.steps=4", "training.save_every=4", "training.test_every=1", "training.ema=0.5")
    figures = iter((0.125, 0.5, 0.25, 0.5, 0.1875))
    tested = []
    score = runs.Scorer.score

    def scored(self):
        tested.append(score(self))
        return {**tested[-1], "mAP": next(figures)}

    monkeypatch.setattr(runs.Scorer, "score", scored)
    row = runs.train(config, progress=False).results[0]
    monkeypatch.undo()
    assert row["best"] == {"step": 2, "mAP": 0.5}
    assert names(config) == ["best.ckpt", "best.json", "step4.ckpt"]
    best, last = (checkpoints.named(config, name) for name in ("best", "last"))
    assert checkpoints.read(best).step == 2
    for path, expected in ((best, tested[1]), (last, tested[-1])):
        assert runs.evaluate(config, path, progress=False) == pytest.approx(expected, abs=1e-6)
    weights = [checkpoints.read(path).weights for path in (best, last)]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_best_of_before_counts_for_a_resumed_run_and_for_no_new_one(tiny):
    config = tiny("training.steps=2", "training.test_every=1")
    runs.train(config, progress=False)
    (config.folder / "checkpoints/best.json").write_text('{"step": 1, "mAP": 2.0}')
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, steps=4))
    row = runs.train(longer, runs.latest(config), progress=False).results[0]
    assert row["best"] == {"step": 1, "mAP": 2.0}
    assert names(config) == ["best.ckpt", "best.json", "step4.ckpt"]
    runs.train(tiny("training.steps=1"), progress=False)  # in the same place: the old weights are put aside
    assert runs.latest(config).name == "step1.ckpt"
    assert (config.folder / "checkpoints_before_1/step4.ckpt").is_file()


def test_a_checkpoint_says_what_it_takes_to_use_it(trained):
    config, _ = trained
    found = checkpoints.read(runs.latest(config))
    assert found.config == config
    assert found.classes == loading.truth(config).classes
    alone = found.alone(["training.precision=64-true"])
    assert (alone.training.precision, alone.backbone.mean) == ("64-true", [1.0, 2.0, 3.0])


def test_nothing_is_read_for_training_where_a_checkpoint_is_tested(trained, monkeypatch):
    config, figures = trained
    made = loading.dataset

    def dataset(config, of, training):
        assert not training
        return made(config, of, training)

    monkeypatch.setattr(loading, "dataset", dataset)
    elsewhere = dataclasses.replace(config, data=dataclasses.replace(config.data, training_subset="nowhere"))
    assert runs.evaluate(elsewhere, runs.latest(config), progress=False) == figures
    assert runs.predict(elsewhere, runs.latest(config), None, config.folder / "found.json", progress=False)


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("backbone.options.embed_dim=16", r"another network: backbone.options.embed_dim is 8 there, and 16 here"),
        ("actionformer.levels=1", r"another network: actionformer.levels is 2 there, and 1 here"),
        ("backbone.frozen=true", r"another set of parameters: backbone.frozen is False there, and True here"),
    ],
)
def test_resuming_into_another_network_says_what_differs(trained, tiny, change, message):
    config, _ = trained
    with pytest.raises(ConfigError, match=message):
        runs.train(tiny("backbone.mean=[1, 2, 3]", change), runs.latest(config), progress=False)
    if "network" in message:
        with pytest.raises(ConfigError, match=message):
            runs.evaluate(tiny("backbone.mean=[1, 2, 3]", change), runs.latest(config), progress=False)


def test_files_that_are_no_checkpoints(tiny, tmp_path):
    config = tiny()
    with pytest.raises(ConfigError, match="there is no checkpoint to go on from"):
        checkpoints.named(config, "last")
    with pytest.raises(ConfigError, match=r"there is no .*best.ckpt; expected 'best', 'last' or the path"):
        checkpoints.named(config, "best")
    with pytest.raises(ConfigError, match="got 'best' of no run; give --config"):
        checkpoints.named(None, "best")
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"a.ckpt: it cannot be read as a checkpoint"):
        checkpoints.read(tmp_path / "a.ckpt")
    torch.save({"x": 1}, tmp_path / "b.ckpt")
    with pytest.raises(ConfigError, match=r"b.ckpt: it is no checkpoint of a run"):
        checkpoints.read(tmp_path / "b.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "c.ckpt")
    with pytest.raises(ConfigError, match="it does not say its configuration; give --config"):
        checkpoints.read(tmp_path / "c.ckpt").alone()
