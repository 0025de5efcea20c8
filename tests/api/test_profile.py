"""`revwire.profile`: three variants of one step, and a model left as it was."""

import json

import pytest
import torch
from torch import nn

import revwire
from toys import encoder


def network(depth=6, dropout=0.0):
    """A stack of pre-norm layers, and a BatchNorm whose statistics a training step moves."""
    torch.manual_seed(0)
    stack = encoder(depth, 32, 4, 64, dropout=dropout)
    return nn.Sequential(nn.BatchNorm1d(16), stack).train()


INPUTS = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def profile():
    return revwire.profile(revwire.convert(network(), INPUTS, coupling="re2tal"), INPUTS, repeats=2)


def test_reversible_holds_less_than_stored_activations(profile):
    assert profile.revwire.saved_bytes < profile.stored.saved_bytes / 3
    assert profile.revwire.peak_bytes < profile.stored.peak_bytes / 2


def test_checkpointing_is_around_each_host(profile):
    assert profile.revwire.saved_bytes < profile.checkpoint.saved_bytes < profile.stored.saved_bytes / 2


def test_saved_bytes_do_not_depend_on_depth(profile):
    deep = revwire.profile(revwire.convert(network(12), INPUTS, coupling="re2tal"), INPUTS, repeats=1)
    per_unit = (deep.revwire.saved_bytes - profile.revwire.saved_bytes) / 12
    assert per_unit < INPUTS.nbytes / 8  # checksums, no activation


def test_table_and_dict_name_all_three(profile):
    data = json.loads(json.dumps(profile.to_dict()))
    assert set(data["costs"]) == {"revwire", "stored activations", "checkpoint per block"}
    assert all(name in str(profile) for name in data["costs"])
    assert profile.stored.time_ratio.median == 1


def test_the_model_is_left_as_found():
    model = revwire.convert(network(2, dropout=0.1), INPUTS)
    model[1].layers[0].eval()
    model(INPUTS).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()

    revwire.profile(model, INPUTS, repeats=1)

    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is grads[n] for n, p in model.named_parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert revwire.verify(model, INPUTS).bit_exact


def test_the_caller_chooses_the_loss():
    seen = []

    def loss(output):
        seen.append(output.shape)
        return output.sum()

    revwire.profile(revwire.convert(network(2), INPUTS), INPUTS, repeats=1, loss=loss)
    assert set(seen) == {INPUTS.shape}


def test_inputs_that_need_gradients_keep_their_own():
    x = INPUTS.clone().requires_grad_()
    revwire.profile(revwire.convert(network(2), x), (x,), repeats=1)
    assert x.grad is None


def test_an_unconverted_model_is_refused():
    with pytest.raises(revwire.ConversionError, match="not converted"):
        revwire.profile(network(2), INPUTS)
