"""The form in which weights were trained: written beside them, read back, and missed where it would be lost."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import revwire
from revwire import FunctionLostWarning
from toys import encoder

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))

LOSES = ["re2tal", "dr2net:1,1/8", "midpoint:1,2", "midpoint:1/8,1", "bdia:1/2", "momentum:1/2"]
KEEPS = ["bdia", "bdia:1/4", "momentum:1/8", "midpoint:1/8", "bdia-random"]


def network(depth=3):
    torch.manual_seed(0)
    return encoder(depth, 8, 2, 16, dropout=0.0)


def train(model, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def converted(coupling="re2tal", **options):
    return revwire.convert(network(), X, coupling=coupling, **options)


@pytest.mark.parametrize("coupling", LOSES + KEEPS)
def test_a_coupling_declares_whether_the_plain_network_computes_nearly_the_same(coupling):
    keeps = revwire.couplings.coupling_from(coupling).keeps_function
    assert keeps is (coupling in KEEPS)
    change = revwire.verify(revwire.convert(network(12), X, coupling=coupling).eval(), X).function_change
    assert (change < 0.09) is keeps  # of these: at most 0.078, and at least 0.102


@pytest.mark.parametrize("options", [{}, {"chunks": 2}, {"memory_budget": "least"}])
def test_a_trained_network_is_loaded_as_it_was(options, tmp_path):
    model = train(converted(**options))
    revwire.save_config(model, tmp_path / "form.json")
    again = network()
    again.load_state_dict(model.state_dict())
    again = revwire.convert(again, X, plan=revwire.load_config(tmp_path / "form.json"))
    assert torch.equal(again(X), model(X))
    assert revwire.report(again) == revwire.load_config(tmp_path / "form.json")
    assert revwire.report(again).trained


def test_the_present_couplings_are_written(tmp_path):
    model = converted("dr2net:1,1/16")
    schedule = revwire.CouplingSchedule(model, "dr2net:0,1", total=2)
    schedule.step()
    revwire.save_config(model, tmp_path / "form.json")
    assert revwire.load_config(tmp_path / "form.json").chains[0].coupling == "dr2net:1/2,1/2"
    revwire.set_coupling(model, {"layers.1*": "re2tal"})
    revwire.save_config(model, tmp_path / "form.json")
    again = revwire.convert(network(), X, plan=revwire.load_config(tmp_path / "form.json"))
    assert [u.scheme for u in revwire.report(again).units] == [u.scheme for u in revwire.report(model).units]
    assert torch.equal(again(X), model(X))


def test_the_present_anchors_are_written(tmp_path):
    model = converted("re2tal", exact=False, anchors="auto")
    revwire._forwards.converted.chains_of(model)[0].spacing = 2  # as if states had drifted
    revwire.save_config(model, tmp_path / "form.json")
    assert revwire.load_config(tmp_path / "form.json").chains[0].anchors == 2


def test_a_network_that_is_not_converted_has_no_form(tmp_path):
    with pytest.raises(revwire.ConversionError, match="got a model that is not converted"):
        revwire.save_config(network(), tmp_path / "form.json")


# -- what is lost ------------------------------------------------------------------------------------------------------

LOST = r"trained under coupling 're2tal', which does not keep the function .* in {} they compute something else"


@pytest.mark.parametrize("of", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_reverting_what_was_trained_otherwise_warns(of):
    model = of(train(converted()))
    with pytest.warns(FunctionLostWarning, match=LOST.format("the original wiring")) as caught:
        assert revwire.revert(model) is model
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_where_warnings_are_errors_the_model_stays_converted():
    model = train(converted())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FunctionLostWarning):
            revwire.revert(model)
    assert revwire.report(model).chains


@pytest.mark.parametrize("coupling", KEEPS)
def test_nothing_is_lost_where_the_function_is_kept(coupling):
    revwire.revert(train(converted(coupling)))


def test_nothing_is_lost_where_nothing_was_trained():
    model = converted()
    revwire.verify(model, X)
    model(X).sum().backward()
    revwire.set_coupling(model, "bdia")
    revwire.set_coupling(model, "re2tal")
    revwire.revert(model)


def test_profile_of_what_was_trained_says_nothing():
    revwire.profile(train(converted()), X, repeats=1)


def test_another_coupling_for_what_was_trained_warns_before_it_is_set():
    model = train(converted())
    with pytest.warns(FunctionLostWarning, match=LOST.format("that coupling")):
        revwire.set_coupling(model, "bdia")
    with pytest.warns(FunctionLostWarning, match=LOST.format("that coupling")):
        revwire.set_coupling(train(converted()), {"layers.1*": "bdia"})


def test_a_schedule_goes_on_without_a_word():
    model = converted("dr2net:1,1/16")
    schedule = revwire.CouplingSchedule(model, "dr2net:0,1", total=2)
    for _ in range(2):
        train(model)
        schedule.step()
    assert revwire.report(model).chains[0].coupling == "dr2net:0,1"


@pytest.mark.parametrize(
    "lose", [revwire.revert, lambda m: revwire.set_coupling(m, "bdia")], ids=["reverted", "another coupling"]
)
def test_the_record_is_believed_where_the_weights_tell_nothing(lose, tmp_path):
    model = train(converted())
    revwire.save_config(model, tmp_path / "form.json")
    again = network()
    again.load_state_dict(model.state_dict())
    again = revwire.convert(again, X, plan=revwire.load_config(tmp_path / "form.json"))
    with pytest.warns(FunctionLostWarning, match="trained under coupling 're2tal'"):
        lose(again)


def test_a_plan_is_no_record_of_training():
    plan = revwire.plan(network(), X, coupling="re2tal")
    assert not plan.trained
    revwire.revert(revwire.convert(network(), X, plan=plan))


def test_a_loss_that_was_trained_is_lost_in_the_plain_class():
    """What the warning is about."""
    model = network()
    revwire.convert(model, X, coupling="re2tal")
    target, optimizer = torch.randn(X.shape, generator=torch.Generator().manual_seed(1)), torch.optim.Adam
    optimizer = optimizer(model.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.mse_loss(model(X), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(FunctionLostWarning):
        revwire.revert(model)
    assert nn.functional.mse_loss(model(X), target) > 1.5 * loss
