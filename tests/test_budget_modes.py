"""Units that are stored or checkpointed inside of a reversible chain: the same function, the same gradients to the bit; what is kept."""

import copy
from itertools import product

import pytest
import torch

from cases import FAST, each_fast_case
from revwire._errors import ReconstructionError
from revwire.measure import saved_bytes
from toys import KINDS, WIDTH, PreNorm, stored, toy

LETTERS = {"s": "stored", "c": "checkpointed", "r": "reversible"}
MIXES = ["".join(letters) for letters in product("scr", repeat=4)]
SHAPE = (16, 64, WIDTH)
STREAM = 16 * 64 * WIDTH * 4


def mixed(case, mix, kind=PreNorm):
    model = toy(case, kind, depth=len(mix))
    model.chain.modes = tuple(LETTERS[letter] for letter in mix)
    return model


def gradients(model, x):
    torch.manual_seed(3)
    return torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])


def same(a, b):
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_every_mix_of_four_units_has_the_gradients_of_stored_activations(case, mix):
    model, x = mixed(case, mix), torch.randn(PreNorm.shape, requires_grad=True)
    rebuilt = gradients(model, x)
    with stored(model):
        assert same(rebuilt, gradients(model, x))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_random_state_and_buffers_are_those_of_stored_activations(case, kind):
    model = mixed(case, "rscrssrcs", kind)
    twin = copy.deepcopy(model)
    x = torch.randn(kind.shape, requires_grad=True)
    rebuilt, state = gradients(model, x), torch.get_rng_state()
    with stored(twin):
        true = gradients(twin, x)
    assert same(rebuilt, true)
    assert torch.equal(state, torch.get_rng_state())
    assert same(model.buffers(), twin.buffers())


@each_fast_case
@pytest.mark.parametrize("mix", ["srsr", "rsss", "sssr", "crsc"])
def test_a_retained_backward_can_be_repeated(case, mix):
    model, x = mixed(case, mix), torch.randn(SHAPE, requires_grad=True)
    loss = model(x).square().sum()
    once = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    assert same(once, torch.autograd.grad(loss, [x, *model.parameters()]))


@each_fast_case
def test_stored_units_run_once_and_others_twice(case, monkeypatch):
    model, runs = mixed(case, "rscs"), []
    for i, branch in enumerate(model.branches):
        monkeypatch.setattr(branch, "forward", lambda x, i=i, forward=branch.forward: runs.append(i) or forward(x))
    gradients(model, torch.randn(SHAPE, requires_grad=True))
    assert [runs.count(i) for i in range(4)] == [2, 1, 2, 1]


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_run_of_stored_units_costs_its_activations_and_two_states(case):
    def held(mix):
        model, x = mixed(case, mix), torch.randn(SHAPE, requires_grad=True)
        return saved_bytes(lambda: model(x))

    bits = STREAM // 32 * case.coupling.kept_bits
    unit = held("ssss") - held("sss")
    assert abs(held("rsssr") - held("rssr") - unit) < 2048
    assert abs(held("rsrrr") - held("rrrrr") - (unit - bits + 2 * STREAM)) < 4096
    assert abs(held("rrrcr") - held("rrrrr") - (2 * STREAM - bits)) < 4096


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_chain_that_is_stored_as_a_whole_holds_no_streams(case):
    model, x = mixed(case, "ssss"), torch.randn(SHAPE, requires_grad=True)
    with stored(model):
        autograd = saved_bytes(lambda: model(x))
    assert abs(saved_bytes(lambda: model(x)) - autograd + 2 * STREAM) < 2048  # there, the last two states live on with the graph


@each_fast_case
def test_a_state_before_a_stored_run_that_is_written_to_is_an_error(case):
    model, x = mixed(case, "rrs"), torch.randn(SHAPE, requires_grad=True)
    h, seen = x, []
    for unit, branch in zip(model.units[:2], model.branches[:2], strict=True):
        h, _ = model.chain.apply(unit, branch, h)
        seen.append(h._revwire_link.tape)
    state = seen[-1].state[0]
    out, _ = model.chain.apply(model.units[2], model.branches[2], h)
    with torch.no_grad():
        state.add_(1)
    with pytest.raises((ReconstructionError, RuntimeError), match=r"written in place|modified by an inplace operation"):
        out.sum().backward()
