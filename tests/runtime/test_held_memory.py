"""What is held between forward and backward, and for how long: no activation, no cycle."""

import gc
import weakref

import pytest
import torch

import revwire
from cases import EXACT, FAST, each_fast_case
from revwire import ReconstructionError
from revwire._runtime import run as runner
from revwire.measure import peak_bytes, saved_bytes
from revwire.testing import saved_by_autograd
from steps import tape_of
from toys import WIDTH, Attention, Dropped, PreNorm, attention_extras, encoder, stored, toy

SHAPE = (16, 64, WIDTH)
STREAM = 16 * 64 * WIDTH * 4
SMALL = 4096  # bytes that a unit may keep: its fingerprint, and 5 kB less than a random state


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def forward(model, **options):
    x = torch.randn(SHAPE, requires_grad=True)
    return lambda: model(x, **options)


@each_fast_case
def test_what_is_held_grows_with_depth_by_the_kept_bits_only(case):
    shallow, deep = (saved_bytes(forward(toy(case, depth=depth))) for depth in (4, 12))
    per_unit = (deep - shallow) / 8
    bits = case.coupling.kept_bits if case.exact else 0
    assert per_unit <= STREAM / 32 * bits + SMALL
    assert deep <= 4 * STREAM + 12 * per_unit


@pytest.mark.parametrize("case", [c for c in EXACT if c.dtype == torch.float32], ids=str)
def test_kept_bits_are_as_many_as_declared(case):
    shallow, deep = (saved_bytes(forward(toy(case, depth=depth))) for depth in (4, 12))
    expected = STREAM // 32 * case.coupling.kept_bits
    assert expected <= (deep - shallow) / 8 <= expected + SMALL


@each_fast_case
def test_the_peak_of_a_step_grows_with_depth_by_the_kept_bits_only(case):
    def step(depth):
        model, x = toy(case, depth=depth), torch.randn(SHAPE, requires_grad=True)
        return lambda: model(x).square().sum().backward()

    shallow, deep = peak_bytes(step(4)), peak_bytes(step(12))
    bits = case.coupling.kept_bits if case.exact else 0
    assert (deep - shallow) / 8 <= STREAM / 32 * bits + SMALL


def test_the_peak_of_a_step_with_bits_is_that_without_and_the_bits():
    """A gradient of a state that waits is made of that of the branch when the branch is done; see `functions`."""

    def step(name, depth=12):
        case = next(c for c in EXACT if c.coupling.name == name and c.dtype == torch.float32)
        model, x = toy(case, PreNorm, depth=depth), torch.randn(SHAPE, requires_grad=True)
        return lambda: model(x).square().sum().backward()

    plain = peak_bytes(step("re2tal"))
    for name, bits in (("bdia:1/2", 1), ("bdia:1/16", 4), ("dr2net:7/8,1/8", 3)):
        units = 11  # the first begins with two equal states
        assert peak_bytes(step(name)) - plain <= units * STREAM / 32 * bits + SMALL


@each_fast_case
def test_the_peak_of_a_retained_backward_does_not_hold_every_branch(case):
    def step(depth):
        model, x = toy(case, depth=depth), torch.randn(SHAPE, requires_grad=True)
        return lambda: model(x).square().sum().backward(retain_graph=True)

    shallow, deep = peak_bytes(step(4)), peak_bytes(step(12))
    bits = case.coupling.kept_bits if case.exact else 0
    assert (deep - shallow) / 8 <= STREAM / 32 * bits + SMALL


@each_fast_case
def test_autograd_is_given_no_activation(case):
    model = toy(case)
    x = torch.randn(SHAPE, requires_grad=True)
    assert saved_by_autograd(lambda: model(x)) <= 8  # the constant 2 of the mean of both streams
    with stored(model):
        assert saved_by_autograd(lambda: model(x)) > 10 * STREAM


@each_fast_case
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(case, mode):
    model = toy(case)
    x = torch.randn(SHAPE)
    with mode():
        assert saved_bytes(lambda: model(x)) <= STREAM + SMALL


def weak_parts(model, x, *extras):
    """The chain's output, and weak references to its tape and to all that the tape owns."""
    out = model(x, *extras)
    tape = tape_of(out[0] if isinstance(out, tuple) else out)
    return out, [weakref.ref(tape), *map(weakref.ref, tape.state)]


@each_fast_case
@pytest.mark.parametrize("backward", ["none", "one", "two"])
@pytest.mark.parametrize("branch", [Dropped, Attention], ids=["dropped", "attention"])
def test_all_of_it_dies_with_the_output(case, backward, branch, without_collector):
    """Without the garbage collector: there is no reference cycle."""
    model = toy(case, branch)
    extras = attention_extras() if branch is Attention else ()
    out, parts = weak_parts(model, torch.randn(PreNorm.shape, requires_grad=True), *extras)
    loss = (out[0] if isinstance(out, tuple) else out).sum()
    if backward in ("one", "two"):
        loss.backward(retain_graph=backward == "two")
    if backward == "two":
        loss.backward()
    del out, loss
    assert [p() for p in parts] == [None] * 3


@each_fast_case
def test_all_of_it_dies_after_a_failed_backward(case):
    model = toy(case)
    out, parts = weak_parts(model, torch.randn(PreNorm.shape, requires_grad=True))
    with torch.no_grad():
        model.branches[4].up.bias.add_(1)
    with pytest.raises(ReconstructionError, match=r"weight 'up\.bias' was modified in place"):
        out.sum().backward()
    del out
    gc.collect()  # a traceback is a cycle
    assert [p() for p in parts] == [None] * 3


@each_fast_case
def test_all_of_it_dies_after_a_failed_forward(case):
    model = toy(case)
    x = torch.randn(PreNorm.shape, requires_grad=True)
    h, _ = runner.apply(model.chain, model.units[0], model.branches[0], x)
    tape = weakref.ref(h._revwire_link.tape)
    handle = model.branches[1].down.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.apply(model.chain, model.units[1], model.branches[1], h)
    handle.remove()
    assert torch.equal(
        runner.apply(model.chain, model.units[1], model.branches[1], h)[0], run_two(model, x)
    )  # it can go on
    del h
    gc.collect()
    assert tape() is None


def run_two(model, x):
    for unit, branch in zip(model.units[:2], model.branches[:2], strict=True):
        x, _ = runner.apply(model.chain, unit, branch, x)
    return x


@each_fast_case
def test_the_states_go_when_the_backward_is_over(case, without_collector):
    model = toy(case)
    out, parts = weak_parts(model, torch.randn(PreNorm.shape, requires_grad=True))
    out.sum().backward()
    assert parts[0]() is not None  # the graph is still there ...
    assert parts[0]().state is None  # ... but owns nothing
    assert not parts[0]().records
    assert not parts[0]().passes


@each_fast_case
def test_an_extra_input_that_the_chain_made_itself_is_no_cycle(case, without_collector):
    model = toy(case, Attention)
    x = torch.randn(PreNorm.shape, requires_grad=True)
    bias, scale, gates = attention_extras()

    def function():
        h, (weights, _) = runner.apply(model.chain, model.units[0], model.branches[0], x, (bias, scale, gates))
        tape = weakref.ref(h._revwire_link.tape)
        bias_of_its_own, gate_of_its_own = weights.mean(0), h.mean((0, 1))
        for unit, branch in zip(model.units[1:], model.branches[1:], strict=True):
            h, _ = runner.apply(model.chain, unit, branch, h, (bias_of_its_own, scale, [gate_of_its_own]))
        return h, tape

    with stored(model):
        true = torch.autograd.grad(function()[0].sum(), [x, bias])
    out, tape = function()
    got = torch.autograd.grad(out.sum(), [x, bias])
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * case.stored * float(b.abs().amax()))
    del out
    assert tape() is None
    assert function()[1]() is None


def test_the_table_has_a_case_of_each_arithmetic():
    assert [(c.exact, c.coupling.kept_bits) for c in FAST] == [(False, 0), (True, 0), (True, 4)]


def test_a_converted_model_holds_no_activation_at_rest():
    """What was observed to capture a block is let go: nothing of the example or of a step stays alive."""
    model = encoder(norm_first=False)
    inputs = torch.randn(5, 7, 16)
    revwire.convert(model, inputs)
    model(inputs).sum().backward()
    own = {id(t) for t in (inputs, *model.buffers(), *model.parameters(), *(p.grad for p in model.parameters()))}
    gc.collect()
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in own and o.shape == inputs.shape]
    assert not alive
