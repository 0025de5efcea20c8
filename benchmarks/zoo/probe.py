"""One model of the sweep, measured in the process that calls this: a row of plain data, filled stage by stage.

A stage that fails leaves its reason in ``row["failures"]``, and the figures that it would have made stay null.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import revwire
from benchmarks.harness.record import Row
from benchmarks.zoo.case import Built, Case
from benchmarks.zoo.count import count
from revwire.measure import peak_bytes, saved_bytes

COUPLINGS = ("bdia", "re2tal")
METHODS = ("stored", "revwire", "checkpoint")


def measure(case: Case, publish: Callable[[Row], None]) -> None:
    """Measure one case. ``publish`` gets the row after every stage, so that a process that is ended leaves what it
    had.
    """
    row = empty(case)
    probe: _Probe | None = None
    stages: dict[str, Callable[[], None]] = {"build": lambda: None}
    publish(row)
    with _stage(row, "build"):
        probe = _Probe(case.build(), row)
        stages = probe.stages()
    for name, run in stages.items() if probe else ():
        row["stage"] = name
        publish(row)
        with _stage(row, name):
            run()
        if name == "convert bdia" and name in row["failures"]:
            break
    row["stage"] = None
    publish(row)


def empty(case: Case) -> Row:
    """The row of a case of which nothing is known yet."""
    figures = (
        "adds",
        "adds_in_chains",
        "adds_nested",
        "units",
        "inside",
        "closed",
        "chains",
        "patterns",
        "skipped",
        "missing",
        "convert_seconds",
    )
    checks = ("reconstruction_error", "gradient_error", "bit_exact", "gradients_equal", "unstable")
    row: Row = {"zoo": case.zoo, "model": case.name, "class": None, "stage": "build", "failures": {}}
    row |= dict.fromkeys(figures) | {f"{check}_{coupling}": None for coupling in COUPLINGS for check in checks}
    row |= dict.fromkeys(("revert_equal", "output_kept", "keys_kept", "eval_forward"))
    return row | {f"{method}_{kind}_bytes": None for method in METHODS for kind in ("saved", "peak")}


@contextmanager
def _stage(row: Row, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a foreign model may raise anything, and the row is there to say what
        text = " ".join(str(error).split())
        row["failures"][name] = f"{type(error).__name__}: {text[:400]}"


class _Probe:
    """The stages, in order, on one model; each leaves the model as the next one expects it."""

    def __init__(self, built: Built, row: Row) -> None:
        self.model = built.model.train()
        self.example = built.example
        self.row = row
        row["class"] = type(self.model).__name__

    def stages(self) -> dict[str, Callable[[], None]]:
        """Name → what it does."""
        verified = {f"verify {coupling}": partial(self.verify, coupling) for coupling in COUPLINGS}
        return {
            "original": self.original,
            "count": self.count,
            "convert bdia": partial(self.convert, "bdia"),
            "plan": self.plan,
            "verify bdia": verified["verify bdia"],
            "eval": self.evaluate,
            "revert": self.revert,
            "convert re2tal": partial(self.convert, "re2tal"),
            "verify re2tal": verified["verify re2tal"],
            "bytes": self.bytes,
        }

    def original(self) -> None:
        """What the model computes as it comes, in both modes."""
        self.keys = list(self.model.state_dict())
        self.trained = _outline(self._run())
        self.model.eval()
        self.evaluated = self._run()
        self.model.train()

    def convert(self, coupling: str) -> None:
        self._reverted()
        start = perf_counter()
        revwire.convert(self.model, self._fresh(), coupling=coupling, rewire="everywhere")
        if coupling == "bdia":
            self.row["convert_seconds"] = perf_counter() - start

    def plan(self) -> None:
        plan = revwire.report(self.model)
        self.row["units"] = len(plan.units)
        parts = [s.path for s in plan.skipped if s.in_closed_block]
        wholes = sum(any(f"{path}.".startswith(f"{u.path}.") for path in parts) for u in plan.units)
        self.row["missing"] = max(0, self.row["missing"] - len(plan.units) - max(0, len(parts) - wholes))
        self.row["chains"] = len(plan.chains)
        self.row["patterns"] = dict(Counter(u.pattern for u in plan.units))
        self.row["inside"] = sum(s.inside_unit for s in plan.skipped)
        self.row["closed"] = len(parts)
        reasons = Counter((s.reason, s.path, s.line) for s in plan.skipped if not s.inside_unit)
        self.row["skipped"] = [
            {"path": path, "reason": reason, "line": line, "times": n} for (reason, path, line), n in reasons.items()
        ]

    def verify(self, coupling: str) -> None:
        check = revwire.verify(self.model, self._fresh())
        self.row[f"bit_exact_{coupling}"] = check.bit_exact
        self.row[f"reconstruction_error_{coupling}"] = check.reconstruction_error
        self.row[f"gradient_error_{coupling}"] = check.gradient_error
        self.row[f"gradients_equal_{coupling}"] = not check.inexact
        self.row[f"unstable_{coupling}"] = list(check.unstable)

    def evaluate(self) -> None:
        """The converted model in both modes: it runs, and its output and keys are of the form that they were."""
        self.row["keys_kept"] = list(self.model.state_dict()) == self.keys
        kept = self._buffers()
        trained = _outline(self._run())
        self._restore(kept)
        self.model.eval()
        try:
            evaluated = _outline(self._run())
            self.row["eval_forward"] = True
        finally:
            self.model.train()
        self.row["output_kept"] = trained == self.trained and evaluated == _outline(self.evaluated)

    def revert(self) -> None:
        revwire.revert(self.model)
        self.model.eval()
        again = self._run()
        self.model.train()
        self.row["revert_equal"] = _equal(again, self.evaluated)

    def count(self) -> None:
        args, kwargs = as_call(self._fresh())
        kept = self._buffers()
        with torch.random.fork_rng():
            found = count(self.model, *args, **kwargs)
        self._restore(kept)
        self.row["adds"], self.row["adds_in_chains"], self.row["adds_nested"] = (
            found.found,
            found.in_chains,
            found.nested,
        )
        self.row["missing"] = found.in_chains - found.nested

    def bytes(self) -> None:
        """Saved bytes of a forward pass, and peak bytes of a step."""
        self._reverted()
        with _without_cache(self.model):
            self._measure("stored")
            revwire.convert(self.model, self._fresh(), rewire="everywhere")
            hosts = revwire.report(self.model).hosts
            if hosts:
                self._measure("revwire")
                revwire.revert(self.model)
                with _stage(self.row, "bytes with checkpointing"), _checkpointed(self.model, hosts):
                    self._measure("checkpoint")

    def _measure(self, method: str) -> None:
        def forward() -> Tensor:
            return _loss(_apply(self.model, self._fresh()))

        for p in self.model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        self.row[f"{method}_peak_bytes"] = peak_bytes(lambda: forward().backward())  # type: ignore[no-untyped-call]
        self.row[f"{method}_saved_bytes"] = saved_bytes(forward)
        for p in self.model.parameters():
            p.grad = None

    def _run(self) -> Any:
        """The output for the example, from a fixed seed, without gradients; buffers as before."""
        kept = self._buffers()
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            out = _apply(self.model, self._fresh())
        self._restore(kept)
        return out

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        return [(b, b.detach().clone()) for b in self.model.buffers()]

    def _restore(self, kept: list[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for b, value in kept:
                b.copy_(value)

    def _fresh(self) -> Any:
        return fresh(self.example)

    def _reverted(self) -> None:
        try:
            revwire.report(self.model)
        except revwire.ConversionError:
            return
        revwire.revert(self.model)


def fresh(example: Any) -> Any:
    """An example in containers and tensors of its own: some models write to what they are given."""
    return tree_map(_copied, example)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def as_call(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An example as positional and keyword arguments."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def _apply(model: nn.Module, example: Any) -> Any:
    args, kwargs = as_call(example)
    return model(*args, **kwargs)


def _outline(out: Any) -> Any:
    """Classes, keys, and the shapes and dtypes of tensors."""
    leaves, structure = tree_flatten(out)
    return type(out), structure, [(t.shape, t.dtype) if isinstance(t, Tensor) else type(t) for t in leaves]


def _equal(a: Any, b: Any) -> bool:
    if _outline(a) != _outline(b):
        return False
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _loss(out: Any) -> Tensor:
    leaves = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad]
    return torch.stack([t.float().square().mean() for t in leaves]).mean()


@contextmanager
def _checkpointed(model: nn.Module, hosts: tuple[str, ...]) -> Iterator[None]:
    """Each innermost host checkpointed."""
    innermost = [p for p in hosts if not any(other != p and other.startswith(f"{p}." if p else "") for other in hosts)]
    kept = [(host, vars(host).get("forward")) for host in map(model.get_submodule, innermost)]
    for host, _ in kept:
        host.forward = partial(checkpoint, host.forward, use_reentrant=False)
    try:
        yield
    finally:
        for host, own in kept:
            del host.forward
            if own is not None:
                host.forward = own


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache, which a training step does not need, and which a recompute under checkpointing would fill
    twice.
    """
    configs = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}
    kept = [(c, c.use_cache) for c in configs.values()]
    for config, _ in kept:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in kept:
            config.use_cache = value
