"""Units that are stored or checkpointed inside of a reversible chain: the same function, the same gradients to the bit;
what is kept.
"""

import copy
from collections import UserList
from itertools import product

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from cases import FAST, each_fast_case, spread
from revwire._errors import ReconstructionError
from revwire._runtime import run as runner
from revwire.measure import saved_bytes
from steps import SAMPLES, can_be_repeated, counted_runs, gradients, is_right, leaves_no_other_trace, records_of, same
from toys import KINDS, LARGE, STREAM, WIDTH, Guarded, PreNorm, Setting, Toy, mixed, modes_of, restless, stored

MIXES = ["".join(letters) for letters in product("scr", repeat=4)]
FLOAT = next(c for c in FAST if not c.exact)


@pytest.mark.parametrize(("case", "mix"), spread([c for c in FAST if c.exact], MIXES), ids=str)
def test_every_mix_of_four_units_has_the_gradients_of_stored_activations(case, mix):
    assert is_right(mixed(case, mix), torch.randn(PreNorm.shape, requires_grad=True))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_random_state_and_buffers_are_those_of_stored_activations(case, kind):
    assert leaves_no_other_trace(mixed(case, "rscrssrcs", kind), torch.randn(kind.shape, requires_grad=True))


@each_fast_case
@pytest.mark.parametrize("mix", ["srsr", "rsss", "sssr", "crsc"])
def test_a_retained_backward_can_be_repeated(case, mix):
    assert can_be_repeated(mixed(case, mix), torch.randn(LARGE, requires_grad=True))


@each_fast_case
def test_stored_units_run_once_and_others_twice(case, monkeypatch):
    model, runs = mixed(case, "rscs"), UserList()  # no recompute puts it back
    for i, branch in enumerate(model.branches):
        monkeypatch.setattr(branch, "forward", lambda x, i=i, forward=branch.forward: runs.append(i) or forward(x))
    gradients(model, torch.randn(LARGE, requires_grad=True))
    assert [runs.count(i) for i in range(4)] == [2, 1, 2, 1]


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_run_of_stored_units_costs_its_activations_and_two_states(case):
    def held(mix):
        model, x = mixed(case, mix), torch.randn(LARGE, requires_grad=True)
        return saved_bytes(lambda: model(x))

    bits = STREAM // 32 * case.coupling.kept_bits
    unit = held("ssss") - held("sss")
    assert abs(held("rsssr") - held("rssr") - unit) < 2048
    assert abs(held("rsrrr") - held("rrrrr") - (unit - bits + 2 * STREAM)) < 4096
    for mix, count in {"rrrcr": 1, "rcrcr": 2, "rccrr": 2, "rrcsr": 1, "rrsscr": 1, "rrscr": 0}.items():
        without, units = (
            mix.replace("c", "r"),
            mix.count("c"),
        )  # a single stored unit before it keeps that state as well
        assert abs(held(mix) - held(without) - (count * STREAM - units * bits)) < units * SAMPLES


def test_float_streams_keep_two_states_for_a_checkpointed_unit():
    def held(mix):
        model, x = mixed(FLOAT, mix), torch.randn(LARGE, requires_grad=True)
        return saved_bytes(lambda: model(x))

    assert abs(held("rrrcr") - held("rrrrr") - 2 * STREAM) < 2048
    assert abs(held("rrccr") - held("rrrrr") - 3 * STREAM) < 2048


# -- what need not be rebuilt ------------------------------------------------------------------------------------------


@each_fast_case
def test_a_recompute_stops_when_its_gradient_has_all_that_it_needs(case, monkeypatch):
    model = mixed(case, "rrcrrr")
    runs, x = counted_runs(model, monkeypatch), torch.randn(LARGE, requires_grad=True)
    got = gradients(model, x)
    assert [runs.count(i) for i in range(6)] == ([2, 2, 1, 2, 2, 2] if case.exact else [2] * 6)
    if case.exact:
        with stored(model):
            assert same(got, gradients(model, x))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_frozen_weights_need_less_and_stop_earlier(case, monkeypatch):
    model = mixed(case, "rcrr")
    for branch in model.branches:
        branch.up.requires_grad_(False), branch.down.requires_grad_(False)
    runs, x = counted_runs(model, monkeypatch), torch.randn(LARGE, requires_grad=True)
    parameters = [x, *(p for p in model.parameters() if p.requires_grad)]
    got = torch.autograd.grad(model(x).square().sum(), parameters)
    assert [runs.count(i) for i in range(4)] == [2, 1, 2, 2]
    with stored(model):
        assert same(got, torch.autograd.grad(model(x).square().sum(), parameters))


class Desperate(PreNorm):
    """A branch that tries again, whatever happens."""

    def forward(self, x):
        try:
            return super().forward(x)
        except:  # noqa: E722 (that is the point)
            return super().forward(x)


@torch.jit.script
def swish(x):
    return x * torch.sigmoid(x)


class Scripted(PreNorm):
    """A branch that ends in a scripted function, which makes another exception of every one."""

    def forward(self, x):
        return swish(super().forward(x))


class Scaled(PreNorm):
    """A branch that depends on a number, a change of which nothing shows but its values."""

    scale = Setting(1.0)

    def forward(self, x):
        return self.down(torch.nn.functional.gelu(self.up(self.norm(x) * self.scale)))


@pytest.mark.parametrize("kind", [Guarded, Desperate, Scripted])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_branch_that_handles_errors_may_be_stopped(case, kind):
    model = mixed(case, "rcrrcr", kind)
    x = torch.randn(LARGE, requires_grad=True)
    for _ in range(3):  # a scripted function is optimised meanwhile, and saves other tensors then
        swish(x).sum().backward()
    got = gradients(model, x)
    with stored(model):
        assert same(got, gradients(model, x))


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_hooks_come_in_pairs(case):
    model, stack = mixed(case, "rccr"), []
    for branch in model.branches:
        branch.down.register_forward_pre_hook(lambda *_: stack.append(1))
        branch.down.register_forward_hook(lambda *_: stack.pop() and None)
    gradients(model, torch.randn(LARGE, requires_grad=True))
    assert stack == []


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_it_can_be_forbidden_as_for_checkpointing(case, monkeypatch):
    model = mixed(case, "rccr")
    runs, x = counted_runs(model, monkeypatch), torch.randn(LARGE, requires_grad=True)
    with set_checkpoint_early_stop(False):
        loss = model(x).square().sum()
    loss.backward()
    assert [runs.count(i) for i in range(4)] == [2] * 4


class Private(PreNorm):
    """A branch that ends in what a generator decides that nobody can replay; ``how`` says in which way."""

    how = "mask"

    def forward(self, x):
        y = super().forward(x)
        if self.how == "mask":
            return y * (torch.rand(y.shape, generator=restless()) < 0.5)
        if self.how == "number":
            return y * torch.rand((), generator=restless())
        if self.how == "permutation":
            return y.gather(0, torch.argsort(torch.rand(y.shape, generator=restless()), 0))
        if self.how == "where":
            return torch.where(torch.rand(y.shape, generator=restless()) < 0.5, y, x)
        return y[torch.randperm(len(y), generator=restless())]


@pytest.mark.parametrize("how", ["mask", "number", "permutation", "where", "index"])
@pytest.mark.parametrize("mix", ["rrcr", "rrrr", "cccc"])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_what_a_generator_decides_that_begins_elsewhere_is_not_forgotten(case, mix, how):
    model, x = mixed(case, mix, Private), torch.randn(LARGE, requires_grad=True)
    for branch in model.branches:
        branch.how = how
    with pytest.raises(ReconstructionError, match=r"its branch computed other values|its rebuilt input differs"):
        model(x).square().sum().backward()


class Buffered(PreNorm):
    """A branch that ends in a factor, a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_buffer_that_was_written_to_is_an_error(case):
    model, x = mixed(case, "rccr", Buffered), torch.randn(LARGE, requires_grad=True)
    got = gradients(model, x)
    with stored(model):
        assert same(got, gradients(model, x))
    loss = model(x).square().sum()
    model.branches[1].factor.mul_(3)
    with pytest.raises(ReconstructionError, match=r"branches.1 .* was modified in place"):
        loss.backward()


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_buffer_that_was_exchanged_is_an_error(case):
    model, x = mixed(case, "rccr", Buffered), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[1].factor = torch.full((WIDTH,), 0.7)
    with pytest.raises(ReconstructionError, match=r"branches.1 .*its branch computed other values"):
        loss.backward()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_running_statistics_do_not_keep_a_recompute_from_stopping(case, mode):
    """A forward changes them; its recompute finds others."""
    model = mixed(case, "rccr", KINDS["convolution"])
    x = torch.randn(KINDS["convolution"].shape, requires_grad=True)
    for _ in range(3):
        gradients(model.train(mode == "train"), x)
    assert model.chain.run_whole == set()


class Statistics(torch.nn.BatchNorm2d):
    """A normalisation that goes on to use its running statistics."""

    def forward(self, x):
        return super().forward(x) + x * self.running_var[:, None, None]


class Statistical(KINDS["convolution"]):
    def __init__(self):
        super().__init__()
        self.norm = Statistics(WIDTH)

    def forward(self, x):
        return self.norm(self.convolution(x))


@pytest.mark.parametrize("mix", ["rcrr", "rprr", "rccp"])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_running_statistics_are_those_of_the_forward(case, mix):
    kinds = {"r": KINDS["convolution"], "c": Statistical, "p": Statistical}
    torch.manual_seed(0)
    model = Toy([kinds[letter]() for letter in mix], case)
    model.chain.modes = modes_of(mix)
    x = torch.randn(Statistical.shape, requires_grad=True)
    twin = copy.deepcopy(model)
    for _ in range(2):
        rebuilt = gradients(model, x)
        with stored(twin):
            assert same(rebuilt, gradients(twin, x))
    assert same(model.buffers(), twin.buffers())
    assert model.chain.run_whole == set()


@pytest.mark.parametrize("unit", [0, 2], ids=["first", "checkpointed"])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_recompute_that_stops_and_computes_other_values_is_an_error(case, unit):
    model, x = mixed(case, "rrcr", Scaled), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    model.branches[unit].scale = 1.001
    with pytest.raises(ReconstructionError, match=rf"branches.{unit} .*its branch computed other values"):
        loss.backward()


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_kept_state_that_is_written_to_is_an_error(case):
    model, x = mixed(case, "rrcr"), torch.randn(LARGE, requires_grad=True)
    loss = model(x).square().sum()
    kept = [r.before for r in records_of(loss) if r.before is not None]
    assert len(kept) == 1
    kept[0].state.add_(1)
    with pytest.raises(ReconstructionError, match="a stream that was written in place"):
        loss.backward()


@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_a_chain_that_is_stored_as_a_whole_holds_no_streams(case):
    model, x = mixed(case, "ssss"), torch.randn(LARGE, requires_grad=True)
    with stored(model):
        autograd = saved_bytes(lambda: model(x))
    assert (
        abs(saved_bytes(lambda: model(x)) - autograd + 2 * STREAM) < 2048
    )  # there, the last two states live on with the graph


@each_fast_case
def test_a_state_before_a_stored_run_that_is_written_to_is_an_error(case):
    model, x = mixed(case, "rrs"), torch.randn(LARGE, requires_grad=True)
    h, seen = x, []
    for unit, branch in zip(model.units[:2], model.branches[:2], strict=True):
        h, _ = runner.apply(model.chain, unit, branch, h)
        seen.append(h._revwire_link.tape)
    state = seen[-1].state[0]
    out, _ = runner.apply(model.chain, model.units[2], model.branches[2], h)
    with torch.no_grad():
        state.add_(1)
    with pytest.raises((ReconstructionError, RuntimeError), match=r"written in place|modified by an inplace operation"):
        out.sum().backward()


# -- what a stopped recompute compares ---------------------------------------------------------------------------------


class Cell(PreNorm):
    """A fused cell, which saves views of memory that it goes on to write to."""

    def __init__(self):
        super().__init__()
        self.cell = torch.nn.LSTMCell(WIDTH, WIDTH)

    def forward(self, x):
        return self.down(self.up(self.cell(x.flatten(0, 1))[0])).view_as(x)


class Chunks(PreNorm):
    """The parts of one tensor, each written to in place."""

    def forward(self, x):
        a, b = self.up(x).unsafe_chunk(2, -1)
        a.sigmoid_(), b.tanh_()
        return a * b


class Leaky(PreNorm):
    """A kernel that saves scratch space, which it fills in training only."""

    def forward(self, x):
        return self.down(torch.nn.functional.rrelu(self.up(x), training=self.training))


@pytest.mark.parametrize("kind", [Cell, Chunks, Leaky])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_what_a_kernel_leaves_in_memory_is_no_fault(case, kind, train):
    model, x = mixed(case, "rccr", kind).train(train), torch.randn(PreNorm.shape, requires_grad=True)
    names = {Cell: ("cell", "up", "down"), Chunks: ("up",), Leaky: ("up", "down")}[kind]
    used = [x, *(p for n, p in model.named_parameters() if n.split(".")[2] in names)]
    for _ in range(3):
        torch.manual_seed(3)
        got = torch.autograd.grad(model(x).square().sum(), used)
        torch.manual_seed(3)
        with stored(model):
            assert same(got, torch.autograd.grad(model(x).square().sum(), used))


class Constant(PreNorm):
    """A branch that ends in a factor which is no buffer."""

    def __init__(self):
        super().__init__()
        self.factor = torch.full(LARGE, 0.5)
        self.register_buffer("last", torch.full((WIDTH,), 0.5))

    def forward(self, x):
        return super().forward(x) * self.factor * self.last


def exchange(branch):
    branch.down.weight.data = branch.down.weight.data * 2


def write_unseen(branch):
    branch.down.weight.data.mul_(2)


def replace(branch):
    branch.down.weight = torch.nn.Parameter(branch.down.weight.detach() * 2)


def write_buffer_unseen(branch):
    branch.last.data.mul_(2)


def write_one_number(branch):
    branch.factor[0, 0, 1] = 50


@pytest.mark.parametrize("change", [exchange, write_unseen, replace, write_buffer_unseen, write_one_number])
@pytest.mark.parametrize("case", [c for c in FAST if c.exact], ids=str)
def test_whatever_was_exchanged_or_written_to_is_an_error(case, change):
    model, x = mixed(case, "rccr", Constant), torch.randn(LARGE, requires_grad=True)
    weights = [x, *model.parameters()]
    loss = model(x).square().sum()
    change(model.branches[2])
    with pytest.raises(ReconstructionError, match=r"branches.2 "):
        torch.autograd.grad(loss, weights)
