"""What happens inside and around branches: offloading, checkpoints, hooks, and what a profiler shows."""

from __future__ import annotations

from collections import UserList
from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import Block, ConvolutionNet, Mlp, Transformer
from table import refused, works
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from training import Run, assert_trains_as_stored, batches, converted, train, with_backward_hooks

import revwire

SAVED, HOOKS = "Offloading and checkpointing", "Hooks and profiler"


class Offloaded(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with save_on_cpu():
            return super().forward(x)


class Checkpointed(Mlp):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=self.reentrant)


class Reentrant(Checkpointed):
    reentrant = True


def with_branches(kind: type[Mlp]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Transformer()
        for block in model.blocks:
            block.mlp.__class__ = kind  # the same weights
        return model

    make.example = Transformer.example  # type: ignore[attr-defined]
    return make


def assert_trains(
    make: Callable[[], nn.Module], call: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda m: m
) -> None:
    model, twin = converted(make), converted(make)
    reversible = train(model, batches(Transformer), call=call(model))
    with revwire.stored_activations(twin):
        reversible.assert_like(train(twin, batches(Transformer), call=call(twin)))
    plain = train(converted(Transformer), batches(Transformer))
    reversible.assert_like(plain, recomputes=False)


@works(SAVED, "`save_on_cpu` inside a branch")
def test_offloading_inside() -> None:
    assert_trains(with_branches(Offloaded))


@works(SAVED, "`save_on_cpu` around the model")
def test_offloading_around() -> None:
    def call(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with save_on_cpu():
                return model(x)

        return run

    assert_trains(Transformer, call)


@pytest.mark.parametrize("kind", [Checkpointed, Reentrant])
@works(SAVED, "`checkpoint` inside a branch, reentrant or not")
def test_a_checkpoint_inside(kind: type[Mlp]) -> None:
    assert_trains(with_branches(kind))


@works(SAVED, "what autograd is given of a chain: its ends, not its activations")
def test_what_is_saved(figure: Callable[[str], None]) -> None:
    def saved(depth: int, stored: bool) -> int:
        model = converted(lambda: Transformer(depth, dropout=0.0))
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.nbytes
            return t

        model(Transformer.example())
        with revwire.stored_activations(model) if stored else saved_tensors_hooks(pack, lambda t: t):
            if stored:
                with saved_tensors_hooks(pack, lambda t: t):
                    model(Transformer.example())
            else:
                model(Transformer.example())
        return total

    assert saved(12, stored=False) == saved(4, stored=False)
    assert saved(12, stored=True) > 2 * saved(4, stored=True)
    figure("as many bytes for 12 blocks as for 4")


class Counted:
    """Hooks on every submodule of the blocks, and how often each fires in a step."""

    def __init__(self, model: nn.Module, *, also_blocks: bool) -> None:
        self.forward: dict[str, int] = {}
        self.backward: dict[str, int] = {}
        for name, module in model.named_modules():
            if not name.startswith("blocks.") or (isinstance(module, Block) and not also_blocks):
                continue
            module.register_forward_hook(self.counter(self.forward, name))
            module.register_full_backward_hook(self.counter(self.backward, name))

    @staticmethod
    def counter(counts: dict[str, int], name: str) -> Callable[..., None]:
        def count(*_: object) -> None:
            counts[name] = counts.get(name, 0) + 1

        return count

    def step(self, model: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
        model(Transformer.example())  # a new kind of call is observed first, which runs hooks too
        self.forward.clear()
        self.backward.clear()
        model(Transformer.example()).sum().backward()
        return dict(self.forward), dict(self.backward)


@works(
    HOOKS,
    "forward hooks on submodules of branches",
    "what they count or collect happens once; what they print or write to a file, in the recompute too",
)
def test_forward_hooks_on_submodules() -> None:
    model, plain = converted(Transformer), Transformer()
    forward, _ = Counted(model, also_blocks=False).step(model)
    once, _ = Counted(plain, also_blocks=False).step(plain)
    assert forward == once
    assert set(once.values()) == {1}
    printed = UserList[int]()  # no recompute puts it back
    model.blocks[1].mlp.register_forward_hook(lambda *_: printed.append(1))
    train(model, batches(Transformer)[:1])
    assert len(printed) == 2


@works(HOOKS, "full backward hooks on submodules of branches fire once; gradients as in a plain step")
def test_backward_hooks_on_submodules() -> None:
    model = converted(Transformer)
    _, backward = Counted(model, also_blocks=False).step(model)
    assert set(backward.values()) == {1}
    assert len(backward) == 3 * len(list(Block().named_modules())[1:])

    def hooked(model: nn.Module) -> Run:
        seen: list[float] = []
        model.blocks[1].mlp.register_full_backward_hook(lambda m, inputs, outputs: seen.append(inputs[0].sum().item()))
        run = train(model, batches(Transformer))
        run.losses += seen
        return run

    assert_trains_as_stored(Transformer, hooked)


@works(HOOKS, "forward hooks on blocks, once; hooks on parameters and on tensors")
def test_hooks_on_blocks_and_tensors() -> None:
    model = converted(Transformer)
    seen: list[str] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: seen.append(f"forward {i}"))
        block.mlp.up.weight.register_hook(lambda g, i=i: seen.append(f"weight {i}"))
        block.mlp.up.weight.register_post_accumulate_grad_hook(lambda p, i=i: seen.append(f"gradient {i}"))
    out = model(Transformer.example())
    out.register_hook(lambda g: seen.append("output"))
    out.sum().backward()
    backward = [f"{what} {i}" for i in (2, 1, 0) for what in ("weight", "gradient")]
    assert seen == ["forward 0", "forward 1", "forward 2", "output", *backward]


BACKWARD_HOOKS = "the gradient of the state at each end; it has the dtype of what blocks hand on, as in the original"


@pytest.mark.parametrize("exchanging", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@works(
    HOOKS,
    "`register_full_backward_hook` and `_pre_hook` on a rewired block, once; what they return is used",
    BACKWARD_HOOKS,
)
def test_backward_hooks_on_blocks(when: str, exchanging: bool, dtype: torch.dtype) -> None:
    """Before and after conversion."""
    example = Transformer.example().to(dtype)
    data = [(x.to(dtype), labels) for x, labels in batches(Transformer)]

    def made() -> tuple[nn.Module, list[tuple[str, Tensor]]]:
        torch.manual_seed(0)
        model, seen = Transformer().train().to(dtype), []
        hooked = partial(with_backward_hooks, model, seen, exchanging)
        model = hooked() if when == "before" else model
        revwire.convert(model, example, rewire="everywhere")
        assert len(revwire.report(model).units) == 6
        return (model if when == "before" else hooked()), seen

    (model, seen), (twin, seen_by_twin) = made(), made()
    reversible = train(model, data)
    with revwire.stored_activations(twin):
        reversible.assert_like(train(twin, data))
    one_step = ["2", "2", "2", "1", "1", "1", "0", "0", "0"]  # of the pre-hook one gradient, of the hook two
    assert [name for name, _ in seen] == one_step * len(data) == [name for name, _ in seen_by_twin]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, seen_by_twin, strict=True))
    plain = train(revwire.convert(Transformer().train().to(dtype), example, rewire="everywhere"), data)
    assert plain.losses != reversible.losses or not exchanging


@refused(HOOKS, "`register_backward_hook` (the old kind) on a rewired block", "use `register_full_backward_hook`")
def test_old_backward_hooks_on_blocks() -> None:
    model = converted(Transformer)
    model.blocks[1].register_backward_hook(lambda *_: None)
    with pytest.raises(
        revwire.CaptureError, match=r"blocks\.1: got a hook .*use register_full_backward_hook, or exclude"
    ):
        model(Transformer.example())


@works(HOOKS, "`torch.profiler` shows the units' modules, the steps and the recompute")
def test_profiler(figure: Callable[[str], None]) -> None:
    model = converted(ConvolutionNet)
    x = ConvolutionNet.example()
    model(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_stack=False) as profile:
        model(x).sum().backward()
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["_Step"] == 4
    assert names["_StepBackward"] == 4
    assert names["aten::conv2d"] == 1 + 4 + 3  # the stem, four branches, and all but the last again
    figure("`_Step` and `_StepBackward`, one for each unit")
