"""Deep copies and pickles of converted models, and of chains."""

import copy
import pickle

import pytest
import torch
from torch import nn

import revwire
from cases import each_fast_case
from revwire._runtime.chain import Chain
from revwire.testing import Step, check_gradients

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


def converted(case):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return revwire.convert(model, X, coupling=case.coupling, exact=case.exact)


@each_fast_case
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_copy_of_a_converted_model_is_one(case, how, used):
    model = converted(case)
    if used:
        check_gradients(model, X, tolerance=10 * case.stored)
    other = how(model)
    Step.of(other, X).assert_like(Step.of(model, X))
    check_gradients(other, X, tolerance=10 * case.stored)
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
