"""`doctor`: what revwire finds on this machine, what of it would make a step slow or inexact, and a test that takes
seconds.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from revwire._api.convert import convert
from revwire._api.verify import verify
from revwire._streams import fused, kernels
from revwire._surroundings.randomness import preserved_random_state

PACKAGES = ("revwire", "torch", "triton", "numba", "timm", "torchvision", "transformers", "numpy")
VARIABLES = ("REVWIRE_KERNELS", "TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG")
_CPU, _CUDA = "cpu", "cuda"
_MIB, _MOST_LETTERS = 2**20, 160


@dataclass(frozen=True)
class Kernels:
    """What does the arithmetic of fixed-point streams on the device: ``"Triton"``, ``"Numba"`` or ``"plain"``, and
    why.
    """

    name: str
    why: str


@dataclass(frozen=True)
class SelfTest:
    """A training step of a small network on the device, and `verify`: in one precision.

    Attributes:
        precision: of the branches.
        bit_exact: what `Check.bit_exact` says; False also where the step failed.
        reason: why it is not; None where it is.
        seconds: that it took, with all that is compiled at a first call.
    """

    precision: str
    bit_exact: bool
    reason: str | None
    seconds: float


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; ``str()`` is a report.

    Attributes:
        versions: of Python and of packages; None for those that are not installed. Beside PyTorch's, those of the CUDA
            and cuDNN that it was built with.
        device: the one that was examined.
        devices: names and sizes of those that there are.
        kernels: what does the arithmetic of streams on it.
        settings: of PyTorch and of the environment, on which bits and seconds depend.
        notes: what would be slow, inexact or refused here, each with the way out.
        tests: one per precision.
    """

    versions: dict[str, str | None]
    device: str
    devices: tuple[str, ...]
    kernels: Kernels
    settings: dict[str, Any]
    notes: tuple[str, ...]
    tests: tuple[SelfTest, ...]

    @property
    def healthy(self) -> bool:
        """Whether all tests were exact to the bit."""
        return all(test.bit_exact for test in self.tests)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data (JSON-ready)."""
        return {"healthy": self.healthy, **asdict(self)}

    def __str__(self) -> str:
        lines = [
            *_listed("versions", {name: v or "not installed" for name, v in self.versions.items()}),
            *_listed(
                "devices", {name: "examined" if name.startswith(f"{self.device}:") else "" for name in self.devices}
            ),
            *_listed("kernels", {self.kernels.name: self.kernels.why}),
            *_listed("settings", self.settings),
            *["notes", *(f"  - {note}" for note in self.notes or ("nothing here is slow or refused",))],
            *["self-test", *(f"  {_verdict(test)}" for test in self.tests)],
        ]
        return "\n".join(lines)


def doctor(device: torch.device | str | None = None) -> Diagnosis:
    """Look at versions, devices, kernels and settings, and run a small network on the device.

    Nothing stays changed: not the settings, nor the random state.

    Args:
        device: to examine; by default the accelerator that is current, or else the CPU.

    Raises:
        RuntimeError: PyTorch knows no such device by name.

    Example:
        >>> import revwire
        >>> revwire.doctor("cpu").healthy
        True
    """
    chosen = torch.device(device) if device is not None else _current()
    if chosen == torch.device(_CUDA) and torch.cuda.is_available():
        chosen = torch.device(_CUDA, torch.cuda.current_device())
    used = kernels_on(chosen)
    found = settings(chosen)
    tests = tuple(self_test(chosen, precision) for precision in (torch.float32, torch.bfloat16))
    name = str(chosen)
    return Diagnosis(_versions(), name, tuple(_devices()), used, found, tuple(_notes(chosen, used, found)), tests)


def kernels_on(device: torch.device) -> Kernels:
    """What does the arithmetic of fixed-point streams on a device, and why."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if fused.serves(device):
            how = "Triton's interpreter, for tests" if fused.INTERPRETED else "one pass over memory each"
            return Kernels("Triton", how)
    if os.environ.get("REVWIRE_KERNELS") == "0":
        return Kernels("plain", "REVWIRE_KERNELS=0 in the environment turns kernels off")
    if device.type == _CPU:
        if kernels.available():
            return Kernels("Numba", "one pass over memory each")
        return Kernels("plain", "numba is not installed: pip install 'revwire[fast]'")
    if device.type != _CUDA:
        return Kernels("plain", f"there are kernels for CUDA devices and for the CPU, none for {device.type}")
    if not fused.available():
        return Kernels("plain", "triton is not installed")
    return Kernels("plain", next((_short(w.message) for w in said), "Triton failed here before, and said why then"))


def settings(device: torch.device) -> dict[str, Any]:
    """Those of PyTorch and of the environment on which bits and seconds depend, by their names."""
    found: dict[str, Any] = {
        "torch.use_deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.backends.mkldnn.matmul.fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }
    if device.type == _CUDA:
        found |= {
            "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
            "torch.backends.cudnn.deterministic": torch.backends.cudnn.deterministic,
            "torch.backends.cuda.matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
            "torch.backends.cudnn.conv.fp32_precision": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            "torch.backends.cuda.flash_sdp_enabled": torch.backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        }
    return found | {f"${name}": os.environ.get(name) for name in VARIABLES}


def self_test(device: torch.device, precision: torch.dtype) -> SelfTest:
    """Convert a small network on a device, train it for a step, and `verify` it: its branches in this precision."""
    start, reason = perf_counter(), None
    try:
        with preserved_random_state((device,) if device.type != _CPU else ()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = _fault(device, precision)
    except Exception as error:  # noqa: BLE001 (whatever a device raises is what the test is for)
        reason = f"{type(error).__name__}: {_short(error)}"
    return SelfTest(str(precision).removeprefix("torch."), reason is None, reason, perf_counter() - start)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout: (batch, tokens, width) → the same."""

    def __init__(self, width: int, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision, enabled=self.precision != torch.float32):
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _fault(device: torch.device, precision: torch.dtype) -> str | None:
    """What is wrong with a step of the small network; None: nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(*(_Block(64, precision) for _ in range(3)), nn.Linear(64, 8)).to(device)
    x = torch.randn(4, 32, 64, device=device)
    convert(model, x, rewire="everywhere")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model(x).float().square().mean().backward()  # the step's own checks are on
    optimizer.step()
    optimizer.zero_grad()
    check = verify(model, x)
    return None if check.bit_exact else str(check)


def _current() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device(_CPU)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    return found | {"cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}


def _devices() -> Iterator[str]:
    yield f"{_CPU}: {platform.machine()}, {os.cpu_count()} cores"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        yield f"{_CUDA}:{i}: {p.name}, {p.total_memory // _MIB} MiB, compute capability {p.major}.{p.minor}"
    current = _current()
    if current.type not in (_CPU, _CUDA):
        yield f"{current.type}: {torch.accelerator.device_count()} of them"


def _notes(device: torch.device, used: Kernels, found: dict[str, Any]) -> Iterator[str]:
    """What would be slow, inexact or refused, and the way out."""
    if used.name == "plain":
        cost = "a dozen passes over each state" if device.type == _CPU else "some seventy launches per unit"
        yield f"slow: the plain form of the streams takes {cost} where a kernel takes one; it has the same bits"
    if fused.INTERPRETED:
        yield "slow: REVWIRE_KERNELS=interpreted is for tests; unset it"
    if device.type not in (_CPU, _CUDA):
        yield f"not tested: no {device.type} device has run revwire's tests; trust the self-test, and `revwire.verify`"
    if device.type == "mps":
        yield "refused: float64 streams, as MPS has no float64; keep the model in float32 or below"
    if device.type == _CUDA:
        yield from _notes_on_cuda(device, found)


def _notes_on_cuda(device: torch.device, found: dict[str, Any]) -> Iterator[str]:
    if found["torch.backends.cudnn.benchmark"] and not found["torch.backends.cudnn.deterministic"]:
        yield (
            "may be refused: torch.backends.cudnn.benchmark picks algorithms anew in autograd's thread, so a recompute "
            "of a convolution may differ, which raises ReconstructionError; set it to False, or cudnn.deterministic to "
            "True"
        )
    if not found["torch.use_deterministic_algorithms"]:
        yield (
            "may be refused: kernels that add in any order (index_add, scatter_add, cumsum) in a branch raise "
            "ReconstructionError; torch.use_deterministic_algorithms(True) picks others"
        )
    elif found["$CUBLAS_WORKSPACE_CONFIG"] is None:
        yield (
            "refused by PyTorch: matrix products under torch.use_deterministic_algorithms(True) without "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
        yield "slow: this GPU has no bfloat16 units; use float16 with a gradient scaler"


def _short(said: object) -> str:
    """The first line of a message, and not all of that."""
    line = next(iter(str(said).splitlines()), "")
    return line if len(line) <= _MOST_LETTERS else f"{line[:_MOST_LETTERS]} …"


def _listed(title: str, rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows), default=0)
    return [title, *(f"  {name:<{width}}  {'not set' if v is None else v}".rstrip() for name, v in rows.items())]


def _verdict(test: SelfTest) -> str:
    said = "bit-exact" if test.bit_exact else f"FAILED: {test.reason}"
    return f"{test.precision:<9} {said} ({test.seconds:.1f} s)"
