"""Copies, files, replicas, and modules that are exchanged after conversion."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import revwire
from cases import each_fast_case
from revwire._runtime.chain import Chain
from revwire.testing import Step, check_gradients
from steps import assert_same_step, twin
from toys import Loop, X, block, encoder, pre_norm, stack


class Block(block(pre_norm)):  # a class of this module, so that it can be pickled
    pass


class Model(Loop):
    def __init__(self):
        super().__init__(Block)
        self.double()


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_a_file]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_converted_and_independent(copied):
    model = revwire.convert(Model().eval(), X)
    out = model(X)[0]
    other = copied(model)
    assert torch.equal(other(X)[0], out)
    with torch.no_grad():
        other.blocks[0].g.weight.mul_(2)
    assert not torch.equal(other(X)[0], out)
    assert torch.equal(model(X)[0], out)
    assert revwire.verify(other, X).bit_exact
    revwire.revert(other)
    assert revwire.report(model).units


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_waiting_model_waits_for_its_own_call(copied):
    model = revwire.convert(Model())
    other = copied(model)
    other(X)
    assert len(revwire.report(other).units) == 3
    with pytest.raises(revwire.ConversionError, match="waits for its first call"):
        revwire.report(model)


def replicas_of(model, scale):
    """What `nn.DataParallel` makes of a model, without a device: copies of the modules, their weights as plain
    tensors.
    """
    modules = list(model.modules())
    copies = [m._replicate_for_data_parallel() for m in modules]
    for module, replica in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            replica._modules[name] = copies[modules.index(child)]
        for name, p in module._parameters.items():
            setattr(replica, name, p * scale)
    return copies[0]


def test_a_replica_runs_on_its_own_weights():
    model = revwire.convert(Model().eval(), X)
    got = replicas_of(model, 2.0)(X)[0]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    assert torch.equal(got, model(X)[0])


def test_state_dicts_both_ways():
    plain, model = Model(), revwire.convert(Model(), X)
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert Model().load_state_dict(model.state_dict()).unexpected_keys == []


def test_functional_call():
    model, reference = twin(Model().eval())
    weights = {k: v * 1.5 for k, v in reference.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(model, weights, (X,))[0]
        torch.testing.assert_close(got, torch.func.functional_call(reference, weights, (X,))[0])


@pytest.mark.parametrize("change", ["replace", "wrap", "parametrize"])
def test_submodules_that_are_exchanged_later(change):
    model, reference = twin(Model())
    torch.manual_seed(5)
    new = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)).double()
    for m in (model, reference):
        b = m.blocks[1]
        if change == "parametrize":
            parametrizations.weight_norm(b.f)
        else:
            b.f = copy.deepcopy(new) if change == "replace" else nn.Sequential(b.f, copy.deepcopy(new))
    assert_same_step(model, reference, X)


def test_weight_norm_before_conversion():
    model = Model()
    for b in model.blocks:
        parametrizations.weight_norm(b.f)
    model, reference = twin(model)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert_same_step(model, reference, X)


def test_a_block_taken_out_of_its_model_still_runs():
    model = revwire.convert(stack(pre_norm).eval(), X)
    alone = copy.deepcopy(model.blocks[1])
    assert alone(X).shape == X.shape


TOKENS = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


def converted(case):
    torch.manual_seed(0)
    return revwire.convert(encoder(), TOKENS, coupling=case.coupling, exact=case.exact)


@each_fast_case
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_of_a_converted_model_is_one(case, how, used):
    model = converted(case)
    if used:
        check_gradients(model, TOKENS, tolerance=10 * case.stored)
    other = how(model)
    Step.of(other, TOKENS).assert_like(Step.of(model, TOKENS))
    check_gradients(other, TOKENS, tolerance=10 * case.stored)
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    with revwire.stored_activations(other):
        assert not any(chain.stored for chain in chains(model))


def chains(model):
    return {
        id(c): c for m in model.modules() for s in getattr(vars(m).get("forward"), "slots", []) for c in [s.chain]
    }.values()


@each_fast_case
def test_a_chain_can_be_copied_and_pickled(case):
    chain = Chain("chain 0", case.coupling, exact=case.exact, length=3, largest=2.0)
    for other in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert vars(other) == vars(chain)
