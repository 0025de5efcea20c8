"""`revwire.doctor`: what it finds, what it says of it, and a self-test that can fail."""

import json
import os
import warnings

import torch

import revwire
from revwire._api import doctor as module
from revwire._api.doctor import Kernels, kernels_on, self_test, settings
from revwire._streams import fused, kernels
from revwire._streams.base import Undone

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ONE_PASS = Kernels("Triton", "one pass")


def notes(device, used=ONE_PASS, **changed):
    names = {name.rpartition(".")[2].strip("$"): name for name in settings(device)}
    found = settings(device) | {names[name]: value for name, value in changed.items()}
    return list(module._notes(device, used, found))


def test_a_sound_machine():
    state = torch.get_rng_state()
    found = revwire.doctor("cpu")
    assert found.healthy
    assert [test.precision for test in found.tests] == ["float32", "bfloat16"]
    assert found.versions["torch"] == torch.__version__.split("+")[0]
    assert found.kernels == kernels_on(CPU)
    assert torch.equal(state, torch.get_rng_state())
    assert json.loads(json.dumps(found.to_dict()))["healthy"] is True
    assert "float32   bit-exact" in str(found)


def test_the_default_is_the_accelerator_or_the_cpu():
    assert module._current().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_fault_fails_the_test_and_is_told(monkeypatch):
    true = fused if fused.INTERPRETED else kernels
    monkeypatch.setattr(true, "retreat", lambda following, *_, **__: Undone(following + 1))
    found = self_test(CPU, torch.float32)
    assert not found.bit_exact
    assert found.reason.startswith("ReconstructionError: ")


def test_what_a_device_raises_is_the_reason(monkeypatch):
    def no_device(*_):
        raise RuntimeError("no driver\nand more")

    monkeypatch.setattr(module, "_fault", no_device)
    found = self_test(CPU, torch.float32)
    assert (found.bit_exact, found.reason) == (False, "RuntimeError: no driver")


def test_why_the_plain_form_is_in_use(monkeypatch):
    monkeypatch.setattr(fused, "serves", lambda device: False)
    assert kernels_on(torch.device("xpu")).why == "there are kernels for CUDA devices and for the CPU, none for xpu"
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert kernels_on(CUDA) == Kernels("plain", "triton is not installed")
    assert kernels_on(CPU) == Kernels("plain", "numba is not installed: pip install 'revwire[fast]'")
    monkeypatch.setitem(os.environ, "REVWIRE_KERNELS", "0")
    assert kernels_on(CPU).why == "REVWIRE_KERNELS=0 in the environment turns kernels off"


def test_why_triton_does_not_compile(monkeypatch):
    def serves(device):
        warnings.warn("Triton: got OSError (no C compiler)", stacklevel=2)
        return False

    monkeypatch.setattr(fused, "serves", serves)
    monkeypatch.setattr(fused, "available", lambda: True)
    assert kernels_on(CUDA) == Kernels("plain", "Triton: got OSError (no C compiler)")


def test_settings_that_matter_are_noted():
    assert "index_add" in notes(CUDA)[0]
    assert "autograd's thread" in notes(CUDA, benchmark=True)[0]
    assert not [n for n in notes(CUDA, benchmark=True, deterministic=True) if "autograd's thread" in n]
    workspace = notes(CUDA, use_deterministic_algorithms=True, CUBLAS_WORKSPACE_CONFIG=None)
    assert workspace[0].startswith("refused by PyTorch: matrix products")
    assert not notes(CUDA, use_deterministic_algorithms=True, CUBLAS_WORKSPACE_CONFIG=":4096:8")
    assert notes(CUDA, Kernels("plain", "why"))[0].startswith("slow: the plain form of the streams takes some seventy")
    assert "no float64" in notes(torch.device("mps"))[1]


def test_long_reasons_are_cut():
    assert module._short("a" * 300 + "\nb") == "a" * 160 + " …"
    assert module._short("") == ""
