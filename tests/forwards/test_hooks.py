"""Hooks fire, once, and backward hooks see the gradients of stored activations; what could not do so is refused."""

import warnings
from contextlib import nullcontext
from contextvars import ContextVar
from functools import partial

import pytest
import torch
from torch import nn

import revwire
from steps import assert_same_step, twin, twin_that_stays
from toys import X, block, pre_norm, stack


def doubling(module, args, out):
    return out * 2


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["model", "host", "leaf"])
def test_forward_hooks_fire(where, when):
    def hook(m):
        for b in m.blocks:
            (b.f if where == "leaf" else b if where == "host" else m).register_forward_hook(
                doubling if where != "model" else lambda *_: None
            )

    model = stack(pre_norm)
    if when == "before":
        hook(model)
        model, reference = (twin_that_stays if where == "host" else twin)(model)
    else:
        model, reference = twin(model)
        for m in (model, reference):
            hook(m)
    assert_same_step(model, reference, X)


def test_hooks_that_look_see_the_tensors():
    model, seen = revwire.convert(stack(pre_norm).eval(), X), []
    for b in model.blocks:
        b.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    out = model(X)[0]
    assert len(seen) == 3
    assert seen[0][1] is seen[1][0]
    assert torch.equal(seen[2][1], out)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, pair):
        return pair[0] + self.f(pair[1])


def with_inner():
    return stack(lambda self, x: self.inner((x, self.g(x))), lambda self: setattr(self, "inner", Inner()))


@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
def test_hooks_on_a_module_that_is_opened_run():
    model, reference = twin(with_inner())
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    for m in (model, reference):
        m.blocks[0].inner.register_forward_hook(doubling)
    assert_same_step(model, reference, X)


def test_hooks_on_such_a_module_before_conversion_run_inside_of_one_whole_unit():
    model = with_inner()
    for b in model.blocks:
        b.inner.register_forward_hook(doubling)
    model, reference = twin(model)
    assert [u.pattern for u in revwire.report(model).units] == ["block"] * 3
    assert_same_step(model, reference, X)


@pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing"
)  # it takes a tuple, in which PyTorch does not look for gradients
def test_backward_hooks_on_a_module_that_must_be_opened():
    """They run; before conversion, the block is one whole unit, and they run inside."""
    model, fired = revwire.convert(with_inner(), X), []
    model.blocks[0].inner.register_full_backward_hook(lambda m, into, out: fired.append(out[0]))
    model(X.clone().requires_grad_())[0].sum().backward()
    assert len(fired) == 1
    model, fired = with_inner(), []
    for b in model.blocks:
        b.inner.register_full_backward_hook(lambda m, into, out: fired.append(out[0]))
    revwire.convert(model, X)
    assert [u.pattern for u in revwire.report(model).units] == ["block"] * 3
    model(X.clone().requires_grad_())[0].sum().backward()
    assert len(fired) == 3


# -- backward hooks on rewired modules ---------------------------------------------------------------------------------


class Hooks:
    """Full backward hooks and pre-hooks on modules: the gradients that they see, and by what factor they exchange
    them.
    """

    def __init__(self, modules, factors=(None, None)):
        self.seen = []
        for name, module in modules:
            module.register_full_backward_pre_hook(lambda m, out, name=name: self.see(factors[0], name, out))
            module.register_full_backward_hook(lambda m, into, out, name=name: self.see(factors[1], name, into, out))

    def see(self, factor, name, *gradients):
        self.seen.append((name, *(g.clone() for gs in gradients for g in gs if g is not None)))
        return None if factor is None else tuple(g if g is None else g * factor for g in gradients[0])

    def assert_saw_the_same(self, other):
        assert [name for name, *_ in self.seen] == [name for name, *_ in other.seen]
        for mine, others in zip(self.seen, other.seen, strict=True):
            assert_equal(mine[1:], others[1:])


def blocks_of(model):
    return [(i, b) for i, b in enumerate(model.blocks)]


def hooked(make, *, stored=False, select=blocks_of, factors=(None, None), when="after", x=X, fresh=True, **options):
    """(a training step of a converted model with hooks on it: (output, gradients), the hooks)."""
    model = make()
    hooks = Hooks(select(model), factors) if when == "before" else None
    revwire.convert(model, x, **options)
    units = len(revwire.report(model).units)
    assert units >= 3
    hooks = hooks or Hooks(select(model), factors)
    with warnings.catch_warnings(), revwire.stored_activations(model) if stored else nullcontext():
        warnings.simplefilter("error")  # that a chain begins anew, say
        model(x)
        hooks.seen.clear()
        x = x.clone().requires_grad_()
        torch.manual_seed(0)
        out = model(x)[0]
        gradients = torch.autograd.grad(out.float().square().sum(), [x, *model.parameters()], allow_unused=True)
    return (out.detach(), *gradients), hooks


def assert_equal(got, want):
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


each_coupling = pytest.mark.parametrize("coupling", ["re2tal", "bdia:1/8", "momentum:1/2"])
FACTORS = [(None, None), (0.5, None), (None, 1.5), (0.5, 1.5)]
with_dropout = partial(stack, lambda self, x: x + self.drop(self.f(torch.relu(x))))


@each_coupling
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_backward_hooks_on_hosts_act_as_with_stored_activations(coupling, factors, when):
    options = {"coupling": coupling, "exact": True, "factors": factors, "when": when}
    got, hooks = hooked(with_dropout, **options)
    want, stored = hooked(with_dropout, stored=True, **options)
    assert_equal(got, want)
    hooks.assert_saw_the_same(stored)
    assert [name for name, *_ in hooks.seen] == [2, 2, 1, 1, 0, 0]
    plain, _ = hooked(with_dropout, select=lambda model: [], coupling=coupling, exact=True)
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[1], plain[1]) == (factors == (None, None))


@each_coupling
def test_what_they_see_is_the_whole_gradient_of_each_state(coupling):
    """The oracle: hooks on the tensors between blocks, in a run with stored activations in which no module has backward
    hooks.
    """
    _, hooks = hooked(with_dropout, coupling=coupling, exact=True)
    model, tensors = revwire.convert(with_dropout(), X, coupling=coupling, exact=True), []
    x = X.clone().requires_grad_()
    for b in model.blocks:
        b.register_forward_hook(lambda m, args, out: tensors.append(out))
    with revwire.stored_activations(model):
        model(x)
        tensors.clear()
        torch.manual_seed(0)
        out = model(x)[0]
        wanted = [x, *tensors]
        gradients = torch.autograd.grad(out.float().square().sum(), wanted)
    seen = {name: values for name, *values in hooks.seen if len(values) == 2}
    for i, (into, out_of) in seen.items():
        assert torch.equal(into, gradients[i])
        assert torch.equal(out_of, gradients[i + 1])


@each_coupling
@pytest.mark.parametrize("factors", FACTORS)
def test_they_see_the_whole_gradient_in_half_precision_too(coupling, factors):
    """There the streams are wider than the tensors between blocks."""

    def make(dtype):
        return lambda: with_dropout().to(dtype)

    options = {"coupling": coupling, "exact": True, "factors": factors}
    got, hooks = hooked(make(torch.bfloat16), x=X.bfloat16(), **options)
    want, stored = hooked(make(torch.bfloat16), x=X.bfloat16(), stored=True, **options)
    assert_equal(got, want)
    hooks.assert_saw_the_same(stored)
    _, wide = hooked(lambda: with_dropout().bfloat16().float(), x=X.bfloat16().float(), **options)
    for (name, *narrow), (_, *exact) in zip(hooks.seen, wide.seen, strict=True):
        for a, b in zip(narrow, exact, strict=True):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a.float(), b, rtol=0.05, atol=0.05 * float(b.abs().max()), msg=f"block {name}")


def windowed(self, x):
    """The stream is cut in windows on the way out of a block: what the next one is given is a view."""
    return (x + self.drop(self.f(torch.relu(x)))).transpose(0, 1)


def masked(self, x, bias):
    return x + self.drop(self.f(torch.relu(x))) * bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_behind_views(dtype):
    make = partial(stack, windowed, depth=4)
    runs = [
        hooked(lambda: make().to(dtype), x=X.to(dtype), stored=stored, factors=(0.5, 1.5)) for stored in (False, True)
    ]
    assert_equal(runs[0][0], runs[1][0])
    runs[0][1].assert_saw_the_same(runs[1][1])
    assert [name for name, *_ in runs[0][1].seen] == [3, 3, 2, 2, 1, 1, 0, 0]


class Biased(nn.Module):
    """Blocks with a learnt bias each, behind a frozen stem: the stream needs no gradient, the other argument does."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(block(masked)() for _ in range(3)).requires_grad_(False)
        self.biases = nn.Parameter(torch.rand(3, 8))

    def forward(self, x):
        for b, bias in zip(self.blocks, self.biases, strict=True):
            x = b(x, bias)
        return (x,)


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_where_the_stream_needs_no_gradient(frozen):
    def step(stored):
        torch.manual_seed(0)
        model = Biased()
        for b in model.blocks[frozen:]:
            b.requires_grad_(True)
        model.biases.requires_grad_(True)
        revwire.convert(model, x := X.float())
        hooks = Hooks(blocks_of(model), (0.5, None))
        with warnings.catch_warnings(), revwire.stored_activations(model) if stored else nullcontext():
            warnings.simplefilter("error")
            torch.manual_seed(0)
            model(x)[0].square().sum().backward()
        return [p.grad for p in model.parameters()], hooks

    (got, hooks), (want, stored) = step(False), step(True)
    assert_equal(got, want)
    hooks.assert_saw_the_same(stored)


def test_on_containers_between_blocks():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Sequential(*with_dropout(depth=2).blocks) for _ in range(2)))

    def step(stored):
        model = revwire.convert(make(), X)
        hooks = Hooks([(str(i), m) for i, m in enumerate(model)] + [("model", model)], (0.5, 1.5))
        with warnings.catch_warnings(), revwire.stored_activations(model) if stored else nullcontext():
            warnings.simplefilter("error")
            x = X.clone().requires_grad_()
            torch.manual_seed(0)
            model(x).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())], hooks

    (got, hooks), (want, stored) = step(False), step(True)
    assert_equal(got, want)
    hooks.assert_saw_the_same(stored)
    assert [name for name, *_ in hooks.seen] == ["model", "1", "1", "0", "0", "model"]


def test_with_retained_graphs_and_several_forwards():
    def steps(stored):
        model = revwire.convert(with_dropout(), X)
        hooks = Hooks(blocks_of(model), (0.5, 1.5))
        with revwire.stored_activations(model) if stored else nullcontext():
            torch.manual_seed(0)
            first, second = (model(X.clone().requires_grad_())[0] for _ in range(2))
            first.square().sum().backward(retain_graph=True)
            second.sum().backward()
            first.sum().backward()
        return [p.grad for p in model.parameters()], hooks

    (got, hooks), (want, stored) = steps(False), steps(True)
    assert_equal(got, want)
    hooks.assert_saw_the_same(stored)
    assert len(hooks.seen) == 3 * 2 * 3


def test_an_identity_of_somebody_else_still_begins_a_new_chain():
    """It may do anything to a gradient, which would reach one stream only."""

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    model = revwire.convert(with_dropout(), X)
    model.blocks[1].register_full_backward_hook(lambda *_: None)
    model.blocks[1].register_forward_pre_hook(lambda m, args: Reversed.apply(args[0]))
    with pytest.warns(
        UserWarning, match=r"blocks\.1\.f \(chain 0, \S+\): got a tensor that something between .* \(ReversedBackward\)"
    ):
        model(X.clone().requires_grad_())


@pytest.mark.parametrize("everywhere", [False, True])
def test_old_backward_hooks_on_a_host_are_refused(everywhere, monkeypatch):
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)
    model = revwire.convert(stack(pre_norm), X)
    register = nn.modules.module.register_module_backward_hook if everywhere else model.blocks[1].register_backward_hook
    handle = register(lambda *_: None)
    try:
        with pytest.raises(
            revwire.CaptureError,
            match=r"blocks\.\d: got a hook of register_backward_hook, .*register_full_backward_hook",
        ):
            model(X)
        with torch.no_grad():
            model(X)
    finally:
        handle.remove()


def test_full_backward_hooks_on_all_modules_there_are(monkeypatch):
    monkeypatch.setattr(nn.modules.module, "_global_is_full_backward_hook", None)  # PyTorch remembers the kind for good

    def step(stored):
        seen, model = [], revwire.convert(with_dropout(), X)
        handle = nn.modules.module.register_module_full_backward_hook(
            lambda m, into, out: seen.append((type(m), into[0], out[0]))
        )
        try:
            with revwire.stored_activations(model) if stored else nullcontext():
                model(X)
                torch.manual_seed(0)
                model(X.clone().requires_grad_())[0].square().sum().backward()
        finally:
            handle.remove()
        return [p.grad for p in model.parameters()], seen

    (got, seen), (want, stored) = step(False), step(True)
    assert_equal(got, want)
    assert [kind.__name__ for kind, *_ in seen] == [kind.__name__ for kind, *_ in stored]
    assert {kind.__name__ for kind, *_ in seen} >= {"Block", "Linear", "Dropout"}
    for mine, others in zip(seen, stored, strict=True):
        assert_equal(mine[1:], others[1:])


def test_backward_hooks_on_leaves_and_tensors_fire():
    model, fired = revwire.convert(stack(pre_norm), X), []
    model.blocks[1].f.register_full_backward_hook(lambda *_: fired.append("module"))
    model.blocks[1].f.weight.register_hook(lambda g: fired.append("weight"))
    out = model(X.clone().requires_grad_())[0]
    out.register_hook(lambda g: fired.append("output"))
    out.sum().backward()
    assert sorted(fired) == ["module", "output", "weight"]


COLLECTED = ContextVar("COLLECTED", default=None)


def collect(module, args, out):
    found = COLLECTED.get()
    if found is not None:
        found.setdefault("outputs", []).append(out)


def test_what_hooks_collect_in_a_context_is_what_the_call_gave():
    """As newer Hugging Face models return attentions and hidden states: a capture must leave nothing there."""
    model = stack(pre_norm)
    for b in model.blocks:
        b.f.register_forward_hook(collect)
    token = COLLECTED.set({"outputs": []})
    try:
        revwire.convert(model, X)
        assert not COLLECTED.get()["outputs"]
        model(X)  # is captured
        found = COLLECTED.get()["outputs"]
        assert len(found) == len(model.blocks)
        torch.autograd.grad(found[0].sum(), list(model.blocks[0].f.parameters()))
    finally:
        COLLECTED.reset(token)
