"""The command line: what it prints, and with which exit code it ends."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import revwire
from revwire.cli import main
from revwire.cli.app import app
from revwire.cli.models import load
from revwire.cli.output import fitted
from toys import encoder

TOY = "test_cli:toy"
SHAPE = ("--input", "2,4,16")


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    """Output that goes to no terminal has no width; a library that another test imports may have set one."""
    monkeypatch.delenv("COLUMNS", raising=False)


def toy():
    return encoder(depth=2)


def toy_with_inputs():
    return toy(), torch.randn(2, 4, 16)


def two_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.toy = toy()

        def forward(self, pathways):
            pathways[0] = self.toy(pathways[0])  # as pytorchvideo's SlowFast does
            return pathways[0] + pathways[1]

    return Two()


a_number = 5


def invoke(*arguments):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_plan_prints_the_table():
    result = invoke("plan", TOY, *SHAPE)
    assert result.exit_code == 0
    assert result.stdout.strip() == str(revwire.plan(toy(), torch.randn(2, 4, 16))).strip()


def test_plan_as_json():
    plan = json.loads(invoke("plan", TOY, *SHAPE, "--json", "--coupling", "re2tal").stdout)
    assert plan["coverage"] == 1
    assert plan["chains"][0]["coupling"] == "re2tal"


def test_exclude_keeps_modules_out():
    plan = json.loads(invoke("plan", TOY, *SHAPE, "--json", "--exclude", "*").stdout)
    assert plan["chains"] == []


@pytest.mark.parametrize("options", [(), ("--coupling", "re2tal"), ("--coupling", "bdia:1/4", "--exact", "--eval")])
def test_verify_passes(options):
    result = invoke("verify", TOY, *SHAPE, *options)
    assert (result.exit_code, "states rebuilt" in result.stdout) == (0, True)


def test_verify_that_fails_ends_with_1(monkeypatch):
    failed = revwire.Check(
        bit_exact=False, reconstruction_error=1.0, gradient_error=1.0, output_equal=False, units=(), inexact=("weight",)
    )
    monkeypatch.setattr(revwire, "verify", lambda *_: failed)
    assert invoke("verify", TOY, *SHAPE).exit_code == 1


def test_a_reconstruction_that_fails_ends_with_1(monkeypatch):
    def fault(*_):
        raise revwire.ReconstructionError("layers.0: its rebuilt input differs")

    monkeypatch.setattr(revwire, "verify", fault)
    result = invoke("verify", TOY, *SHAPE)
    assert (result.exit_code, result.stderr) == (1, "revwire: layers.0: its rebuilt input differs\n")


def test_profile_as_json():
    result = invoke("profile", TOY, *SHAPE, "--repeats", "1", "--json")
    assert set(json.loads(result.stdout)["costs"]) == {
        "original",
        "checkpoint every block",
        "revwire",
        "revwire, stored",
    }


def test_a_factory_may_bring_its_inputs():
    assert invoke("plan", "test_cli:toy_with_inputs").exit_code == 0


@pytest.mark.parametrize("command", ["plan", "verify", "profile"])
def test_inputs_as_one_list_that_the_model_writes_to(command):
    assert invoke(command, "test_cli:two_inputs", *SHAPE, *SHAPE, "--as-list").exit_code == 0


@pytest.mark.parametrize("command", ["verify", "profile"])
def test_a_model_in_which_nothing_is_rewired_is_no_success(command):
    result = invoke(command, TOY, *SHAPE, "--exclude", "*")
    assert result.exit_code == 2
    assert "nothing was rewired" in result.stderr
    assert "excluded by the caller" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "vit"), "expected ZOO:MODEL"),
        (("plan", "tim:vit"), "did you mean timm?"),
        (("plan", "timm:vit_tiny_patch16_223"), "did you mean vit_tiny_patch16_224"),
        (("plan", "torchvision:swin3d_tt"), "did you mean swin3d_t"),
        (("plan", "pytorchvideo:slowfast_r5"), "did you mean slowfast_r50"),
        (("plan", "timm:qqqqqqqq"), "timm has no model 'qqqqqqqq', but "),
        (("plan", "test_cli:nothing"), "has no 'nothing'"),
        (("plan", "test_cli:a_number", *SHAPE), "expected a torch.nn.Module"),
        (("plan", TOY), "pass --input"),
        (("plan", TOY, "--input", "2,a"), "expected positive whole numbers"),
        (("plan", TOY, "--input", "2,0,16"), "expected positive whole numbers"),
        (("plan", TOY, "--input", "2,4,15"), "the model does not run on this input"),
        (("plan", TOY, *SHAPE, "--coupling", "leapfrog"), "leapfrog"),
        (("doctor", "--device", "gpu:x"), "got the device 'gpu:x'"),
        (("plan", TOY, *SHAPE, "--pretrained"), "--pretrained is for the zoos"),
    ],
)
def test_what_does_not_make_sense_is_one_line_and_ends_with_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("revwire: ")
    assert result.stderr.count("\n") == 1


def test_doctor_ends_with_1_where_its_test_fails(monkeypatch):
    result = invoke("doctor", "--device", "cpu", "--json")
    assert (result.exit_code, json.loads(result.stdout)["healthy"]) == (0, True)
    found = revwire.doctor("cpu")
    failed = replace(found, tests=(replace(found.tests[0], bit_exact=False, reason="why"),))
    monkeypatch.setattr(revwire, "doctor", lambda device: failed)
    result = invoke("doctor")
    assert (result.exit_code, "float32   FAILED: why" in result.stdout) == (1, True)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("timm:vit_tiny_patch16_224", ((2, 3, 224, 224),)),
        ("torchvision:resnet18", ((2, 3, 224, 224),)),
        ("torchvision:r3d_18", ((1, 3, 16, 112, 112),)),
        ("torchvision:swin3d_t", ((1, 3, 16, 224, 224),)),
        ("pytorchvideo:slow_r50", ((1, 3, 8, 224, 224),)),
        ("pytorchvideo:slowfast_r50", ((1, 3, 8, 256, 256), (1, 3, 32, 256, 256))),
    ],
)
def test_zoo_models_come_with_shapes(name, shapes):
    subject = load(name)
    assert subject.shapes == shapes
    assert subject.as_list == (len(shapes) > 1)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("revwire.cli.find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"^revwire: the command line needs typer and rich: pip install 'revwire\[cli\]'$"
    ):
        main()


def test_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["revwire", "--help"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("plan", "verify", "profile", "doctor", "demo"))


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"revwire {revwire.__version__}\n")


def test_help_and_version_import_nothing_heavy():
    for option in ("--help", "--version"):
        code = (
            "import sys; from revwire.cli import main\n"
            f"sys.argv = ['revwire', {option!r}]\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\n"
            "heavy = {'torch', 'numpy', 'timm', 'torchvision', 'transformers'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def does_not_build():
    raise KeyError("first line\nsecond line")


def test_a_model_that_does_not_build_is_one_line():
    result = invoke("plan", "test_cli:does_not_build", *SHAPE)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("revwire: KeyError: ")
    assert "--traceback shows where" in result.stderr
    with pytest.raises(KeyError):
        invoke("plan", "test_cli:does_not_build", *SHAPE, "--traceback")


@pytest.mark.parametrize(("change", "warns"), [(0.04, False), (0.06, True)])
def test_verify_warns_where_the_function_changes(change, warns, monkeypatch):
    check = revwire.verify(revwire.convert(toy(), torch.randn(2, 4, 16), rewire="everywhere"), torch.randn(2, 4, 16))
    monkeypatch.setattr(revwire, "verify", lambda *_: replace(check, function_change=change))
    result = invoke("verify", TOY, *SHAPE)
    assert result.exit_code == 0
    assert ("conversion changes the outputs by 6%" in result.stderr) == warns


def test_a_narrow_terminal_has_a_list_for_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = invoke("plan", TOY, *SHAPE).stdout.splitlines()
    assert max(map(len, lines)) <= 40
    coupling = revwire.plan(toy(), torch.randn(2, 4, 16)).chains[0].coupling
    assert {"chain: chain 0", "units: 4", "shape: 2x4x16", f"coupling: {coupling} exact"} <= set(lines)
    assert not any(line.startswith("---") for line in lines)
    monkeypatch.setenv("COLUMNS", "200")
    assert invoke("plan", TOY, *SHAPE).stdout.strip() == str(revwire.plan(toy(), torch.randn(2, 4, 16))).strip()
    lines = fitted(str(revwire.profile(revwire.convert(toy(), torch.randn(2, 4, 16)), torch.randn(2, 4, 16))), 40)
    assert max(map(len, lines.splitlines())) <= 40


PARTS = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}
HF = {
    "text": ("LlamaConfig", {"vocab_size": 32, "max_position_embeddings": 24}),
    "pictures": ("ViTConfig", {"image_size": 32, "patch_size": 8}),
    "sound": (
        "WhisperConfig",
        {
            "vocab_size": 32,
            "max_source_positions": 8,
            "num_mel_bins": 4,
            "d_model": 16,
            **{f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in PARTS.items()},
            **dict(
                zip(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), range(4), strict=True)
            ),
        },
    ),
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("kind", HF)
def test_a_model_by_its_configuration(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    name, options = HF[kind]
    sizes = {} if kind == "sound" else SMALL
    config = getattr(transformers, name)(**sizes, **options)
    if kind == "text":
        config.architectures = ["LlamaForCausalLM"]
        config.num_key_value_heads = 2
    config.save_pretrained(tmp_path)
    plan = json.loads(invoke("plan", f"hf:{tmp_path}", "--json", "--rewire", "everywhere").stdout)
    assert plan["chains"]
    assert plan["model"] == ("LlamaForCausalLM" if kind == "text" else name.replace("Config", "Model"))
    if kind == "text":
        plan = json.loads(invoke("plan", f"hf:{tmp_path}", "--json", "--rewire", "everywhere", "--input", "1,7").stdout)
        assert plan["chains"][0]["units"][0]["shape"] == [1, 7, 16]


def test_a_hub_out_of_reach_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing-of-this-name", str(tmp_path)):
        result = invoke("plan", f"hf:{name}")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "got no configuration" in result.stderr
        assert "pass a local folder that has the model's config.json" in result.stderr


@pytest.mark.slow
def test_the_plan_in_the_readme_is_what_the_command_prints():
    printed = CliRunner().invoke(app, ["plan", "timm:vit_small_patch16_224"]).stdout
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert printed.strip() in readme
