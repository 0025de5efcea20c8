"""`plan` with a budget, or chunks: the caller's model is never converted, and is left to the bit, also on errors."""

import copy
import threading

import pytest
import torch
from torch import nn

import revwire
from revwire._capture.twin import twin_of
from revwire._forwards.base import InstanceForward
from toys import encoder

INPUTS = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))


class Marked(nn.Module):
    """Batch statistics, a counter, a cache, a lock, and a bound method among its attributes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = encoder(3, 16, 2, 32, dropout=0.1), nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.lock, self.seen, self.calls = threading.Lock(), [], 0
        self.run = self.body.forward
        self.tied = self.head.weight

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        with self.lock:
            return self.head(self.norm(self.run(x).transpose(1, 2)).transpose(1, 2))


@pytest.fixture
def model():
    model = Marked().train()
    model(INPUTS).sum().backward()
    return model


def everything(model):
    """All that modules hold, and what parameters do."""
    held = [
        {k: copy.copy(v) if isinstance(v, (dict, list)) else v for k, v in vars(m).items()} for m in model.modules()
    ]
    tensors = [(n, t, t.detach().clone(), t._version) for n, t in (*model.named_parameters(), *model.named_buffers())]
    gradients = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    return held, tensors, gradients


def same(a, b):
    (held, tensors, gradients), (held_then, tensors_then, gradients_then) = a, b
    assert held == held_then
    for (n, t, value, version), (m, u, then, was) in zip(tensors, tensors_then, strict=True):
        assert (n, version) == (m, was)
        assert t is u
        assert torch.equal(value, then)
    for (g, value), (h, then) in zip(gradients, gradients_then, strict=True):
        assert g is h
        assert g is None or torch.equal(value, then)


OPTIONS = [
    {"memory_budget": "least"},
    {"memory_budget": "1GiB"},
    {"chunks": 2},
    {"memory_budget": "1GiB", "whole": "auto"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_callers_model_is_never_converted(model, options, monkeypatch):
    put_on, hosts = InstanceForward.__init__, []

    def noted(self, module, *rest, **more):
        hosts.append(module)
        put_on(self, module, *rest, **more)

    monkeypatch.setattr(InstanceForward, "__init__", noted)
    hooks = [p.register_hook(lambda g: pytest.fail("a gradient of the caller's")) for p in model.parameters()]
    before, drawn = everything(model), torch.get_rng_state()
    found = revwire.plan(model, INPUTS, **options)
    same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert hosts
    assert not {*map(id, hosts)} & {*map(id, model.modules())}
    for hook in hooks:
        hook.remove()
    assert revwire.report(revwire.convert(model, INPUTS, plan=found)) == found


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (RuntimeError, "revwire._budget.apply.fit"),
        (KeyboardInterrupt, "revwire._budget.apply.fit"),
        (RuntimeError, "revwire._budget.rewire.spend_less"),
        (RuntimeError, "revwire._api.plan._refuse_other"),
    ],
)
def test_not_on_errors_either(model, error, where, monkeypatch):
    def fails(*args, **options):
        raise error("in the midst")

    monkeypatch.setattr(where, fails)
    before = everything(model)
    with pytest.raises(error, match="in the midst"):
        revwire.plan(model, INPUTS, memory_budget="least")
    same(everything(model), before)


def test_a_budget_that_nothing_fits_leaves_the_model_as_it_was(model):
    before = everything(model)
    with pytest.raises(revwire.BudgetError, match="expected at least"):
        revwire.plan(model, INPUTS, memory_budget=10)
    same(everything(model), before)


def test_what_convert_would_do_is_what_is_planned():
    planned = revwire.plan(Marked().train(), INPUTS, memory_budget="1GiB")
    done = revwire.report(revwire.convert(Marked().train(), INPUTS, memory_budget="1GiB"))
    assert [u.mode for u in planned.units] == [u.mode for u in done.units] == ["stored"] * 6
    assert planned.forecast.planned.peak_bytes == done.forecast.planned.peak_bytes
    assert planned.chains == done.chains


def test_a_model_that_closures_hold_together_is_refused_not_planned_wrongly():
    model = nn.Sequential(encoder(3, 16, 2, 32), nn.Linear(16, 2)).train()
    body = model[0]
    forward = body.forward
    body.forward = lambda x: forward(x)
    with pytest.raises(
        revwire.ConversionError, match=r"a copy of its modules, which got .* for 0\.layers\.0.*revwire\.report"
    ):
        revwire.plan(model, INPUTS, memory_budget="least")
    assert revwire.report(revwire.convert(model, INPUTS, memory_budget="least")).forecast


def test_a_twin_shares_weights_and_nothing_else():
    model = Marked()
    twin = twin_of(model)
    assert type(twin) is Marked
    assert not {*map(id, model.modules())} & {*map(id, twin.modules())}
    assert twin.tied is twin.head.weight
    assert twin.run.__self__ is twin.body
    assert twin.lock is model.lock
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p is not q
        assert p.data_ptr() == q.data_ptr()
    for p, q in zip(model.buffers(), twin.buffers(), strict=True):
        assert p.data_ptr() != q.data_ptr()
    twin(INPUTS).sum().backward()
    assert (model.calls, twin.calls, model.seen, twin.seen) == (0, 1, [], [4])
    assert all(p.grad is None for p in model.parameters())
    assert int(model.norm.num_batches_tracked) == 0


def test_twins_of_parametrized_and_compiled_modules_run():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    compiled = nn.Linear(16, 16)
    compiled.compile(backend="eager")
    model = nn.Sequential(layer, torch.compile(nn.Linear(16, 16), backend="eager"), compiled, nn.GRU(16, 16))
    twin = twin_of(model)
    with torch.no_grad():
        for a, b in zip(twin(INPUTS), model(INPUTS), strict=True):
            assert torch.equal(a, b)
