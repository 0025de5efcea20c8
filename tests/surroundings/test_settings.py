"""What a caller, or a host, sets around a forward and takes back before backward: settings of PyTorch, and context
variables. A recompute finds what its forward found, and puts back what it finds itself.
"""

import gc
import threading
from contextlib import contextmanager
from contextvars import Context, ContextVar
from functools import partial
from weakref import ref

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import revwire
from revwire._runtime.autograd_graph import nodes_behind
from revwire._surroundings.settings import settings_now
from steps import same
from toys import X


@contextmanager
def assigned(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def called(read, write, value):
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


backends = torch.backends
KINDS = {
    "default dtype": (
        partial(called, torch.get_default_dtype, torch.set_default_dtype, torch.float64),
        torch.get_default_dtype,
    ),
    "default device": (partial(torch.device, "meta"), lambda: torch.empty(0).device.type),
    "chosen default device": (
        partial(called, lambda: None, torch.set_default_device, "meta"),
        lambda: torch.empty(0).device.type,
    ),
    "attention": (partial(sdpa_kernel, SDPBackend.MATH), backends.cuda.flash_sdp_enabled),
    "order of attention": (
        partial(sdpa_kernel, [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True),
        torch._C._get_sdp_priority_order,
    ),
    "cudnn": (partial(assigned, backends.cudnn, "enabled", False), lambda: backends.cudnn.enabled),
    "cudnn's benchmark": (partial(assigned, backends.cudnn, "benchmark", True), lambda: backends.cudnn.benchmark),
    "cudnn's determinism": (
        partial(assigned, backends.cudnn, "deterministic", True),
        lambda: backends.cudnn.deterministic,
    ),
    "onednn": (partial(assigned, backends.mkldnn, "enabled", False), lambda: backends.mkldnn.enabled),
    "precision": (
        partial(assigned, backends.mkldnn.matmul, "fp32_precision", "bf16"),
        lambda: backends.mkldnn.matmul.fp32_precision,
    ),
    "precision of all": (
        partial(assigned, backends, "fp32_precision", "tf32"),
        lambda: backends.mkldnn.conv.fp32_precision,
    ),
    "determinism": (
        partial(called, torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode, "warn"),
        torch.are_deterministic_algorithms_enabled,
    ),
}


class Reader(nn.Module):
    """Computes by what ``read`` gives."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.linear = nn.Linear(8, 8, dtype=torch.float64)

    def forward(self, x):
        return torch.tanh(self.linear(x)) * (1 + len(str(self.read())) / 7)


class Block(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.reader = Reader(read)

    def forward(self, x):
        return x + self.reader(x)


class Model(nn.Module):
    """Blocks, ``around`` those at some places."""

    def __init__(self, read, around, places):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(read) for _ in range(4))
        self.around, self.places = around, places

    def forward(self, x):
        for place, block in enumerate(self.blocks):
            if place in self.places:
                with self.around():
                    x = block(x)
            else:
                x = block(x)
        return x


def gradients(model, run=lambda backward: backward()):
    model.zero_grad(set_to_none=True)
    x = X.clone().requires_grad_()
    loss = model(x).square().sum()
    run(loss.backward)
    return [x.grad, *(p.grad for p in model.parameters())]


def tape_of(out):
    """The tape behind an output; that of the last unit, which keeps its activations, is none."""
    return next(tape for node in nodes_behind(out) if (tape := getattr(node, "tape", None)))


def in_a_thread(backward):
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("options", [{}, {"include": ["blocks.0", "blocks.1"], "checkpoint": ["blocks.2", "blocks.3"]}])
@pytest.mark.parametrize("places", [range(4), {2}], ids=["around-all", "around-one"])
@pytest.mark.parametrize(("around", "read"), KINDS.values(), ids=KINDS)
def test_a_recompute_finds_the_settings_of_its_forward(around, read, places, options):
    model = Model(read, around, places)
    outside = read()
    with around():
        assert str(read()) != str(outside)  # else this would see nothing
    revwire.convert(model, X, **options)
    with revwire.stored_activations(model):
        true = gradients(model)
    before = settings_now().values
    assert same(gradients(model), true)
    assert settings_now().values == before
    assert read() == outside


@pytest.mark.parametrize(("around", "read"), KINDS.values(), ids=KINDS)
def test_it_finds_them_too_where_only_backward_has_others(around, read):
    model = revwire.convert(Model(read, around, ()), X)
    with revwire.stored_activations(model):
        true = gradients(model)

    def run(backward):
        with around():
            before = read()
            backward()
            assert read() == before

    assert same(gradients(model, run), true)


def test_settings_come_back_after_a_recompute_that_fails():
    around, read = KINDS["cudnn's benchmark"]
    model = revwire.convert(Model(read, around, range(4)), X)
    loss = model(X).sum()
    with torch.no_grad():
        model.blocks[0].reader.linear.weight.zero_()
    before = settings_now()
    with pytest.raises(revwire.ReconstructionError):
        loss.backward()
    assert settings_now().values == before.values


def test_units_share_one_object_while_nothing_changes():
    assert settings_now() is settings_now()
    out = revwire.convert(Model(int, None, ()), X)(X.clone().requires_grad_())
    records = [r for r in tape_of(out).records if r is not None]
    assert len(records) > 1
    assert len({id(r.surroundings.settings) for r in records}) == 1


# -- context variables -------------------------------------------------------------------------------------------------

VARIABLE = ContextVar("variable", default="")


@contextmanager
def in_force(value):
    token = VARIABLE.set(value)
    try:
        yield
    finally:
        VARIABLE.reset(token)


@pytest.mark.parametrize("options", [{}, {"include": ["blocks.0", "blocks.1"], "checkpoint": ["blocks.2", "blocks.3"]}])
@pytest.mark.parametrize(
    "run", [lambda backward: backward(), in_a_thread, Context().run], ids=["same", "thread", "other"]
)
@pytest.mark.parametrize("places", [range(4), {2}, ()], ids=["around-all", "around-one", "none"])
def test_a_recompute_finds_the_context_of_its_forward(places, run, options):
    model = revwire.convert(Model(VARIABLE.get, partial(in_force, "abc"), places), X, **options)
    with revwire.stored_activations(model):
        true = gradients(model)
    assert same(gradients(model, run), true)
    assert same(gradients(model, lambda backward: in_force("set in backward only")(run)(backward)), true)


class Collecting(Reader):
    """Adds its output to a list in a context variable, as auxiliary losses are."""

    def forward(self, x):
        VARIABLE.get().append(out := super().forward(x))
        return out


def collecting():
    model = Model(int, None, ())
    for block in model.blocks:
        block.reader = Collecting(int)
    return revwire.convert(model, X)


def test_a_recompute_collects_nothing_a_second_time():
    with in_force([]):
        model = collecting()
        VARIABLE.get().clear()
        model(X).sum().backward()
        assert len(VARIABLE.get()) == 4


def test_what_a_branch_reads_there_is_as_its_forward_found_it():
    found = {"scale": 2}
    with in_force(found):
        model = revwire.convert(Model(lambda: "x" * VARIABLE.get()["scale"], None, ()), X)
        with revwire.stored_activations(model):
            true = gradients(model)
        assert same(gradients(model, lambda backward: (found.update(scale=5), backward())), true)
    assert found == {"scale": 5}


def test_tensors_in_a_context_keep_no_graph_alive():
    with in_force([]):
        model = collecting()
        tape = ref(tape_of(model(X)))
    gc.collect()
    assert tape() is None


def test_a_tensor_with_a_gradient_may_come_through_a_context():
    class Scaled(Reader):
        def forward(self, x):
            return super().forward(x) * VARIABLE.get()[0]

    class Scaling(Model):
        def __init__(self):
            super().__init__(int, None, ())
            self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
            for block in self.blocks:
                block.reader = Scaled(int)

        def forward(self, x):
            with in_force((self.scale.exp(), "a scale")):
                return super().forward(x)

    model = revwire.convert(Scaling(), X)
    with revwire.stored_activations(model):
        true = gradients(model)
    assert same(gradients(model), true)
    assert model.scale.grad is not None
