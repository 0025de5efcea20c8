"""What a program does in three calls; and whether a converted one does the same."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import linecache
import os
import pickle
import random
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import revwire
from fuzz.known import CRASHES
from fuzz.program import Program
from revwire._forwards.live import LiveForward
from toys import Plain

CALLS = 3


IN_CHUNKS = 5
"""Of so many programs one runs in chunks under the plain rule, where it may be cut."""

PLAIN = frozenset({type(None), bool, int, float, str, torch.Size, torch.dtype, np.float64})

SECONDS = 30
"""For one seed."""

EXACT = ("bdia:1/2", "re2tal")


class FaultError(Exception):
    """A converted model does something else; ``kind`` names what, without numbers and paths."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[Any, ...]:
        return FaultError, (self.kind, self.detail)


@dataclasses.dataclass
class Outcome:
    """What became of a seed.

    Attributes:
        units: rewired ones.
        calls: that the original finished.
        raised: by the original, in the first call that it did not.
        fault: found, or None.
        told: warnings.
    """

    seed: int
    units: int = 0
    calls: int = 0
    raised: str = ""
    fault: FaultError | None = None
    told: list[str] = dataclasses.field(default_factory=list)


class Model:
    """A program that was run: its globals, and its model."""

    def __init__(self, program: Program) -> None:
        text, name = program.text(), f"<seed {program.seed}>"
        linecache.cache[name] = len(text), None, text.splitlines(True), name
        self.globals: dict[str, Any] = {"__name__": f"fuzz_{program.seed}"}
        exec(_compiled(text, name), self.globals)
        self.left: FaultError | None = None  # by a conversion, that is not as before
        self.root: nn.Module = self.globals["Root"]().to(self.globals["DTYPE"])

    def arguments(self, call: int) -> tuple[Any, Any]:
        return self.globals[f"call{call}"](self.root)

    def convert(self, **options: Any) -> None:
        args, kwargs = self.arguments(0)
        arguments = dict(zip(["x"], args, strict=True)) | kwargs
        before, drawn = self.state(), self.generators()
        arguments = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        seeded(99)
        revwire.convert(self.root, arguments, **options)
        try:
            differ("convert leaves", before, self.state(), 0)
        except FaultError as fault:
            self.left = fault
        if drawn:
            for restore, state in drawn:
                restore(state)
            differ("convert leaves", before, self.state(), 0)
        elif self.left is not None:
            raise self.left

    def generators(self) -> list[tuple[Callable[[Any], Any], Any]]:
        """Those that modules hold: how a state is set, and the present one."""
        found: list[tuple[Callable[[Any], Any], Any]] = []
        for value in (v for m in self.root.modules() for v in vars(m).values()):
            if isinstance(value, torch.Generator):
                found.append((value.set_state, value.get_state()))
            elif isinstance(value, random.Random):
                found.append((value.setstate, value.getstate()))
            elif isinstance(value, np.random.RandomState):
                found.append((value.set_state, value.get_state()))
        return found

    def closed(self) -> set[str]:
        """The classes of blocks whose code, or some of it, may run again in a recompute."""
        opened: set[int] = set()
        for module in self.root.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, LiveForward) and not forward.layout.whole:
                opened |= {id(module), *(id(module.get_submodule(n)) for n in forward.layout.opened)}
        return {type(m).__name__ for m in self.root.modules() if id(m) not in opened}

    def state(self) -> dict[str, Any]:
        """All plain data of the modules and of the program, and generators, by name."""
        found: dict[str, Any] = {}
        for name, module in self.root.named_modules():
            for key, value in vars(module).items():
                if key not in ("_parameters", "_modules", "_revwire") and "hook" not in key:
                    flat(f"{name}.{key}", value, found)
            for key, p in module._parameters.items():
                flat(f"{name}.{key}", p, found)
        for key, value in self.globals.items():
            if key.isupper():
                flat(key, value, found)
        for kind in ("Block", "Inner"):
            if kind in self.globals:
                found |= {f"{kind}.{k}": getattr(self.globals[kind], k) for k in ("scale", "total")}
        return found

    def step(self, call: int) -> dict[str, Any]:
        """One training step, and what it leaves; ``raised`` if it does not come to its end."""
        self.root.zero_grad(set_to_none=True)
        args, kwargs = self.arguments(call)
        found: dict[str, Any] = {"raised": None, "during": None}
        during = "forward"
        seeded(call)
        try:
            out = self.root(*args, **kwargs)
            flat("out", out, found)
            during = "backward"
            loss = loss_of([out, self.globals["LOSSES"], kwargs.get("sink")])
            if loss is not None:
                loss.backward()
        except TimeoutError:
            raise
        except Exception as error:  # noqa: BLE001 (whatever the program raises is compared)
            found |= {"raised": error, "during": during}
            if during == "backward":
                return found
        found["torch's random state"] = torch.get_rng_state()
        found["Python's random state"] = hash(random.getstate())
        found["NumPy's random state"] = hash(np.random.get_state()[1].tobytes()), np.random.get_state()[2]
        flat("sink", kwargs.get("sink"), found)
        flat("state", self.state(), found)
        if found["raised"] is None:
            for name, p in self.root.named_parameters():
                flat(f"gradient of {name}", p.grad, found)
            for i, t in enumerate(leaves((args, kwargs))):
                flat(f"gradient of argument {i}", t.grad, found)
            with torch.no_grad():
                for p in self.root.parameters():
                    if p.grad is not None:
                        p -= 0.01 * p.grad.clamp(-1, 1)
        return found


@functools.lru_cache(maxsize=1)
def _compiled(text: str, name: str) -> CodeType:
    return compile(text, name, "exec", dont_inherit=True)


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def leaves(value: Any) -> list[Tensor]:
    """The tensors in arguments and results."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in leaves(v)]
    return [t for v in vars(value).values() for t in leaves(v)] if dataclasses.is_dataclass(value) else []


def loss_of(value: Any) -> Tensor | None:
    total = None
    for t in leaves(value):
        if t.requires_grad and t.is_floating_point():
            weights = torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) + 0.3 * t.detach().sin()
            total = (t * weights).sum() if total is None else total + (t * weights).sum()
    return total


def flat(name: str, value: Any, found: dict[str, Any]) -> None:
    """Put down the plain data in a value: tensors as copies, and of all else its type."""
    if type(value) in PLAIN:
        found[name] = value
        return
    if isinstance(value, Tensor):
        found[name] = value.detach().clone()
        kind = value.dtype, tuple(value.shape), tuple(value.stride()), value.requires_grad, type(value)
        found[f"{name}'s kind"] = kind
        return
    if type(value).__module__.startswith("revwire"):  # what a conversion puts there
        return
    found[f"{name}'s kind"] = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, dict):
        for k, v in value.items():
            if isinstance(k, (str, int)):
                flat(f"{name}[{k}]" if name != "state" else k, v, found)
    elif isinstance(value, (list, tuple)):
        found[f"len({name})"] = len(value)
        for i, v in enumerate(value):
            flat(f"{name}[{i}]", v, found)
    elif isinstance(value, set):
        found[name] = sorted(map(str, value))
    elif isinstance(value, torch.Generator):
        found[name] = value.get_state()
    elif isinstance(value, random.Random):
        found[name] = hash(value.getstate())
    elif isinstance(value, np.random.RandomState):
        found[name] = hash(value.get_state()[1].tobytes()), value.get_state()[2]
    elif isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value):
        flat(name, vars(value), found)


def differ(kind: str, want: dict[str, Any], got: dict[str, Any], precision: float) -> None:
    """Raise a fault if two steps left different things."""
    if want.get("raised") is not None or got.get("raised") is not None:
        _differ_in_errors(kind, want, got)
    for name in {**want, **got}:
        if name in ("raised", "during"):
            continue
        if name not in want or name not in got:
            raise FaultError(f"{kind}: {_what(name)} {'is gone' if name in want else 'is there'}", name)
        if not _same(want[name], got[name], precision):
            raise FaultError(
                f"{kind}: {_what(name)}", f"{name}: got {_short(got[name])}, expected {_short(want[name])}"
            )


def _differ_in_errors(kind: str, want: dict[str, Any], got: dict[str, Any]) -> None:
    right, wrong = want["raised"], got["raised"]
    if right is None:
        where = "".join(traceback.format_exception(wrong)[-12:])
        text = re.sub(r"\(chain \d+\)|[\w.]*blocks[\w.]*|line\.\d[\w.]*|0x\w+|[\d.]+(e-?\d+)?", "#", str(wrong))[:160]
        raise FaultError(f"{kind}: raises {type(wrong).__name__} in {got['during']}: {text}", where)
    if wrong is None and want["during"] == "forward":
        raise FaultError(f"{kind}: does not raise {type(right).__name__}", str(right))
    if wrong is not None and want["during"] == "forward" and type(right) is not type(wrong):
        what = f"raises another error: {type(wrong).__name__} for {type(right).__name__}"
        raise FaultError(f"{kind}: {what}", f"{wrong} for {right}")


def _what(name: str) -> str:
    """A name without numbers and modules."""
    if name.startswith("gradient"):
        return "gradient of an argument" if "argument" in name else "gradient of a parameter"
    if name.startswith("out"):
        return "output's kind" if name.endswith("kind") else "output"
    return re.sub(r"\[?\d+\]?", "", re.sub(r"^.*\.(?=\w+)", "", name))


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", str(value))[:160]


def _same(a: Any, b: Any, precision: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if precision and a.is_floating_point():
            return bool(torch.allclose(a, b, rtol=0, atol=_room(a, precision), equal_nan=True))
        return torch.equal(a, b) or bool(a.is_floating_point() and a.isnan().any() and torch.allclose(a, b, 0, 0, True))
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b or abs(a - b) <= precision * (1 + abs(a)) or (a != a and b != b)
    return bool(a == b)


def _room(a: Tensor, precision: float) -> float:
    return precision * (1 + float(a.abs().nan_to_num(0, 0, 0).max()) if a.numel() else 1)


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # the processor's time: a busy machine is no fault
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(program: Program) -> Outcome:
    """Run all checks of a program."""
    outcome = Outcome(program.seed)
    if program.seed in CRASHES:
        outcome.raised = f"crash: {CRASHES[program.seed]}"
        return outcome
    with warnings.catch_warnings(record=True) as told, _limited(SECONDS):
        warnings.simplefilter("always")
        try:
            _check(program, outcome)
        except FaultError as fault:
            outcome.fault = fault
        except TimeoutError as error:
            outcome.fault = FaultError("time", str(error))
    outcome.told = sorted({str(w.message) for w in told})
    return outcome


def check_seed(seed: int) -> Outcome:
    """The same, of a seed alone: for another process, where ``__main__`` is another module."""
    torch.set_num_threads(1)
    return check(Program.draw(seed))


def survived(seed: int) -> Outcome:
    """The same, in a process of its own, which PyTorch may end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        with open(write, "wb") as to:
            pickle.dump(check_seed(seed), to)
        os._exit(0)
    os.close(write)
    with open(read, "rb") as from_:
        text = from_.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(text) if text else Outcome(seed, fault=FaultError("crash", f"exit status {status}"))


def _check(program: Program, outcome: Outcome) -> None:
    original, wanted = Model(program), []
    for call in range(CALLS):
        wanted.append(original.step(call))
        if wanted[-1]["raised"] is not None:
            outcome.raised = f"{type(wanted[-1]['raised']).__name__} in {wanted[-1]['during']}: {wanted[-1]['raised']}"
            if wanted[-1]["during"] == "backward":
                break
        else:
            outcome.calls += 1
    if wanted[0]["raised"] is not None:
        return
    plain = _plain(program, outcome, wanted)
    _exact(program, [w for w in wanted if w["raised"] is None or w["during"] == "forward"])
    if all(w["raised"] is None for w in wanted) and "checkpoint(block" not in program.loop[1]:
        _reverted(plain, original)
    if plain.left is not None:
        raise plain.left


def _converted(program: Program, kind: str, **options: Any) -> Model:
    model = Model(program)
    try:
        model.convert(**options)
    except (FaultError, TimeoutError):
        raise
    except Exception as error:  # noqa: BLE001 (any error is a fault)
        _differ_in_errors(f"{kind}: convert", {"raised": None}, {"raised": error, "during": "convert"})
    return model


def _plain(program: Program, outcome: Outcome, wanted: list[dict[str, Any]]) -> Model:
    chunks = 2 if program.seed % IN_CHUNKS == 0 and program.may_be_cut else 1
    model = _converted(program, "plain", coupling=Plain(), exact=False, chunks=chunks)
    outcome.units = len(revwire.report(model.root).units)
    for call, want in enumerate(wanted):
        with revwire.stored_activations(model.root):
            got = model.step(call)
        if want["during"] == "backward":
            break
        if "checkpoint(block" in program.loop[1]:  # the original's own effects happen twice
            want, got = _without_effects(want), _without_effects(got)
        differ("plain", want, got, program.precision)
    return model


def _exact(program: Program, wanted: list[dict[str, Any]]) -> None:
    coupling = EXACT[program.seed % 2]
    rebuilt, stored = (_converted(program, "exact", coupling=coupling, exact=True) for _ in range(2))
    once = not program.repeats(stored.closed())
    for call in range(len(wanted)):
        got = rebuilt.step(call)
        with revwire.stored_activations(stored.root):
            want = stored.step(call)
        if want["raised"] is not None and wanted[call]["raised"] is None and got["raised"] is None:
            _differ_in_errors("stored", wanted[call], want)
        if want["during"] == "backward" or isinstance(want["raised"], revwire.RangeError):
            break
        if not once:  # docs/explanation/limits.md, "State outside of tensors"
            if isinstance(got["raised"], revwire.ReconstructionError):
                break
            want, got = _without_effects(want), _without_effects(got)
        differ("exact", want, got, 0)


def _without_effects(found: dict[str, Any]) -> dict[str, Any]:
    """Without what Python code inside of a branch may do twice."""
    kept = re.compile(r"raised|during|out|gradient|torch|.*_buffers")
    return {k: v for k, v in found.items() if kept.match(k)}


def _reverted(model: Model, original: Model) -> None:
    """Going back, with the state of the original."""
    revwire.revert(model.root)
    kept = [set(vars(m)) for m in original.root.modules()], [set(vars(m)) for m in model.root.modules()]
    for (name, _), before, after in zip(original.root.named_modules(), *kept, strict=True):
        if before != after:
            raise FaultError(f"revert leaves {sorted(before ^ after)}", name)
    with torch.no_grad():
        for m, o in zip(model.root.modules(), original.root.modules(), strict=True):
            for t, s in zip(leaves(vars(m)), leaves(vars(o)), strict=True):
                if t.shape == s.shape:
                    t.data.copy_(s.data)
    for values in (model.globals, original.globals):
        values["LOG"].clear()
        values["STATS"].clear()
        values["HOOKED"].clear()
    want, got = original.step(1), model.step(1)
    if want["during"] != "backward":
        differ("revert", _without_floats(want), _without_floats(got), 0)


def _without_floats(found: dict[str, Any]) -> dict[str, Any]:
    """Numbers that earlier calls left are not to the bit."""
    return {k: v for k, v in found.items() if not isinstance(v, float)}
