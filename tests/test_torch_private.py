"""Canaries: each private name of PyTorch that revwire uses still does what we rely on; see Note [Private names] in
`revwire/_torch.py`. A canary that dies says what PyTorch changed, and which feature that breaks.
"""

import ast
import importlib.util
import sys
import types
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.autograd import profiler
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import revwire
from revwire import _torch
from steps import assert_same_step, twin
from toys import X, pre_norm, stack

REVWIRE = Path(revwire.__file__).parent

CANARIES = {}


def canary(*names, breaks):
    """The experiment below is about these names of `_torch`, or of PyTorch; if it fails, that breaks a feature."""

    def enter(experiment):
        CANARIES.update(dict.fromkeys(names, (experiment, breaks)))
        return experiment

    return enter


def leaf(*shape):
    torch.manual_seed(0)
    return torch.randn(*(shape or (2, 3)), requires_grad=True)


class Seen(_torch.TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, _, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    """Sees calls, and does nothing."""

    def __torch_function__(self, func, _, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def operators(run):
    with Seen() as seen:
        run()
    return seen.operators


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.note = "kept"
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


# -- autograd ----------------------------------------------------------------------------------------------------------


def same(t):
    return t


def in_backward(look, **options):
    """What ``look`` gives in a backward pass, at each of two operations."""
    seen, x = [], leaf()
    y = 2 * x
    for t in (x, y):
        t.register_hook(lambda _: seen.append(look()))
    y.sum().backward(**options)
    return seen


@canary("current_graph_task_id", breaks="the backward pass of reversible units: a second pass would go on in the first")
def one_number_for_each_backward_pass():
    first, second = in_backward(_torch.current_graph_task_id), in_backward(_torch.current_graph_task_id)
    assert first[0] == first[1] >= 0, f"one pass has the numbers {first}"
    assert second[0] == second[1] not in (first[0], -1), f"passes with the numbers {first} and {second}"
    assert _torch.current_graph_task_id() == -1, "outside of a backward pass it is not -1"


@canary("current_graph_task_keeps_graph", breaks="retain_graph: a second backward pass would find no states")
def retain_graph_is_seen():
    assert in_backward(_torch.current_graph_task_keeps_graph, retain_graph=True) == [True, True]
    assert in_backward(_torch.current_graph_task_keeps_graph) == [False, False]


@canary("profiler_enabled", breaks="a conversion inside of a profiler would end the caller's session")
def a_session_of_the_profiler_is_seen():
    assert _torch.profiler_enabled() is False
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert _torch.profiler_enabled() is True


@canary("queue_callback", breaks="the end of a backward pass: states would stay alive, deferred checks unread")
def callbacks_run_at_the_end_of_a_pass():
    x, order = leaf(), []
    y = 2 * x
    y.register_hook(lambda _: _torch.queue_callback(lambda: order.append("end")))
    x.register_hook(lambda _: order.append("last gradient"))
    y.sum().backward()
    assert order == ["last gradient", "end"]

    def fails():
        raise ValueError("of a callback")

    y = 2 * x
    y.register_hook(lambda _: _torch.queue_callback(fails))
    with pytest.raises(ValueError, match="of a callback"):
        y.sum().backward()


@canary("set_grad_enabled", breaks="recomputes, which run under no_grad and need a graph")
def grad_mode_is_set():
    with torch.no_grad():
        _torch.set_grad_enabled(True)
        assert torch.is_grad_enabled()
    _torch.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        _torch.set_grad_enabled(True)


@canary("top_saved_tensors_hooks", breaks="the last unit under saved-tensor hooks, which keep less than it would")
def saved_tensor_hooks_are_seen():
    def back(t):
        return t

    assert _torch.top_saved_tensors_hooks(False) is None
    with saved_tensors_hooks(same, back):
        assert tuple(_torch.top_saved_tensors_hooks(False)) == (same, back)
    assert _torch.top_saved_tensors_hooks(False) is None


@canary("inside_checkpoint", breaks="the refusal of checkpointing under functional_call")
def hooks_of_checkpointing_are_known():
    inside = []
    y = checkpoint(lambda x: inside.append(_torch.inside_checkpoint()) or x.exp(), leaf(), use_reentrant=False)
    assert inside == [True], "checkpointing is not known by its hooks"
    y.sum().backward()
    assert inside == [True, True], "its recompute is not known by its hooks"
    with saved_tensors_hooks(same, same):
        assert not _torch.inside_checkpoint()


@canary("push_saved_tensors_hooks", breaks="hosts whose own code is followed: what branches save would be kept")
@canary("pop_saved_tensors_hooks", breaks="hosts whose own code is followed: their hooks would stay for good")
def hooks_on_saved_tensors_are_put_on_and_taken_off():
    x, seen = leaf(), []
    _torch.push_saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t)
    try:
        y = x.exp()
    finally:
        _torch.pop_saved_tensors_hooks()
    assert len(seen) == 1
    x.exp()
    assert len(seen) == 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, x.detach().exp())


class Hearing(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


@canary("push_function_mode", breaks="hosts whose own code is followed: none of their calls would be seen")
@canary("pop_function_mode", breaks="modules that such code calls: what they do inside would be followed, too")
@canary("function_modes", breaks="modules that such code calls, inside of other function modes")
@canary("function_mode", breaks="modules that such code calls, inside of other function modes")
def function_modes_are_a_stack():
    mode, before, x = Hearing(), _torch.function_modes(), leaf()
    _torch.push_function_mode(mode)
    try:
        torch.exp(x)
        assert _torch.function_modes() == before + 1
        assert _torch.function_mode(before) is mode
    finally:
        assert _torch.pop_function_mode() is mode
    torch.exp(x)
    assert len(mode.heard) == 1


@canary("CALL", "_call_impl", breaks="modules that a followed host calls: they would not be known, and be followed")
@canary("COMPILED_CALL", breaks="modules that a followed host calls, and that are compiled")
def calls_of_a_module_are_found_on_the_instance():
    module, calls = nn.Linear(3, 3), []

    def call(*args):
        calls.append(args)
        return type(module)._call_impl(module, *args)

    vars(module)[_torch.CALL] = call
    x = leaf()
    y = module(x)
    assert [a is x for (a,) in calls] == [True]
    vars(module)[_torch.COMPILED_CALL] = lambda *args: "compiled"
    assert module(x) == "compiled"
    assert y.shape == x.shape


@canary("checkpoint nodes", breaks="the refusal of checkpointing, reentrant, under functional_call")
def nodes_of_reentrant_checkpointing_are_known_by_name():
    assert "checkpoint" in checkpoint(torch.exp, leaf(), use_reentrant=True).grad_fn.name().lower()


@canary("checkpoint_stops_early", breaks="set_checkpoint_early_stop(False) around a model: units would stop early")
def early_stop_is_seen():
    assert _torch.checkpoint_stops_early()
    with set_checkpoint_early_stop(False):
        assert not _torch.checkpoint_stops_early()
    assert _torch.checkpoint_stops_early()


@canary("backward_node", "_backward_cls", breaks="the warning of a tensor that something between two units made")
def nodes_of_functions_are_told_by_class():
    node = Doubled.apply(leaf()).grad_fn
    assert isinstance(node, _torch.backward_node(Doubled))
    assert node.note == "kept", "a node does not show what its function's forward put on the context"
    assert not isinstance(leaf().exp().grad_fn, _torch.backward_node(Doubled))


@canary("output_nr", "variable", breaks="chains behind identities, and graphs that are searched for a leaf")
def edges_of_the_graph_are_seen():
    x = leaf()
    first, second = x.unbind(0)
    assert (first.grad_fn, first.output_nr, second.output_nr) == (second.grad_fn, 0, 1)
    assert first.grad_fn.next_functions[0][0].variable is x


@canary("BackwardCFunction", breaks="captures: results of custom functions would pass for those of PyTorch")
def nodes_of_custom_functions_are_of_one_class():
    kind = torch.autograd.function.BackwardCFunction
    assert isinstance(Doubled.apply(leaf()).grad_fn, kind)
    assert not isinstance(leaf().exp().grad_fn, kind)


def assert_is_identity(y, x, node):
    """That ``y`` came out of an identity function with this node, which was given ``x``."""
    assert isinstance(y.grad_fn, node), f"the identity's node is a {type(y.grad_fn).__name__}"
    assert y.grad_fn.next_functions[y.output_nr] == (x.grad_fn, x.output_nr), "it does not lead to what it was given"
    assert y._base is x, "what comes out is no view of what went in"


@canary("HOOKED_NODE", breaks="full backward hooks on blocks: a chain would begin anew at each, under one warning")
def full_backward_hooks_put_an_identity_before_and_after_a_module():
    class Host(nn.Module):
        def forward(self, x):
            self.seen = x
            return x

    host, x = Host(), leaf().exp()
    host.register_full_backward_hook(lambda *_: None)
    y = host(x)
    assert_is_identity(host.seen, x, _torch.HOOKED_NODE)
    assert isinstance(y.grad_fn, _torch.HOOKED_NODE)


@pytest.fixture
def process_group():
    """A group of this process alone, in which a module may be sharded."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@canary("identity_nodes", breaks="FSDP2 on blocks: a chain would refuse to go on behind them")
def fsdp_hands_a_module_its_input_through_an_identity(mesh):
    class Host(nn.Linear):
        def forward(self, x):
            self.seen = x
            return super().forward(x)

    host, x = fully_shard(Host(3, 3), mesh=mesh), leaf().exp()
    host(x)
    hooked, fsdp = _torch.identity_nodes()
    assert hooked is _torch.HOOKED_NODE
    assert_is_identity(host.seen, x, fsdp)


@canary("FSDPModule", breaks="the refusal of an FSDP2 whose identity is not known, and of sharded models in convert()")
def modules_that_fsdp_shards_get_classes_of_their_own(mesh):
    class Host(nn.Linear):
        pass

    kind = type(fully_shard(Host(3, 3), mesh=mesh))
    assert kind in FSDPModule.__subclasses__()
    assert issubclass(kind, Host)


@canary("saves_result", "_saved_result", breaks="sums in place where a ReLU needs its result: backward would refuse")
def operations_that_save_their_results_are_known():
    x = leaf()
    saving = {f: f(x) for f in (torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.square)}
    assert {f.__name__ for f, y in saving.items() if _torch.saves_result(y.grad_fn)} == {
        "relu",
        "sigmoid",
        "tanh",
        "exp",
        "sqrt",
    }
    assert _torch.saves_result(x.softmax(-1).grad_fn)
    assert not _torch.saves_result(nn.functional.layer_norm(x, (3,)).grad_fn)
    assert not _torch.saves_result((x + x).grad_fn)


# -- modules -----------------------------------------------------------------------------------------------------------


@canary("HOOKS", "hooks_of", breaks="hooks on modules: they would not run, or blocks be taken apart")
def hooks_on_a_module_are_seen():
    for kind in ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"):
        module = nn.Identity()
        assert not any(_torch.hooks_of(module))
        handle = getattr(module, f"register_{kind}")(lambda *_: None)
        assert any(_torch.hooks_of(module)[: len(_torch.HOOKS)]), kind
        handle.remove()
        assert not any(_torch.hooks_of(module))
    module.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True)
    module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
    assert all(_torch.hooks_of(module)[len(_torch.HOOKS) :])


@canary(
    "HOOKS_OF_ALL",
    "hooks_on_all_modules",
    breaks="hooks on all modules: blocks would be taken apart, and hooks not run",
)
def hooks_on_all_modules_are_seen():
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        assert not _torch.hooks_on_all_modules()
        handle = register(lambda *_: None)
        try:
            assert _torch.hooks_on_all_modules()
            assert sum(map(len, _torch.HOOKS_OF_ALL)) == 1
        finally:
            handle.remove()
    assert not _torch.hooks_on_all_modules()


@canary("has_old_backward_hooks", breaks="the refusal of register_backward_hook: it would see another gradient")
def old_backward_hooks_are_told_from_full_ones():
    module, full = nn.Identity(), nn.Identity()
    module.register_backward_hook(lambda *_: None)
    full.register_full_backward_hook(lambda *_: None)
    assert _torch.has_old_backward_hooks(module)
    assert not _torch.has_old_backward_hooks(full)
    kind = nn.modules.module._global_is_full_backward_hook  # PyTorch remembers it for good
    try:
        for register, old in (("register_module_backward_hook", True), ("register_module_full_backward_hook", False)):
            nn.modules.module._global_is_full_backward_hook = None
            handle = getattr(nn.modules.module, register)(lambda *_: None)
            try:
                assert _torch.has_old_backward_hooks(nn.Identity()) is old
            finally:
                handle.remove()
    finally:
        nn.modules.module._global_is_full_backward_hook = kind


@canary("full_backward_hook_tables", breaks="captures of modules with full backward hooks, which must not run")
def full_backward_hooks_may_be_left_out():
    module, x = nn.Identity(), leaf()
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert module(x) is not x
    vars(module).update({name: OrderedDict() for name in _torch.full_backward_hook_tables(module)})
    assert module(x) is x
    old = nn.Identity()
    old.register_backward_hook(lambda *_: None)
    assert _torch.full_backward_hook_tables(old) == ("_backward_pre_hooks",)


@canary("REPLICATE", "replicate", breaks="nn.DataParallel: replicas would run on the weights of the first device")
def data_parallel_asks_the_instance_for_its_copy():
    replication = sys.modules["torch.nn.parallel.replicate"]
    host, asked = nn.Sequential(nn.Linear(3, 3)), []

    def copied():
        asked.append(_torch.replicate(host[0]))
        return asked[-1]

    vars(host[0])[_torch.REPLICATE] = copied
    with pytest.MonkeyPatch.context() as patch:  # there are no two devices
        patch.setattr(replication, "_get_device_index", lambda device, _: device)
        patch.setattr(
            replication, "_broadcast_coalesced_reshape", lambda ts, devices, detach: [[t.clone() for t in ts]] * 2
        )
        replicas = replication.replicate(host, [0, 1])
    assert [r[0] for r in replicas] == asked, "nn.DataParallel does not ask the instance"
    for replica in asked:
        assert type(replica) is nn.Linear
        assert replica.weight is not host[0].weight
        assert vars(replica) is not vars(host[0])


@canary("ModuleWithStatistics", breaks="batch statistics, of which a recompute must find those of the forward")
def modules_with_statistics_have_one_base():
    for kind in (
        *(getattr(nn, f"{norm}Norm{n}d") for norm in ("Batch", "Instance") for n in (1, 2, 3)),
        nn.SyncBatchNorm,
    ):
        module = kind(4, track_running_stats=True)
        assert isinstance(module, _torch.ModuleWithStatistics), kind.__name__
        assert {"running_mean", "running_var"} <= {name for name, _ in module.named_buffers()}
    assert not isinstance(nn.LayerNorm(4), _torch.ModuleWithStatistics)


@canary("_parameters", "_buffers", "_modules", breaks="recomputes: they find and exchange weights and buffers there")
def modules_keep_what_they_own_in_three_tables():
    module = nn.Sequential(nn.BatchNorm1d(3))
    norm = module._modules["0"]
    assert norm is module[0]
    assert norm._parameters["weight"] is norm.weight
    assert norm._buffers["running_mean"] is norm.running_mean
    for table in (norm._parameters, norm._buffers):
        for name in table:
            table[name] = other = nn.Parameter(torch.zeros(3))
            assert getattr(norm, name) is other, f"{name} is not read from its table"


# -- compilers, exporters and transforms -------------------------------------------------------------------------------


@canary("disable_dynamo", "dynamo_is_imported", breaks="torch.compile of converted models: it would trace into a tape")
def compilers_stay_outside():
    seen = []

    @_torch.disable_dynamo
    def outside(x):
        seen.append((torch.compiler.is_compiling(), type(x)))
        return x.cos()

    compiled = torch.compile(lambda x: outside(x.sin()).exp(), backend="eager")
    x = torch.ones(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own imports
        y = compiled(x)
    assert torch.equal(y, x.sin().cos().exp())
    assert seen == [(False, torch.Tensor)]
    assert _torch.dynamo_is_imported(), "a model was compiled, and no torch._dynamo is imported"


@canary("is_compiled", breaks="compiled modules inside of units: chunks of them would break their graphs")
def compiled_modules_are_known():
    module = nn.Linear(3, 3)
    assert not _torch.is_compiled(module)
    assert _torch.is_compiled(torch.compile(module, backend="eager"))
    module.compile(backend="eager")
    assert _torch.is_compiled(module)


@canary("tracing_state", breaks="the refusal of torch.jit.trace, and the export of models converted before")
def jit_traces_are_seen():
    seen = []

    def f(x):
        seen.append(_torch.tracing_state() is not None)
        return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, by a warning that is of another kind in older versions
        torch.jit.trace(f, torch.ones(3), check_trace=False)
    assert seen == [True]
    assert _torch.tracing_state() is None


@canary("functorch_interpreter", breaks="the refusal of torch.func transforms through a chain")
def transforms_are_seen():
    seen = []

    def f(x):
        seen.append(_torch.functorch_interpreter() is not None)
        return x.sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in older versions, of scripts in PyTorch's own imports
        torch.func.grad(f)(torch.ones(3))
        torch.func.vmap(f)(torch.ones(3, 3))
        torch.func.jvp(f, (torch.ones(3),), (torch.ones(3),))
    assert seen == [True] * 3
    assert _torch.functorch_interpreter() is None


@canary("is_fx_symbolic_tracing", breaks="the refusal of torch.fx traces in plan() and convert()")
def fx_traces_are_seen():
    seen = []

    def f(x):
        seen.append(_torch.is_fx_symbolic_tracing())
        return 2 * x

    torch.fx.symbolic_trace(f)
    assert seen == [True]
    assert not _torch.is_fx_symbolic_tracing()


@canary("FakeTensor", "FunctionalTensor", breaks="torch.export of converted models: calls would be new")
def exporters_run_on_known_stand_ins():
    class Host(nn.Module):
        def forward(self, x):
            seen.append(x)
            return 2 * x

    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own imports
        torch.export.export(Host(), (torch.ones(3),), strict=False).run_decompositions()
    assert {type(x) for x in seen} <= {_torch.FakeTensor, _torch.FunctionalTensor, torch.Tensor}
    assert any(isinstance(x, (_torch.FakeTensor, _torch.FunctionalTensor)) for x in seen)


# -- settings ----------------------------------------------------------------------------------------------------------


def others_of(value):
    """Other values that a setting may have."""
    if isinstance(value, bool):
        return [not value]
    return [value[::-1]] if isinstance(value, list) else [v for v in ("ieee", "tf32", "bf16") if v != value][:2]


@canary("SETTINGS", "BENCHMARK", breaks="a choice of kernels around a forward: its recompute would take others")
def a_setting_that_is_written_is_read():
    for read, write in _torch.SETTINGS:
        before = read()
        for value in others_of(before):
            try:
                write(value)
                assert read() == value
            finally:
                write(before)
        assert read() == before
    _torch.SETTINGS[_torch.BENCHMARK][1](not torch.backends.cudnn.benchmark)
    try:
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = False
    with sdpa_kernel([SDPBackend.MATH], set_priority=True):
        math = [read() for read, _ in _torch.SETTINGS]
    assert sum(a != b for a, b in zip(math, [read() for read, _ in _torch.SETTINGS], strict=True)) >= 4


@canary("PRECISIONS", breaks="the precision of float32 around a forward: its recompute would take another")
def precisions_are_read_and_written():
    read, write = _torch.PRECISIONS["mkldnn", "matmul"]
    every, before = _torch.PRECISIONS["generic", "all"], read()
    try:
        for precision in ("bf16", "ieee"):
            write(precision)
            assert torch.backends.mkldnn.matmul.fp32_precision == read() == precision
        write("none")
        every[1]("tf32")
        assert {get() for get, _ in _torch.PRECISIONS.values()} >= {"tf32"} == {read()}, "it follows no other"
    finally:
        every[1]("none")
        write(before)
    assert read() == before


@canary("default_device", breaks="a default device around a forward: its recompute would make tensors elsewhere")
def the_default_device_is_known():
    assert _torch.default_device() is None
    with torch.device("meta"), Functions():
        assert _torch.default_device() == torch.device("meta")
        with torch.device("cpu"):
            assert _torch.default_device() == torch.device("cpu")
    with Functions():
        assert _torch.default_device() is None


# -- operators and memory ----------------------------------------------------------------------------------------------


@canary("TorchDispatchMode", breaks="captures, chunks and selective units, which see what a run calls")
def operators_are_seen_in_forward_and_backward():
    x = leaf()
    found = operators(lambda: torch.nn.functional.relu(x).sum().backward())
    assert torch.ops.aten.relu.default in found
    assert torch.ops.aten.threshold_backward.default in found


@canary("TorchFunctionMode", "no_torch_function", breaks="captures: the recorder's own calls would be events")
def calls_of_python_are_seen_and_may_be_hidden():
    class Calls(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, _, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Calls() as calls:
        torch.exp(x)
        with _torch.no_torch_function():
            torch.cos(x)
            _ = x + x
        torch.sin(x)
    assert calls.seen == [torch.exp, torch.sin]


@canary("no_torch_dispatch", breaks="samples of what a unit saves: selective units would take them for the branch's")
def operators_may_be_hidden():
    x = torch.ones(3)

    def run():
        with _torch.no_torch_dispatch():
            x.cos()
        x.sin()

    assert operators(run) == [torch.ops.aten.sin.default]


@canary("version_shared", breaks="selective units: a write to what they hand out again would not be seen")
def detached_tensors_may_share_their_version():
    shared = []

    class Keeps(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, _, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            with _torch.version_shared():
                shared.append((out, out.detach()))
            return out

    x = torch.ones(3)
    with Keeps():
        y = x.exp()
    out, kept = shared[0]
    assert kept is not out
    assert kept.data_ptr() == y.data_ptr()
    assert not kept.requires_grad
    before = kept._version
    y.add_(1)
    assert kept._version > before, "a write to the tensor is not counted by what was detached from it"


@canary("arguments_of", "_schema", breaks="selective units: writes, and dropout in attention, are read from schemas")
def operators_declare_what_they_take():
    declared = _torch.arguments_of(torch.ops.aten.add_.Tensor)
    assert [a.name for a in declared] == ["self", "other", "alpha"]
    assert declared[0].alias_info.is_write
    assert declared[1].alias_info is None
    assert declared[2].default_value == 1


@canary("storage_id", "_cdata", breaks="captures and selective units: what shares memory is told by it")
def memories_are_told_apart():
    x, y = torch.ones(4), torch.ones(4)
    assert _torch.storage_id(x.untyped_storage()) == _torch.storage_id(x[1:].view(3, 1).untyped_storage())
    assert _torch.storage_id(x.untyped_storage()) != _torch.storage_id(y.untyped_storage())
    empty = torch.empty(0), torch.empty(0)
    assert len({_torch.storage_id(t.untyped_storage()) for t in empty}) == 2


@canary("_version", breaks="every recompute: writes in place to weights, states and saved tensors would not be seen")
def writes_in_place_are_counted():
    x = torch.ones(4)
    view, detached = x[1:], x.detach()
    before = x._version
    x.add_(1)
    view.mul_(2)
    assert x._version == view._version == detached._version == before + 2
    with torch.inference_mode():
        inferred = torch.ones(3)
    with pytest.raises(RuntimeError, match="version"):
        _ = inferred._version


@canary("LOOKS", "_local_scalar_dense", breaks="chunks of branches whose modules decide on values")
def values_are_taken_into_python_by_operators():
    for look in (bool, float, lambda t: t.item(), lambda t: torch.equal(t, t)):
        with Seen() as seen:
            look(torch.ones(()))
        assert not _torch.LOOKS.isdisjoint(seen.operators)


@canary("_base", breaks="saved views of weights, and chains behind identities")
def views_know_their_base():
    x = torch.ones(4)
    assert x._base is None
    assert x[1:]._base is x
    assert x[1:].view(3, 1)._base is x
    assert x.detach()._base is None


@canary("rename_node", "_rename", breaks="models with a submodule named `self`")
def nodes_of_graphs_are_renamed():
    graph = torch.fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    _torch.rename_node(a, "b_")
    _torch.rename_node(b, "b_")
    assert a.name == "b_"
    assert b.name not in ("b", "b_"), "a name was given twice"


Point = namedtuple("Point", "x y")


@canary("TreeSpec", "tree_flatten", "tree_unflatten", "tree_leaves", "tree_map", breaks="arguments in containers")
def nested_arguments_are_walked():
    tree = {"b": [1, (2, None)], "a": Point(3, OrderedDict(c=4))}
    leaves, structure = _torch.tree_flatten(tree)
    assert isinstance(structure, _torch.TreeSpec)
    assert leaves == [1, 2, None, 3, 4] == _torch.tree_leaves(tree), "another order, or other leaves"
    assert _torch.tree_unflatten(leaves, structure) == tree
    mapped = _torch.tree_map(lambda leaf: leaf and -leaf, tree)
    assert mapped == {"b": [-1, (-2, None)], "a": Point(-3, OrderedDict(c=-4))}
    assert type(mapped["a"]) is Point


@canary("StorageWeakRef", breaks="forecasts of memory: what a unit saves, and somebody else frees")
def memory_is_known_to_be_gone():
    x = torch.ones(4)
    reference = StorageWeakRef(x.untyped_storage())
    assert not reference.expired()
    del x
    assert reference.expired()


@canary("begin_memory_trace", "end_of_memory_trace", breaks="bytes on the CPU: profile(), and memory budgets there")
def the_profiler_tells_what_is_allocated_and_freed_and_of_the_rest_what_is_marked():
    _torch.begin_memory_trace()
    with profiler.record_function("a mark"):
        x = torch.empty(1000, dtype=torch.uint8)
        del x
    events = _torch.end_of_memory_trace().events()
    found = [e.nbytes() for e in events if e.name() == "[memory]"]
    assert found == [1000, -1000] or (len(found) == 2 and found[0] == -found[1] >= 1000), f"changes of {found} bytes"
    assert [e.name() for e in events if e.name() != "[memory]"] == ["a mark"]


OPERATORS = {
    "_unsafe_view": lambda: torch.ones(2, 3).t().reshape(-1),
    "_to_copy": lambda: torch.ones(3).double(),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: nn.functional.scaled_dot_product_attention(
        *(leaf(1, 2, 4, 8) for _ in range(3))
    ),
    "_convolution": None,
    "_scaled_dot_product_flash_attention": None,
    "_scaled_dot_product_efficient_attention": None,
    "_scaled_dot_product_cudnn_attention": None,
}
"""Operators whose names begin with an underscore, and a call of each that is made on every machine."""


@canary(*OPERATORS, breaks="the names of convolutions, attention, casts and copies, by which runs are read")
def operators_with_an_underscore_are_called():
    for name, call in OPERATORS.items():
        assert hasattr(torch.ops.aten, name), f"no operator {name}"
        if call is not None:
            assert getattr(torch.ops.aten, name).default in operators(call), f"{name} is no longer what is called"
        if "attention" in name:
            assert "dropout_p" in {a.name for a in _torch.arguments_of(getattr(torch.ops.aten, name).default)}


# -- the canaries sing -------------------------------------------------------------------------------------------------


def sing(name, *given):
    experiment, breaks = CANARIES[name]
    try:
        experiment(*given)
    except Exception as error:
        done = experiment.__name__.replace("_", " ")
        raise AssertionError(
            f"{name}: PyTorch {torch.__version__} no longer does what revwire relies on ({done}); it breaks {breaks}; "
            f"{type(error).__name__}: {error}"
        ) from error


@pytest.mark.parametrize("name", CANARIES)
def test_canary(name, request):
    experiment, _ = CANARIES[name]
    sing(name, *([request.getfixturevalue("process_group")] if experiment.__code__.co_argcount else []))


def test_a_dead_canary_says_what_broke_and_what_that_breaks(monkeypatch):
    monkeypatch.setattr(_torch, "saves_result", lambda node: False)
    with pytest.raises(AssertionError, match=r"saves_result: PyTorch .* no longer does .*; it breaks sums in place"):
        sing("saves_result")


def test_every_name_has_a_canary():
    tree = ast.parse((REVWIRE / "_torch.py").read_text())
    ours = {
        name
        for node in ast.walk(tree)
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef)
            else [node.target.id]
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            else [t.id for t in node.targets if isinstance(t, ast.Name)]
            if isinstance(node, ast.Assign)
            else []
        )
        if getattr(node, "col_offset", 1) == 0 and not name.startswith("_")
    }
    assert len(ours) > 25
    assert not ours - CANARIES.keys(), "names of _torch.py without a canary"


# -- names that are missing --------------------------------------------------------------------------------------------


def anew():
    """`_torch.py` as it would be imported now."""
    spec = importlib.util.spec_from_file_location("revwire._torch_anew", REVWIRE / "_torch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("owner", "theirs", "ours"),
    [
        (torch._C, "_current_graph_task_id", "current_graph_task_id"),
        (torch._C._autograd, "_top_saved_tensors_default_hooks", "top_saved_tensors_hooks"),
        (torch._C._functorch, "peek_interpreter_stack", "functorch_interpreter"),
        (torch._C, "_functorch", "functorch_interpreter"),
        (torch._C, "_SetExcludeDispatchKeyGuard", "version_shared"),
    ],
)
def test_a_feature_whose_name_is_missing_raises_when_it_is_used(owner, theirs, ours, monkeypatch):
    monkeypatch.delattr(owner, theirs)
    found = getattr(anew(), ours)
    with pytest.raises(
        revwire.UnsupportedTorchError,
        match=rf"got PyTorch .* has no torch\._C\..*{theirs}.*; expected it for .*; install",
    ):
        found()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.modules.batchnorm, "_NormBase"),
        (nn.modules.module, "_global_forward_hooks"),
        (torch.fx.Node, "_rename"),
        (torch.utils._pytree, "tree_leaves"),
    ],
)
def test_without_a_name_that_all_stands_on_there_is_no_revwire(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(revwire.UnsupportedTorchError, match=rf"got PyTorch .* which has no .*{name}"):
        anew()


def test_the_compiler_may_be_told_in_another_way(monkeypatch):
    monkeypatch.delattr(torch._compile, "_disable_dynamo")
    assert anew().disable_dynamo is torch.compiler.disable


def test_where_early_stop_cannot_be_seen_nothing_stops_early(monkeypatch):
    monkeypatch.delattr(torch.utils.checkpoint, "_enable_checkpoint_early_stop")
    assert not _torch.checkpoint_stops_early()


@pytest.fixture
def renamed(monkeypatch):
    """FSDP2's identity function, which is no longer found under its name where it was."""
    name = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
    found = dict(vars(sys.modules[name]))
    identity = found.pop("RegisterPostBackwardFunction")
    other = types.ModuleType(name)
    vars(other).update(found)
    monkeypatch.setitem(sys.modules, name, other)
    return identity


def sharded(mesh):
    model = revwire.convert(stack(pre_norm), X)
    for block in (*model.blocks, model):
        fully_shard(block, mesh=mesh)
    return model


UNKNOWN = (
    r"got PyTorch .* has no torch\.distributed\.fsdp.*RegisterPostBackwardFunction; "
    "expected it for chains that go on through modules sharded by FSDP2; install"
)


def test_fsdp_whose_identity_was_renamed_is_refused(process_group, renamed):
    model = sharded(process_group)
    for _ in range(2):  # at each call
        with pytest.raises(revwire.UnsupportedTorchError, match=UNKNOWN):
            model(X)


def test_so_it_is_if_what_it_makes_is_no_view(process_group, renamed, monkeypatch):
    identity = renamed.forward
    monkeypatch.setattr(renamed, "forward", staticmethod(lambda *args: tuple(t.clone() for t in identity(*args))))
    model = sharded(process_group)
    for _ in range(2):
        with pytest.raises(revwire.UnsupportedTorchError, match=UNKNOWN):
            model(X)


def test_fsdp_that_is_known_is_not(process_group):
    sharded(process_group)(X)[0].sum().backward()


def test_without_fsdp_its_identity_is_not_missed(monkeypatch):
    monkeypatch.setattr(_torch, "_FSDP_IDENTITY", "Renamed")
    monkeypatch.setattr(_torch, "_serves", lambda mixin: False)  # other tests of this process may have sharded modules
    assert _torch.identity_nodes() == (_torch.HOOKED_NODE,)
    model, reference = twin(stack(pre_norm))
    for m in (model, reference):
        m.blocks[1].register_full_backward_hook(lambda *_: None)
    assert_same_step(model, reference, X)


def test_fsdp_serves_where_a_module_is_sharded(process_group):
    class Mixin:
        pass

    class Without(Mixin):
        pass

    assert not _torch._serves(Mixin)

    class Sharded(Without, nn.Linear):
        pass

    assert _torch._serves(Mixin)
    fully_shard(nn.Linear(3, 3), mesh=process_group)
    assert _torch._serves(FSDPModule)


# -- nothing private elsewhere -----------------------------------------------------------------------------------------

INLINE = {
    "_version": "read for each tensor of each unit",
    "_base": "read for each tensor of each unit",
    "_parameters": "read for each module of each unit",
    "_buffers": "read for each module of each unit",
    "_modules": "read for each module of each unit",
    **dict.fromkeys(OPERATORS, "an operator, which PyTorch keeps for the sake of exported graphs"),
}
"""Private names of PyTorch that stand elsewhere than in `_torch.py`, and why; see Note [Private names]."""


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def theirs():
    """Private names of what PyTorch gives revwire."""
    x = leaf()
    objects = (
        *(x, x.untyped_storage(), x.exp().grad_fn, Doubled, Doubled.apply(x).grad_fn, nn.BatchNorm1d(3)),
        *(torch.fx.Graph(), torch.fx.Graph().placeholder("x"), torch.ops.aten.add.Tensor, torch.ops.aten),
        *(torch.autograd.Variable, nn.modules.module, nn.modules.batchnorm, torch.utils.checkpoint),
        *(torch, torch._C, torch._C._autograd, torch._C._functorch, torch.overrides, torch.autograd.graph),
    )
    return {name for thing in objects for name in dir(thing) if is_private(name)} | OPERATORS.keys()


def dotted(node):
    """The dotted names that a piece of code spells out."""
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def private_names(tree, known):
    """(line, name) of private names of PyTorch in a file: parts of what begins with ``torch``; and the last part of
    anything else but what is ours by its first part, if it is one that is ``known``.
    """
    for node in ast.walk(tree):
        for name in dotted(node):
            parts = name.split(".")
            sure = parts[0] == "torch"
            for part in parts if sure else parts[-1:]:
                if is_private(part) and (sure or (part in known and parts[0] not in ("self", "cls", "revwire"))):
                    yield node.lineno, part


def uses():
    """(place, name) of each private name of PyTorch that stands elsewhere than in `_torch.py`."""
    known = theirs()
    for path in sorted(REVWIRE.rglob("*.py")):
        if path.name != "_torch.py":
            for line, name in private_names(ast.parse(path.read_text()), known):
                yield f"{path.relative_to(REVWIRE)}:{line}", name


def test_private_names_of_pytorch_stand_in_one_file():
    found = [f"{place}: {name}" for place, name in uses() if name not in INLINE]
    assert not found, "give it a name, and a canary, in revwire/_torch.py:\n" + "\n".join(found)


def test_what_stands_elsewhere_does():
    assert {name for _, name in uses()} == INLINE.keys()
    assert INLINE.keys() <= CANARIES.keys()


@pytest.mark.parametrize(
    "line",
    [
        "from torch._compile import f",
        "import torch._dynamo",
        "from torch.nn.modules.batchnorm import _NormBase",
        "torch._C.f()",
        "storage._cdata",
        "getattr(node, '_saved_result')",
        "sys.modules['torch._dynamo']",
        "registry._global_forward_hooks",
        "module._compiled_call_impl",
        "operator._schema",
        "node._rename('self_')",
    ],
)
def test_private_names_are_found_in_every_spelling(line):
    assert [*private_names(ast.parse(line), theirs())]
