"""What modules hold besides weights: generators, attributes, buffers. A recompute finds it as the forward did, and
leaves no trace.
"""

import copy
import random
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import numpy
import pytest
import torch
from torch import nn

import revwire
from revwire._forwards.converted import chains_of
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.generators import states_of
from revwire._surroundings.holdings import Known
from revwire._surroundings.inventory import Inventory

WIDTH = 8
X = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
OF_THE_MODULE = torch.Generator()


@dataclass(slots=True)
class Dice:
    generator: numpy.random.Generator = field(default_factory=lambda: numpy.random.default_rng(0))


class Leaf(nn.Module):
    """A branch whose last layer is zero, as that of an adapter: its result hides what it computes."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        nn.init.zeros_(self.down.weight)
        self.begin()

    def begin(self):
        pass

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h * self.factor(h))


class Block(nn.Module):
    def __init__(self, leaf):
        super().__init__()
        self.leaf = leaf()

    def forward(self, x):
        return x + self.leaf(x)


class Net(nn.Module):
    def __init__(self, leaf, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Block(leaf) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Torch(Leaf):
    def begin(self):
        self.generator = torch.Generator().manual_seed(3)

    def factor(self, h):
        return torch.rand(h.shape, generator=self.generator)


class Late(Torch):
    """Makes its generator when it is first needed."""

    def begin(self):
        self.generator = None

    def factor(self, h):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(3)
        return super().factor(h)


class New(Torch):
    """Has no such attribute before it is first needed."""

    def begin(self):
        pass

    def factor(self, h):
        if not hasattr(self, "generator"):
            self.generator = torch.Generator().manual_seed(3)
        return super().factor(h)


class Listed(Torch):
    def begin(self):
        self.generators = {"all": [torch.Generator().manual_seed(3)]}

    def factor(self, h):
        return torch.rand(h.shape, generator=self.generators["all"][0])


class OfTheClass(Torch):
    generator = torch.Generator()

    def begin(self):
        pass


class OfTheFile(Leaf):
    def factor(self, h):
        return torch.rand(h.shape, generator=OF_THE_MODULE)


class Noise:
    """Draws by a method."""

    def __init__(self):
        self.generator = torch.Generator()

    def like(self, h):
        return torch.rand(h.shape, generator=self.generator)


NOISE, NAMED = Noise(), {"all": [torch.Generator()]}


def noise_of_the_object(h):
    return NOISE.like(h)


def noise_named(h):
    return torch.rand(h.shape, generator=NAMED["all"][0])


def noise_by_default(h, generator=OF_THE_MODULE):
    return torch.rand(h.shape, generator=generator)


def enclosed(generator):
    return lambda h: torch.rand(h.shape, generator=generator)


def number_of_python():
    return random.random()


class ByFunctions(Leaf):
    """Draws from generators that only the code of functions names."""

    functions = noise_of_the_object, noise_named, noise_by_default, enclosed(OF_THE_MODULE)

    def factor(self, h):
        return sum(f(h) for f in self.functions)


class LateOfTheClass(Leaf):
    """Puts its generator into a table of its class when it is first needed."""

    table: ClassVar = {}

    @property
    def generator(self):
        return self.table.setdefault("cpu", torch.Generator().manual_seed(3))

    def factor(self, h):
        return torch.rand(h.shape, generator=self.generator)


class Python(Leaf):
    def begin(self):
        self.random = random.Random(3)

    def factor(self, h):
        return self.random.random()


class NumPy(Leaf):
    def begin(self):
        self.dice = Dice()

    def factor(self, h):
        return torch.from_numpy(self.dice.generator.random(h.shape)).to(h.dtype)


class OldNumPy(Leaf):
    def begin(self):
        self.random = numpy.random.RandomState(3)

    def factor(self, h):
        return self.random.randn()


class OfPython(Leaf):
    def factor(self, h):
        return random.random()


class LaterOfPython(Leaf):
    """Draws nothing in its first forwards."""

    def begin(self):
        self.calls = 0

    def factor(self, h):
        self.calls += 1
        return random.random() if self.calls > 1 else 1.0


class LaterByFunctions(Leaf):
    def begin(self):
        self.calls = 0

    def factor(self, h):
        self.calls += 1
        return number_of_python() if self.calls > 1 else 1.0


class OfNumPy(Leaf):
    def factor(self, h):
        return numpy.random.standard_normal()


DRAWING = [
    *(Torch, Late, New, Listed, OfTheClass, LateOfTheClass, OfTheFile, ByFunctions),
    *(Python, NumPy, OldNumPy, OfPython, LaterOfPython, LaterByFunctions, OfNumPy),
]
SHARED = [OF_THE_MODULE, OfTheClass.generator, NOISE.generator, *NAMED["all"]]


def weight_gradients(net, run):
    net.zero_grad(set_to_none=True)
    run()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_equal(got, true):
    assert got.keys() == true.keys()
    for name in got:
        assert torch.equal(got[name], true[name]), name


def begin_again(net, leaf):
    random.seed(0)
    numpy.random.seed(0)
    LateOfTheClass.table.clear()
    for generator in SHARED:
        generator.manual_seed(0)
    for block in net.blocks:
        for name in [k for k in vars(block.leaf) if k in ("generator", "generators", "random", "dice")]:
            delattr(block.leaf, name)
        block.leaf.begin()


@pytest.mark.parametrize("options", [{}, {"coupling": "re2tal", "exact": False}], ids=str)
@pytest.mark.parametrize("leaf", DRAWING)
def test_generators_are_replayed(leaf, options):
    torch.manual_seed(0)
    net = Net(leaf)
    net = revwire.convert(net, X, **options)

    def step():
        for _ in range(2):
            net(X).square().sum().backward()

    begin_again(net, leaf)
    got = weight_gradients(net, step)
    left = random.random(), numpy.random.random()
    begin_again(net, leaf)
    with revwire.stored_activations(net):
        assert_equal(got, weight_gradients(net, step))
    assert left == (random.random(), numpy.random.random())


@pytest.mark.parametrize("leaf", DRAWING)
def test_conversion_draws_nothing(leaf):
    net = Net(leaf)
    begin_again(net, leaf)
    own = (g for b in net.blocks for g in (vars(b.leaf).get("generator"), vars(b.leaf).get("random")) if g)
    generators = [*own, *SHARED]
    before = [str(state) for _, state in states_of(generators)]
    revwire.verify(revwire.convert(net, X), X)
    assert before == [str(state) for _, state in states_of(generators)]


class MovesWeights(Leaf):
    """A teacher that follows, a weight that is cut off, and one that is written to behind its version counter."""

    late = False

    def begin(self):
        self.teacher = nn.Linear(WIDTH, 2 * WIDTH).requires_grad_(False)
        self.codes = nn.Parameter(torch.ones(2 * WIDTH), requires_grad=False)
        self.embedding = nn.Embedding(1, 2 * WIDTH, max_norm=0.5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if not self.late or self.calls > 1:
            with torch.no_grad():
                self.up.weight.clamp_(-0.2, 0.2)
                for ours, theirs in zip(self.teacher.parameters(), self.up.parameters(), strict=True):
                    ours.lerp_(theirs, 0.1)
        self.codes.data.mul_(0.9)
        return super().forward(x) + self.teacher(x).tanh()[..., :WIDTH]

    def factor(self, h):
        return (self.teacher.weight.sum() + self.codes) * (1 + self.embedding(torch.tensor([0])))


def moving_twins(leaf, **options):
    torch.manual_seed(0)
    net, stored = Net(leaf), Net(leaf)
    stored.load_state_dict(net.state_dict())
    for model in (net, stored):
        revwire.convert(model, X, **options)
    return net, stored


def assert_same_weights_after_a_step(net, stored):
    got = weight_gradients(net, lambda: net(X).square().sum().backward())
    with revwire.stored_activations(stored):
        assert_equal(got, weight_gradients(stored, lambda: stored(X).square().sum().backward()))
    assert_equal(dict(net.named_parameters()), dict(stored.named_parameters()))


@pytest.mark.parametrize("options", [{}, {"whole": "blocks.*"}, {"coupling": "re2tal"}], ids=str)
def test_a_recompute_finds_weights_that_its_forward_moves(options):
    net, stored = moving_twins(MovesWeights, **options)
    for _ in range(3):
        assert_same_weights_after_a_step(net, stored)


@pytest.mark.parametrize("options", [{}, {"whole": "blocks.*"}], ids=str)
def test_weights_that_a_forward_moves_for_the_first_time(options, monkeypatch):
    monkeypatch.setattr(MovesWeights, "late", True)
    net, stored = moving_twins(MovesWeights, **options)
    assert_same_weights_after_a_step(net, stored)
    if options:
        with pytest.warns(UserWarning, match="writes in place to a tensor from outside"):
            assert_same_weights_after_a_step(net, stored)
    else:
        with pytest.raises(revwire.ReconstructionError, match=r"weight 'leaf\.up\.weight' was modified"):
            net(X).sum().backward()
        stored(X)
    assert_same_weights_after_a_step(net, stored)


class Tensors(Leaf):
    """Adds to all kinds of tensors that it holds."""

    def begin(self):
        self.load, self.mean, self.inside = None, torch.zeros(()), {"loads": [torch.zeros(())]}
        self.large = torch.zeros(2**16 + 1)
        self.register_buffer("never", None)
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("counts", torch.zeros(3, dtype=torch.long))
        self.register_buffer("replaced", torch.zeros(2))

    def factor(self, h):
        with torch.no_grad():
            seen = h.detach().abs().mean()
            if self.load is None:
                self.load = seen.clone()
            else:
                self.load += seen
            self.never = seen if self.never is None else self.never + seen
            if not hasattr(self, "lazy"):
                self.register_buffer("lazy", torch.zeros(()))
            self.lazy += 1
            self.mean.mul_(0.5).add_(seen)
            self.inside["loads"][0] += seen
            self.running += seen
            self.counts += 1
            self.large += 1
            self.replaced = self.replaced + seen
        sums = self.load + self.never + self.mean + self.running.sum() + self.inside["loads"][0]
        return 1 + sums + self.lazy + self.large[0] / (1 + self.counts.sum())

    def trace(self):
        lazy, large = getattr(self, "lazy", None), self.large[0].item()
        return [self.load, self.never, lazy, self.mean, large, self.running, self.counts, self.replaced, self.inside]


class Containers(Leaf):
    """Fills containers and arrays."""

    def begin(self):
        self.seen, self.table, self.calls, self.array = [], {}, 0, numpy.zeros(2)
        self.names, self.last = set(), deque([0], maxlen=3)
        self.inside = {"all": [{"calls": 0}]}

    def factor(self, h):
        self.calls += 1
        self.seen.append(self.calls)
        self.table[self.calls] = self.table.get(self.calls, 0) + 1
        self.names.add(str(len(self.seen)))
        self.last.append(self.last[-1] + 1)
        self.array += 1
        self.inside["all"][0]["calls"] += 1
        return len(self.seen) + float(self.array[0]) + self.last[-1] + self.inside["all"][0]["calls"]

    def trace(self):
        return [self.seen, self.table, self.calls, self.array.tolist(), self.names, self.last, self.inside]


class Long(Containers):
    """As before, with many items: a list and a dict that are cut, and a deque that is full."""

    def begin(self):
        super().begin()
        self.seen, self.table = list(range(300)), dict.fromkeys(range(-300, 0), 1)
        self.last = deque(range(300), maxlen=300)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("mode", [None, "checkpointed", "selective", "stored"])
@pytest.mark.parametrize("leaf", [Tensors, Containers, Long])
def test_each_write_counts_once(leaf, mode, training):
    plain = Net(leaf).train(training)
    net = copy.deepcopy(plain)
    revwire.convert(net, X)
    assert str([b.leaf.trace() for b in net.blocks]) == str([b.leaf.trace() for b in plain.blocks])
    if mode:
        for chain in chains_of(net):
            chain.modes = (mode,) * chain.length

    def accumulated(model):
        for _ in range(2):  # accumulation: two forwards, and then their backward passes
            (model(X).square().sum() + model(2 * X).square().sum()).backward()

    with revwire.stored_activations(twin := copy.deepcopy(net)):
        true = weight_gradients(twin, lambda: accumulated(twin))
    got = weight_gradients(net, lambda: accumulated(net))
    assert_equal(got, true)
    assert str([b.leaf.trace() for b in net.blocks]) == str([b.leaf.trace() for b in twin.blocks])
    weight_gradients(plain, lambda: accumulated(plain))
    if leaf is not Tensors:  # what the others hold depends on the values of the streams
        assert [b.leaf.trace() for b in net.blocks] == [b.leaf.trace() for b in plain.blocks]


@pytest.mark.parametrize("leaf", [Tensors, Containers, Long])
def test_what_holds_state_is_left_as_found(leaf):
    net = Net(leaf)
    before = str([b.leaf.inside if leaf is Tensors else b.leaf.trace() for b in net.blocks])
    with left_as_found(net, X):
        net(X)
    assert before == str([b.leaf.inside if leaf is Tensors else b.leaf.trace() for b in net.blocks])


def test_an_attribute_that_was_set_for_the_forward_alone_is_found_again():
    class Given(Leaf):
        def begin(self):
            self.given = None

        def factor(self, h):
            return self.given

    net = Net(Given)
    for block in net.blocks:
        block.leaf.given = torch.ones(2 * WIDTH)
    revwire.convert(net, X)

    def step():
        for block in net.blocks:
            block.leaf.given = torch.full((2 * WIDTH,), 3.0)
        out = net(X)
        for block in net.blocks:
            block.leaf.given = None
        out.square().sum().backward()

    got = weight_gradients(net, step)
    with revwire.stored_activations(net):
        assert_equal(got, weight_gradients(net, step))


def test_modules_are_looked_up_once_and_again_when_they_have_more():
    leaf, known = Torch(), Known()
    found = known.found(Inventory.of([leaf]))
    assert found.drawing == [(0, "generator")]
    assert known.found(Inventory.of([leaf])) is found
    leaf.register_buffer("more", torch.zeros(2))
    assert known.found(Inventory.of([leaf])).buffers == [(0, "more")]
    assert copy.deepcopy(known).last is None
