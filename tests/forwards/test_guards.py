"""Whatever the own code of a host decides on, it decides anew in each call."""

import enum

import pytest
import torch
from torch import nn

import revwire
from revwire._surroundings.randomness import python_random_state, set_python_random_state
from steps import TOLERANCE, assert_same_step, step, twin, twin_that_stays
from toys import X, noise, pre_norm, stack


def branchy(decide):
    def forward(self, x, *args, **kwargs):
        return x + self.f(x) if decide(self, x, *args, **kwargs) else x + self.g(x)

    return forward


def test_training_and_evaluation():
    model, reference = twin(stack(branchy(lambda self, x: self.training)))
    for mode in (True, False, True):
        assert_same_step(model.train(mode), reference.train(mode), X)


def test_a_dropout_rate_that_was_zero():
    model, reference = twin(stack(pre_norm, lambda self: setattr(self.drop, "p", 0.0)))
    for m in (*model.blocks, *reference.blocks):
        m.drop.p = 0.5
    assert_same_step(model, reference, X)


@pytest.mark.parametrize(
    "decide", [lambda self, x: True, lambda self, x: x.shape[1] > 4], ids=["never looks", "looks at shapes"]
)
def test_other_sizes(decide):
    model, reference = twin(stack(branchy(decide)))
    for size in ((2, 5, 8), (3, 5, 8), (1, 3, 8), (0, 5, 8)):
        assert_same_step(model, reference, noise(*size))


def test_strides_that_the_code_looks_at():
    model, reference = twin(stack(branchy(lambda self, x: x.is_contiguous())))
    assert_same_step(model, reference, noise(5, 2, 8).transpose(0, 1))


def test_optional_tensors():
    model, reference = twin(stack(lambda self, x, mask=None: x + self.f(x) * (1 if mask is None else mask)))
    mask = noise(5, 1).requires_grad_()
    for args, kwargs in (((), {}), ((mask,), {}), ((), {"mask": mask}), ((2.0,), {})):
        assert_same_step(model, reference, X, *args, **kwargs)


def test_flags_by_position_and_by_name():
    model, reference = twin(stack(branchy(lambda self, x, flag=True: flag)))
    for args, kwargs in (((), {}), ((False,), {}), ((), {"flag": False}), ((), {"flag": True})):
        assert_same_step(model, reference, X, *args, **kwargs)


class Kind(enum.Enum):
    A, B = 1, 2


@pytest.mark.parametrize(
    "values", [(Kind.A, Kind.B), (torch.tanh, torch.sigmoid), (int, str)], ids=["enum", "function", "type"]
)
def test_arguments_that_are_compared_by_identity(values):
    model, reference = twin(stack(branchy(lambda self, x, kind: kind is values[0])), (X, values[0]))
    for value in values:
        assert_same_step(model, reference, X, value)


def test_one_tensor_twice_is_not_two_tensors():
    model, reference = twin_that_stays(stack(lambda self, x, y: x + (self.f(x) if x is y else self.g(y))), (X, X))
    assert_same_step(model, reference, X, X)
    assert_same_step(model, reference, X, X.clone())


class Config:
    def __init__(self):
        self.scale = 2.0


@pytest.mark.parametrize(
    ("holder", "change"),
    [
        (lambda: 2.0, lambda m: setattr(m, "held", 3.0)),
        (lambda: {"scale": 2.0}, lambda m: m.held.update(scale=3.0)),
        (lambda: [2.0], lambda m: m.held.__setitem__(0, 3.0)),
        (Config, lambda m: setattr(m.held, "scale", 3.0)),
        (lambda: torch.tanh, lambda m: setattr(m, "held", torch.sigmoid)),
        (nn.Tanh, lambda m: setattr(m, "held", nn.Sigmoid())),
    ],
    ids=["number", "dict", "list", "object", "function", "module"],
)
def test_attributes_that_change_after_conversion(holder, change):
    def use(held, h):
        if callable(held):
            return held(h)
        return h * (
            held.scale
            if isinstance(held, Config)
            else held["scale"]
            if isinstance(held, dict)
            else held[0]
            if isinstance(held, list)
            else held
        )

    model, reference = twin(
        stack(lambda self, x: x + use(self.held, self.f(x)), lambda self: setattr(self, "held", holder()))
    )
    assert_same_step(model, reference, X)
    for m in (*model.blocks, *reference.blocks):
        change(m)
    assert_same_step(model, reference, X)


def test_weights_that_are_frozen_later():
    model, reference = twin(stack(branchy(lambda self, x: self.f.weight.requires_grad)))
    assert_same_step(model, reference, X)
    for m in (*model.blocks, *reference.blocks):
        m.f.weight.requires_grad_(False)
    assert_same_step(model, reference, X)


def test_grad_modes():
    model, reference = twin(stack(branchy(lambda self, x: torch.is_grad_enabled())).eval())
    assert_same_step(model, reference.eval(), X)  # runs both with gradients and without
    with torch.inference_mode():
        torch.testing.assert_close(model(X)[0], reference(X)[0], **TOLERANCE)


def test_autocast_on_and_off():
    model = revwire.convert(stack(pre_norm).float(), X.float())
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert revwire.verify(model, X.float()).bit_exact


def modes_inside(self, x):
    h = self.f(x)
    with torch.no_grad():
        gate = self.g(x).sigmoid()
    with torch.autocast("cpu", enabled=False):
        return x + h.float() * gate.float()


def test_modes_that_the_code_sets_itself():
    model, reference = twin(stack(modes_inside).float(), X.float())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), revwire.stored_activations(model):
            torch.testing.assert_close(step(model, X.float()), step(reference, X.float()))


def test_a_number_that_changes_in_every_call():
    model, reference = twin(stack(lambda self, x, scale=1.0: x + self.f(x) * scale, depth=2))
    for scale in (*range(70), 3):
        with torch.no_grad():
            torch.testing.assert_close(model(X, float(scale))[0], reference(X, float(scale))[0], **TOLERANCE)
    assert len(model.blocks[0].forward.programs) <= 64


class Deciding(nn.Module):
    """Residual adds in the code of the model itself, which looks at a value of its stream."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
            x = x if x.sum() > 0 else -x
        return x


def dynamic(self, x):
    return x + self.f(x) * (x[..., 0] > 0).nonzero().shape[0]


@pytest.mark.parametrize(
    "draw",
    [lambda: __import__("random").random(), lambda: __import__("numpy").random.rand()],
    ids=["random", "numpy.random"],
)
def test_decisions_on_random_numbers_of_python(draw):
    model, reference = twin(stack(branchy(lambda self, x: draw() < 0.5)))
    assert len(revwire.report(model).units) == 3
    outputs = []
    for _ in range(8):
        state = python_random_state()
        with revwire.stored_activations(model):
            got = step(model, X)
        set_python_random_state(state)
        torch.testing.assert_close(got, step(reference, X), **TOLERANCE)
        outputs.append(float(got[0][0].sum()))
    assert len(set(outputs)) > 2


@pytest.mark.parametrize(
    "forward",
    [branchy(lambda self, x: x.sum() > 0), branchy(lambda self, x: x.max().item() > 0), dynamic],
    ids=["bool", "item", "dynamic shape"],
)
def test_a_block_that_decides_on_values(forward):
    model, reference = twin(stack(forward))
    assert [u.pattern for u in revwire.report(model).units] == ["residual"] * 3
    for example in (X, -X):
        assert_same_step(model, reference, example)
    model = revwire.revert(model)
    assert revwire.verify(revwire.convert(model, X, coupling="bdia:1/2"), -X).bit_exact


@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
def test_a_model_that_decides_on_values_between_its_units():
    torch.manual_seed(0)
    model, reference = twin(Deciding().double())
    assert len(revwire.report(model).units) == 3
    for example in (X, -X, X.abs()):
        assert_same_step(model, reference, example)


def test_a_call_that_loses_the_units_runs_as_it_was_written():
    model, reference = twin(
        stack(lambda self, x, fused=False: x + self.f(x) if not fused else torch.stack([x, self.f(x)]).sum(0))
    )
    with pytest.warns(UserWarning, match=r"blocks\.\d\.f \(\S+\): a call of its host did not come to its residual add"):
        assert_same_step(model, reference, X, fused=True)
    assert_same_step(model, reference, X)


def encoder(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_fused_path_without_gradients(norm_first):
    model, reference = twin(encoder(norm_first))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for kwargs in ({}, {"src_key_padding_mask": padding}):
        assert_same_step(model.train(), reference.train(), X, **kwargs)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), reference.eval()(X), **TOLERANCE)
        torch.testing.assert_close(
            model(X, src_key_padding_mask=padding), reference(X, src_key_padding_mask=padding), **TOLERANCE
        )
