"""Random module graphs: a converted model is the original with other streams, or says why not. Never wrong."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import revwire
from steps import TOLERANCE, step
from toys import Plain, noise

pytestmark = pytest.mark.filterwarnings("ignore::revwire.NothingToRewireWarning")
"""Some of these graphs have no chain."""


def in_place_chain(b, x, m, flag):
    h = b.f(x)
    h.mul_(0.5)
    h[:, 0] = 0
    h += x
    return h


def written_after_read(b, x, m, flag):
    h = b.f(x)
    s = h.sum(-1, keepdim=True)
    h.tanh_()
    return x + h * s


def transposed(b, x, m, flag):
    y = x.transpose(0, 1)
    return (y + b.g(b.f(y))).transpose(0, 1)


def two_in_one(b, x, m, flag):
    x = x + b.f(x).tanh()
    return x + b.drop(b.g(x))


def without_gradients(b, x, m, flag):
    with torch.no_grad():
        gate = b.g(x).sigmoid()
    return x + b.f(x) * gate


def stashing(b, x, m, flag):
    b.last = b.f(x)
    return x + b.last


KINDS = {
    "residual": lambda b, x, m, flag: x + b.drop(b.f(x).tanh()),
    "masked": lambda b, x, m, flag: x + b.f(x) * (1 if m is None else m),
    "flagged": lambda b, x, m, flag: x + (b.f(x) if flag else b.g(x)),
    "by shape": lambda b, x, m, flag: x + (b.f(x) if x.shape[1] > 3 else b.g(x)),
    "by value": lambda b, x, m, flag: x + (b.f(x) if x.sum() > 0 else b.g(x)),
    "training": lambda b, x, m, flag: x + (b.f(x) if b.training else b.g(x)),
    "post-activation": lambda b, x, m, flag: F.relu(x + b.f(x)),
    "post-activation in place": lambda b, x, m, flag: F.relu(b.g(b.f(x)) + x, inplace=True),
    "post-norm": lambda b, x, m, flag: F.layer_norm(x + b.drop(b.f(x)), (8,)),
    "scaled": lambda b, x, m, flag: 0.5 * x + b.f(x),
    "parallel": lambda b, x, m, flag: x + b.f(x) + b.drop(b.g(x)),
    "nested": lambda b, x, m, flag: x + b.g((h := b.f(x)) + b.f(h)),
    "viewed": lambda b, x, m, flag: x + b.f(x.reshape(-1, 4, 2).transpose(1, 2).reshape(x.shape)),
    "copied after": lambda b, x, m, flag: (x + b.f(x)) * 1.0,
    "projected": lambda b, x, m, flag: b.g(x) + b.f(x),
    "identity when flagged": lambda b, x, m, flag: x if flag is None else x + b.f(x),
    "in place": in_place_chain,
    "written after read": written_after_read,
    "transposed": transposed,
    "two in one": two_in_one,
    "without gradients": without_gradients,
    "stashing": stashing,
    "early return by shape": lambda b, x, m, flag: x.clone() if x.shape[0] == 1 else x + b.f(x),
    "norm before the fork": lambda b, x, m, flag: (n := F.layer_norm(x, (8,))) + b.f(n),
    "dropout after the sum": lambda b, x, m, flag: b.drop(x + b.f(x)),
}


class Unit(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.f, self.g, self.drop = kind, nn.Linear(8, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x, m=None, flag=True):
        return KINDS[self.kind](self, x, m, flag)


class Nest(nn.Module):
    """Units inside of a module; ``returns`` says in which structure their result comes back."""

    def __init__(self, units, returns):
        super().__init__()
        self.units, self.returns = nn.ModuleList(units), returns

    def forward(self, x, m=None, flag=True):
        for u in self.units:
            x = u(x, m, flag)
        return {"plain": x, "tuple": (x, None), "dict": {"x": x}}[self.returns]


class Net(nn.Module):
    def __init__(self, nests, tap):
        super().__init__()
        self.nests, self.tap, self.head = nn.ModuleList(nests), tap, nn.Linear(8, 2)
        self.double()

    def forward(self, x, m=None, flag=True, stop=None):
        taps = []
        for i, nest in enumerate(self.nests):
            out = nest(x, m=m, flag=flag)
            x = out if isinstance(out, torch.Tensor) else out["x"] if isinstance(out, dict) else out[0]
            if self.tap:
                taps.append(self.head(x))
            if i == stop:
                break
        return self.head(x), taps


@st.composite
def nets(draw, kinds=tuple(KINDS)):
    pool = [Unit(k) for k in draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))]
    chosen = pool + draw(st.lists(st.sampled_from(pool), max_size=2))  # some twice
    if draw(st.booleans()):  # two modules hold one branch
        pool[-1].f = pool[0].f
    size = draw(st.integers(1, 3))
    nests = [
        Nest(chosen[i : i + size], draw(st.sampled_from(["plain", "tuple", "dict"])))
        for i in range(0, len(chosen), size)
    ]
    torch.manual_seed(draw(st.integers(0, 5)))
    net = Net(nests, draw(st.booleans()))
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "x": st.sampled_from(
                [noise(2, 5, 8), noise(2, 5, 8, seed=2), noise(1, 3, 8), noise(5, 3, 8).transpose(0, 1)]
            ),
            "m": st.sampled_from([None, noise(1, 1, 8).requires_grad_()]),
            "flag": st.sampled_from([True, False, None]),
            "stop": st.sampled_from([None, 0]),
        }
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.filterwarnings("ignore:.*did not come to its residual add:UserWarning")
@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(net=nets(), calls=CALLS, modes=st.lists(st.booleans(), min_size=4, max_size=4))
def test_never_wrong(net, calls, modes):
    reference = copy.deepcopy(net)
    revwire.convert(net, calls[0], coupling=Plain(), exact=False)
    for call, mode in zip(calls, modes, strict=False):
        want = step(reference.train(mode), **call)
        with revwire.stored_activations(net):
            got = step(net.train(mode), **call)
        torch.testing.assert_close(got, want, **TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*did not come to its residual add:UserWarning")
@pytest.mark.filterwarnings("ignore:.*something between two units made:UserWarning")
@settings(max_examples=50, deadline=None, derandomize=True)
@given(net=nets(), call=CALLS, coupling=st.sampled_from(["re2tal", "bdia:1/2", "bdia:1/16"]), mode=st.booleans())
def test_exact_and_back(net, call, coupling, mode):
    before = step(net.train(mode), **call[0])
    revwire.convert(net, call[0], coupling=coupling)
    assert revwire.verify(net, call[0]).bit_exact
    torch.testing.assert_close(step(revwire.revert(net), **call[0]), before, rtol=0, atol=0)


RULES = {"re2tal": (0, 1, 1), "bdia:1/2": (0.5, 0.5, 1.5), "bdia:1/8": (0.875, 0.125, 1.125)}
BRANCHES = {
    "residual": lambda u, x: u.f(x).tanh(),
    "masked": lambda u, x: u.f(x),
    "flagged": lambda u, x: u.f(x),
    "training": lambda u, x: u.g(x),
}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(net=nets(tuple(BRANCHES)), coupling=st.sampled_from(sorted(RULES)))
def test_known_structures_follow_the_recurrence(net, coupling):
    example = noise(2, 5, 8)
    units = [u for nest in net.nests for u in nest.units]
    first_uses = list(dict.fromkeys(units))
    revwire.convert(net.eval(), example, coupling=coupling)
    if len(first_uses) < len(units):  # a second use is another chain, or the same again: not the plain recurrence
        return
    assert len(revwire.report(net).units) == len(units)
    a, b, c = RULES[coupling]
    previous = current = example
    for u in units:
        previous, current = current, a * current + b * previous + c * BRANCHES[u.kind](u, current)
    out = (previous + current) / 2 if coupling == "re2tal" else current
    torch.testing.assert_close(net(example)[0], net.head(out), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_alone(kind):
    torch.manual_seed(0)
    net = Net([Nest([Unit(kind), Unit(kind)], "plain"), Nest([Unit(kind)], "tuple")], True)
    reference = copy.deepcopy(net)
    revwire.convert(net, noise(2, 5, 8), coupling=Plain(), exact=False)
    assert revwire.report(net).chains or revwire.report(net).skipped
    with revwire.stored_activations(net):
        torch.testing.assert_close(step(net, noise(2, 5, 8)), step(reference, noise(2, 5, 8)), **TOLERANCE)
