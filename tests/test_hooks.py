"""Hooks fire, once; where they could not, the call is refused."""

import pytest
import torch
from torch import nn

import revwire
from graph_toys import X, assert_same_step, pre_norm, stack, twin


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
        model, reference = twin(model)
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


def test_hooks_on_a_module_that_must_be_opened_are_refused():
    model, reference = twin(with_inner())
    assert len(revwire.report(model).units) == 3
    assert_same_step(model, reference, X)
    model.blocks[0].inner.register_forward_hook(doubling)
    with pytest.raises(revwire.CaptureError, match=r"blocks\.0: .* must open a Inner on which hooks are registered"):
        model(X)


def test_hooks_on_such_a_module_before_conversion_run_inside_of_one_whole_unit():
    model = with_inner()
    for b in model.blocks:
        b.inner.register_forward_hook(doubling)
    model, reference = twin(model)
    assert [u.pattern for u in revwire.report(model).units] == ["block"] * 3
    assert_same_step(model, reference, X)


def test_backward_hooks_on_a_host_are_refused():
    model = revwire.convert(stack(pre_norm), X)
    model.blocks[1].register_full_backward_hook(lambda *_: None)
    with pytest.raises(revwire.CaptureError, match=r"blocks\.1: got a module with backward hooks; .* hook its submodules"):
        model(X)
    with torch.no_grad():
        model(X)


def test_backward_hooks_on_leaves_and_tensors_fire():
    model, fired = revwire.convert(stack(pre_norm), X), []
    model.blocks[1].f.register_full_backward_hook(lambda *_: fired.append("module"))
    model.blocks[1].f.weight.register_hook(lambda g: fired.append("weight"))
    out = model(X.clone().requires_grad_())[0]
    out.register_hook(lambda g: fired.append("output"))
    out.sum().backward()
    assert sorted(fired) == ["module", "output", "weight"]
