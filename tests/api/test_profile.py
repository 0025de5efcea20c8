"""`revwire.profile`: four variants of one step, and a model left as it was."""

import json

import pytest
import torch
from torch import nn

import revwire
from revwire._torch import inside_checkpoint
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


def test_checkpointing_is_around_each_block_of_the_original(profile):
    assert profile.revwire.saved_bytes < profile.checkpoint.saved_bytes < profile.original.saved_bytes / 2
    assert profile.original.saved_bytes == pytest.approx(profile.stored.saved_bytes, rel=0.1)


def test_saved_bytes_do_not_depend_on_depth(profile):
    deep = revwire.profile(revwire.convert(network(12), INPUTS, coupling="re2tal"), INPUTS, repeats=1)
    per_unit = (deep.revwire.saved_bytes - profile.revwire.saved_bytes) / 12
    assert per_unit < INPUTS.nbytes / 8  # checksums, no activation


def test_table_and_dict_name_all_four(profile):
    data = json.loads(json.dumps(profile.to_dict()))
    assert list(data["costs"]) == ["original", "checkpoint every block", "revwire", "revwire, stored"]
    assert data["rival"] == "checkpoint every block"
    assert all(name in str(profile) for name in data["costs"])
    assert profile.original.time_ratio.median == 1


class Fussy(nn.Module):
    """A block that fails where its activations are packed, as checkpointing does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        if inside_checkpoint():
            raise ValueError("not inside of a checkpoint")
        return x + self.linear(x)


class Uncopied(nn.Module):
    """What cannot be copied."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.linear(x)

    def __deepcopy__(self, memo):
        raise TypeError("it is one of a kind")


@pytest.mark.parametrize(
    ("block", "reason", "failed"),
    [
        (Fussy, "ValueError: not inside of a checkpoint", ["checkpoint every block"]),
        (Uncopied, "TypeError: it is one of a kind", ["original", "checkpoint every block"]),
    ],
)
def test_what_fails_has_no_costs_and_a_reason(block, reason, failed):
    model = revwire.convert(nn.Sequential(*(block() for _ in range(3))).train(), INPUTS)
    found = revwire.profile(model, INPUTS, repeats=1)
    assert found.checkpoint is None
    assert [name for name, cost in found.costs.items() if cost is None] == failed
    assert found.reasons == dict.fromkeys(failed, reason)
    assert f"checkpoint every block failed: {reason}" in str(found)
    assert found.revwire.peak_bytes > 0
    assert json.loads(json.dumps(found.to_dict()))["costs"]["checkpoint every block"] is None
    assert revwire.verify(model, INPUTS).bit_exact


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
