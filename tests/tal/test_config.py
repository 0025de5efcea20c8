"""Configurations: one defaults file per data set, differences from it, every key known."""

import dataclasses

import pytest
import yaml

from benchmarks.tal import config, keys
from benchmarks.tal.config import CONFIGS, Config, ConfigError, load

EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_configuration_loads_and_comes_back_from_its_own_text(name, tmp_path):
    loaded = load(name)
    copy = tmp_path / f"{name}.yaml"
    copy.write_text(loaded.to_yaml())
    assert load(copy) == loaded
    assert loaded.name == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_holds_only_what_differs(name):
    tree = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "defaults" not in tree:
        return
    mine, defaults = (dataclasses.asdict(load(n)) for n in (name, tree.pop("defaults")))
    for section, value in tree.items():
        keys = value if isinstance(value, dict) else {None: value}
        for key in keys:
            new, old = (t[section] if key is None else t[section].get(key) for t in (mine, defaults))
            assert new != old, f"{name}: {section}.{key} repeats the defaults"


@pytest.mark.parametrize("name", ["activitynet", "badminton", "kinetics", "synthetic", "thumos14"])
def test_a_data_set_holds_only_what_differs(name):
    known = dict(leaves(config.defaults_of(Config)))
    repeated = [
        key
        for key, value in leaves(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
        if known.get(key, ...) == value
    ]
    assert repeated == []


def leaves(tree, prefix=""):
    """(dotted key, value) of all that is no section."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize(
    "memory", ["stored", "checkpoint", "leanest", "re2tal", "bdia:1/8", "re2tal+8chunks", "re2tal+stays"]
)
def test_variants_differ_in_one_line(memory):
    base, variant = (dataclasses.asdict(load("thumos14", [f"memory={m}"])) for m in ("stored", memory))
    assert {key for key in base if base[key] != variant[key]} <= {"memory"}
    assert variant["memory"] == memory


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stpes=3", "command line: unknown key 'training.stpes'; did you mean 'training.steps'"),
        ("backbone_lr=1", "unknown key 'backbone_lr'; did you mean 'training.backbone_lr'"),
        ("actionformer.chanels=3", "unknown key 'actionformer.chanels'; did you mean 'actionformer.channels'"),
        (
            "backbone.options.drop_path=3",
            "unknown key 'backbone.options.drop_path'; did you mean 'backbone.options.drop_path_rate'",
        ),
        ("suppression.sgima=3", "unknown key 'suppression.sgima'; did you mean 'suppression.sigma'"),
        ("actionformer.in_channels=3", "unknown key 'actionformer.in_channels'"),
        ("training.zzz=3", "unknown key 'training.zzz'; expected one of training.accelerator, training.accumulate"),
        ("training.steps=many", "training.steps: got 'many'; expected int"),
        ("training.steps=1.5", "training.steps: got 1.5; expected int"),
        ("training=3", "training: got 3; expected Training"),
        ("localizer=actionfromer", "localizer: got 'actionfromer'; expected one of 'actionformer', 'tridet', 'vsgn'"),
        ("backbone.name=swin3d_tt", "backbone.name: got 'swin3d_tt'; did you mean 'swin3d_t'"),
        ("thresholds=[a]", r"thresholds\[0\]: got 'a'; expected float"),
        ("training.steps", "got 'training.steps'; expected key=value"),
        ("training.steps=[", "training.steps: got '\\[', which is no YAML value"),
    ],
)
def test_what_is_not_known_is_an_error_that_helps(override, message):
    with pytest.raises(ConfigError, match=message):
        load("thumos14", [override])


def test_an_unknown_key_of_a_file_is_named_with_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: thumos14\ntraining: {stepz: 3}\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: unknown key 'training.stepz'; did you mean 'training.steps'"):
        load(path)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="configuration 'thumos15': no such file; did you mean 'thumos14'"):
        load("thumos15")
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: nothing_like_it\n")
    with pytest.raises(ConfigError, match="configuration 'nothing_like_it': no such file"):
        load(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"mine.yaml: got list; expected keys and values"):
        load(path)


def test_a_file_that_is_not_complete_says_what_is_missing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="missing keys: task, memory"):
        load(path)


def test_defaults_may_have_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("defaults: b\ntraining.batch: 3\n")
    (tmp_path / "b.yaml").write_text("defaults: thumos14_re2swin_t_actionformer\ntraining: {batch: 5, steps: 7}\n")
    ours, base = load(tmp_path / "a.yaml"), load("thumos14_re2swin_t_actionformer")
    training = dataclasses.replace(base.training, batch=3, steps=7)
    assert ours == dataclasses.replace(base, name="a", training=training)
    (tmp_path / "b.yaml").write_text("defaults: a\n")
    with pytest.raises(ConfigError, match=r"a.yaml: its defaults lead back to it"):
        load(tmp_path / "a.yaml")


def test_numbers_without_a_point_are_numbers():
    assert load("thumos14", ["training.lr=1e-5"]).training.lr == 1e-5  # text, to YAML


def test_folders_of_variants_differ():
    folders = {
        load("thumos14", [o]).folder for o in ("memory=stored", "memory=bdia:1/8", "backbone.frozen=true", "seed=1")
    }
    assert len(folders) == 4
    assert all(len(folder.parts) == 4 for folder in folders)


def test_dotted_keys_and_sections_are_the_same(tmp_path):
    for i, text in enumerate(("training.steps: 3\ntraining: {batch: 4}", "training: {steps: 3, batch: 4}")):
        (tmp_path / f"{i}.yaml").write_text(f"defaults: thumos14\n{text}\n")
    first, second = (dataclasses.replace(load(tmp_path / f"{i}.yaml"), name="") for i in range(2))
    assert first == second
    assert (first.training.steps, first.training.batch) == (3, 4)


def test_options_of_other_networks_are_unknown():
    assert load("badminton", ["backbone.name=videomae_b", "backbone.options.layers=2"]).backbone.options == {
        "layers": 2
    }
    with pytest.raises(ConfigError, match=r"unknown key 'backbone.options.embed_dim'"):
        load("badminton", ["backbone.name=videomae_b", "backbone.options.embed_dim=8"])


def test_parameters_are_those_of_a_constructor():
    assert keys.parameters(lambda a, *b, c=1, name=2, **d: None) == ("a", "c")
