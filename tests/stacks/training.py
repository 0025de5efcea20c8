"""A few training steps of a converted model, and of its twin that stores its activations: what every stack is measured
against.

In exact mode both must agree to the bit, in every loss and every weight; a test that cannot ask for that says why.
"""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import revwire

STEPS = 3


@dataclass
class Run:
    """What training leaves behind.

    Attributes:
        losses: of each step.
        state: parameters and buffers afterwards, whole (not sharded), by name.
        evaluations: how often a watched branch was evaluated: twice a step if it is recomputed, once if not.
    """

    losses: list[float] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    evaluations: int = 0

    def finish(self, model: nn.Module) -> Run:
        """Take the weights of ``model``."""
        self.state = {name: whole(t).clone() for name, t in model.state_dict().items() if isinstance(t, Tensor)}
        return self

    def assert_like(self, stored: Run, *, tolerance: float = 0.0, recomputes: bool = True) -> None:
        """As the run with stored activations, to the bit or within ``tolerance`` (absolute); and this one did
        recompute.
        """
        assert self.losses, "nothing was trained"
        assert self.state.keys() == stored.state.keys()
        torch.testing.assert_close(torch.tensor(self.losses), torch.tensor(stored.losses), rtol=0, atol=tolerance)
        for name, value in self.state.items():
            torch.testing.assert_close(
                value, stored.state[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
        if recomputes:
            assert self.evaluations > stored.evaluations > 0, (self.evaluations, stored.evaluations)

    def assert_learnt(self, model: nn.Module) -> None:
        """The weights did move."""
        assert any(not torch.equal(t, self.state[n]) for n, t in model.state_dict().items())


def whole(t: Tensor) -> Tensor:
    """The tensor itself, of which this may be a shard."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t.detach()


def batches(model: type[nn.Module], steps: int = STEPS, *, size: int = 4, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of each step."""
    generator = torch.Generator().manual_seed(seed)
    shape = model.example(size).shape  # type: ignore[operator]
    return [
        (torch.randn(shape, generator=generator), torch.randint(0, 5, (size,), generator=generator))
        for _ in range(steps)
    ]


def converted(make: Callable[[], nn.Module], *, seed: int = 0, **options: object) -> nn.Module:
    """A freshly made and converted model, in train mode; the same one each time."""
    torch.manual_seed(seed)
    model = make().train()
    revwire.convert(model, type(model).example(), **options, rewire="everywhere")  # type: ignore[operator]
    assert len(revwire.report(model).units) >= 4
    return model


@contextmanager
def watched(model: nn.Module, run: Run) -> Iterator[None]:
    """Count the evaluations of the second block's last layer: its branch is neither the first of its chain nor the
    last.
    """

    seen = UserList[int]()  # no recompute puts it back

    def count(*_: object) -> None:
        seen.append(1)

    block = model.blocks[1]  # type: ignore[index]
    handle = (block.mlp.down if hasattr(block, "mlp") else block.convolution).register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
        run.evaluations += len(seen)


def with_backward_hooks(model: nn.Module, seen: list[tuple[str, Tensor]], exchanging: bool) -> nn.Module:
    """Full backward hooks and pre-hooks on every block, which scale the gradients that they see, or only look at
    them.
    """

    def hook(module: nn.Module, *gradients: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...] | None:
        seen.extend((name, g.clone()) for gs in gradients for g in gs)
        return tuple(1.5 * g for g in gradients[0]) if exchanging else None

    for name, block in model.blocks.named_children():  # type: ignore[union-attr]
        block.register_full_backward_pre_hook(partial(hook, name=name))
        block.register_full_backward_hook(partial(hook, name=name))
    return model


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[], object] = lambda: None,
    seed: int = 0,
) -> Run:
    """Plain training of ``model``, called through ``call`` (a wrapper of it)."""
    call = model if call is None else call
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = Run()
    torch.manual_seed(seed)
    with watched(model, run):
        for x, labels in data:
            loss = nn.functional.cross_entropy(call(x).float(), labels)
            loss.backward()
            before_step()
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(float(loss.detach()))
    return run.finish(model)


def assert_trains_as_stored(
    make: Callable[[], nn.Module],
    run: Callable[[nn.Module], Run],
    *,
    chunks: int | None = None,
    checkpoint: str | None = None,
    **how: object,
) -> Run:
    """``run`` trains a converted model as it trains the same model with stored activations; returns the former."""
    model, twin = (converted(make, chunks=chunks, checkpoint=checkpoint) for _ in range(2))
    assert bool(revwire.report(model).checkpointed) == bool(checkpoint)
    reversible = run(model)
    with revwire.stored_activations(twin):
        reversible.assert_like(run(twin), **how)  # type: ignore[arg-type]
    reversible.assert_learnt(converted(make))
    return reversible
