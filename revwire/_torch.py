"""Every private name of PyTorch that revwire uses, each once, under a name of ours.

Note [Private names]
    PyTorch may rename or change what is private without notice. So it stands here, with what it is used for, and has an
    experiment in `tests/test_torch_private.py` that says what PyTorch changed, and which feature that breaks. Where a
    name is missing, what stands on it raises `UnsupportedTorchError`: a single feature when it is used, and ``import
    revwire`` where nothing would work. A name is never passed over in silence.

    Nothing else in revwire uses a private name of PyTorch (a test looks), but for these: ``_version`` and ``_base`` of
    tensors, and ``_parameters``, ``_buffers`` and ``_modules`` of modules, which are read for each tensor and module of
    each unit, where a call more would be felt; and operators of ATen whose names begin with an underscore, which
    PyTorch keeps for the sake of exported graphs. These too have experiments. What is asked in each unit is bound here,
    not wrapped, for the same reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial, reduce
from operator import attrgetter
from typing import Any

import torch
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules import module as registry

from revwire._errors import UnsupportedTorchError


def _unsupported(name: str, use: str) -> UnsupportedTorchError:
    return UnsupportedTorchError(
        f"revwire: got PyTorch {torch.__version__}, which has no {name}; expected it for {use}; install a PyTorch that "
        "this revwire is tested with (2.10 to 2.14), or a newer revwire"
    )


def _bound(name: str, use: str) -> Any:
    """What PyTorch has under a dotted name; where it has none, what raises when it is called."""
    try:
        return reduce(getattr, name.split(".")[1:], torch)
    except AttributeError:

        def missing(*_: Any, **__: Any) -> Any:
            raise _unsupported(name, use)

        return missing


# -- what all stands on ------------------------------------------------------------------------------------------------

try:
    # What `torch.export` runs a model on: to be taken for the tensors that they stand for.
    from torch._subclasses import FakeTensor as FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor as FunctionalTensor

    # The identity through which PyTorch hands inputs to, and outputs of, a module with full backward hooks.
    from torch.nn.modules._functions import BackwardHookFunction

    # What all modules with running statistics have in common.
    from torch.nn.modules.batchnorm import _NormBase

    # The mode of a default device.
    from torch.utils._device import DeviceContext as _DeviceContext

    # Sees the operators that a run calls, below autograd.
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

    # Walks nested arguments in PyTorch's way, which is C++ where it can be.
    from torch.utils._pytree import TreeSpec as TreeSpec
    from torch.utils._pytree import tree_flatten as tree_flatten
    from torch.utils._pytree import tree_leaves as tree_leaves
    from torch.utils._pytree import tree_map as tree_map
    from torch.utils._pytree import tree_unflatten as tree_unflatten
except ImportError as error:
    raise _unsupported(f"{error.name}, or not all of it ({error})", "captures of a model") from error

ModuleWithStatistics = _NormBase

REPLICATE = "_replicate_for_data_parallel"
"""What `nn.DataParallel` calls to copy a module; it finds it on the instance, which may copy more (else replicas would
run on weights of another device, which PyTorch refuses)."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TOLD = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
_OF_ALL = tuple(f"_global{name}" for name in (*HOOKS, *_TOLD[:2]))

_ATTRIBUTES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (nn.Module(), ("_parameters", "_buffers", "_modules", "_is_full_backward_hook", "_compiled_call_impl")),
    (nn.Module(), (*HOOKS, *_TOLD)),
    (registry, (*_OF_ALL, "_global_is_full_backward_hook")),
    (Tensor, ("_version", "_base")),
    (torch.UntypedStorage, ("_cdata",)),
    (torch.autograd.Function, ("_backward_cls",)),
    (torch.ops.aten.add.Tensor, ("_schema",)),
    (torch.fx.Node, ("_rename",)),
)  # attributes that are read as such, here and elsewhere, and what has them

LOOKS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
"""Operators that take values of a tensor into Python."""
for _owner, _names in _ATTRIBUTES:
    for _name in _names:
        if not hasattr(_owner, _name):
            raise _unsupported(f"{_name} on {_owner}", "captures and recomputes of modules")


# -- autograd ----------------------------------------------------------------------------------------------------------

_REBUILT = "the backward pass of reversible and checkpointed units"

current_graph_task_id: Callable[[], int] = _bound("torch._C._current_graph_task_id", _REBUILT)
"""The id of the backward pass that runs on this thread, or -1: each pass rewinds a tape by itself."""

current_graph_task_keeps_graph: Callable[[], bool] = _bound(
    "torch._C._autograd._get_current_graph_task_keep_graph", _REBUILT
)
"""Whether that pass was given ``retain_graph``: then a tape must be left as it is for the next one."""

queue_callback: Callable[[Callable[[], None]], None] = _bound(
    "torch.autograd.Variable._execution_engine.queue_callback", _REBUILT
)
"""Have something called at the end of the backward pass that runs: what it held is freed, deferred checks are read."""

set_grad_enabled: Callable[[bool], None] = _bound("torch._C._set_grad_enabled", _REBUILT)
"""What `torch.set_grad_enabled` does, without its object: a recompute switches twice."""

profiler_enabled: Callable[[], bool] = _bound("torch._C._autograd._profiler_enabled", "forecasts of what a step needs")
"""Whether a profiler's session is on: memory cannot be traced then, as there is one session at a time."""

_TRACES = "bytes on the CPU: profile(), and memory budgets there"

_prepare_profiler: Callable[..., None] = _bound("torch._C._autograd._prepare_profiler", _TRACES)
_enable_profiler: Callable[..., None] = _bound("torch._C._autograd._enable_profiler", _TRACES)
_user_scope: Any = getattr(getattr(torch._C._profiler, "RecordScope", None), "USER_SCOPE", None)

end_of_memory_trace: Callable[[], Any] = _bound("torch._C._autograd._disable_profiler", _TRACES)
"""End the session that `begin_memory_trace` began, and return what it saw."""


def begin_memory_trace() -> None:
    """Begin a profiler's session that sees what the CPU allocator reports, and what `record_function` marks: no
    operators, of which there are many more.
    """
    if _user_scope is None:
        raise _unsupported("torch._C._profiler.RecordScope.USER_SCOPE", _TRACES)
    session: Any = torch.autograd.profiler.profile(profile_memory=True)
    _prepare_profiler(session.config(create_trace_id=True), session.kineto_activities)
    _enable_profiler(session.config(create_trace_id=False), session.kineto_activities, {_user_scope})


top_saved_tensors_hooks: Callable[[bool], tuple[Any, Any] | None] = _bound(
    "torch._C._autograd._top_saved_tensors_default_hooks", "units that see the saved-tensor hooks around them"
)
"""The saved-tensor hooks in force (pack, unpack), if any; False: also where they are being traced."""


def backward_node(function: Any) -> Any:
    """The class of the graph nodes that an `autograd.Function` makes."""
    return function._backward_cls


HOOKED_NODE: Any = backward_node(BackwardHookFunction)
"""The graph node of the identity around a module with full backward hooks."""

_FSDP = "torch.distributed.fsdp"
_FSDP_GROUP, _FSDP_IDENTITY = f"{_FSDP}._fully_shard._fsdp_param_group", "RegisterPostBackwardFunction"


def identity_nodes() -> tuple[Any, ...]:
    """The graph nodes of the identities that PyTorch puts around modules, behind which a chain goes on: for backward
    hooks, and by FSDP2 if it was ever imported.

    Raises:
        UnsupportedTorchError: FSDP2 is in use, and has no such identity: chains would begin anew at each module that it
            shards.
    """
    function = getattr(sys.modules.get(_FSDP_GROUP), _FSDP_IDENTITY, None)
    if function is not None:
        return HOOKED_NODE, backward_node(function)
    fsdp = sys.modules.get(_FSDP)
    if fsdp is not None and _serves(fsdp.FSDPModule):
        raise _unsupported(f"{_FSDP_GROUP}.{_FSDP_IDENTITY}", "chains that go on through modules sharded by FSDP2")
    return (HOOKED_NODE,)


def _serves(mixin: Any) -> bool:
    """Whether there are modules of this class: `fully_shard` gives each one that it shards a class of its own."""
    return any(issubclass(c, nn.Module) or _serves(c) for c in mixin.__subclasses__())


_FOLLOWED, _STACK = "hosts whose own code runs in each call", "saved_tensors_default_hooks"

push_saved_tensors_hooks: Callable[[Any, Any], None] = _bound(f"torch._C._autograd._push_{_STACK}", _FOLLOWED)
pop_saved_tensors_hooks: Callable[[], None] = _bound(f"torch._C._autograd._pop_{_STACK}", _FOLLOWED)
"""What `torch.autograd.graph.saved_tensors_hooks` does, without its object: around each call of a branch."""


def inside_checkpoint() -> bool:
    """Whether the saved-tensor hooks in force are those of non-reentrant activation checkpointing, of whichever
    library, or of its recompute.
    """
    hooks = top_saved_tensors_hooks(False)
    name = "" if hooks is None else getattr(hooks[0], "__qualname__", "")
    return "checkpoint" in name or "recomputation" in name


def checkpoint_stops_early() -> bool:
    """What `torch.utils.checkpoint.set_checkpoint_early_stop` was told; where that cannot be seen, the slow way that is
    always right.
    """
    return getattr(torch.utils.checkpoint, "_enable_checkpoint_early_stop", False) is not False


def saves_result(node: Any) -> bool:
    """Whether a graph node saves its result for its gradient, as a ReLU does. (PyTorch refuses the backward pass where
    one does, and was written to.)
    """
    return hasattr(type(node), "_saved_result")


# -- modules -----------------------------------------------------------------------------------------------------------


hooks_of: Callable[[nn.Module], tuple[dict[int, Any], ...]] = attrgetter(*HOOKS, *_TOLD)
HOOKS_OF_ALL: tuple[dict[int, Any], ...] = attrgetter(*_OF_ALL)(registry)
"""The tables of the hooks that run around the forward of a module, and of all: `HOOKS`, and what they are to be told.
"""


def hooks_on_all_modules() -> bool:
    """Whether hooks run around the forward of every module."""
    return any(HOOKS_OF_ALL[:2])


def has_old_backward_hooks(module: nn.Module) -> bool:
    """Whether `register_backward_hook` was called, of this module or of all: not the full ones."""
    own = module._backward_hooks and not module._is_full_backward_hook
    return bool(own or (registry._global_backward_hooks and not registry._global_is_full_backward_hook))


def full_backward_hook_tables(module: nn.Module) -> tuple[str, ...]:
    """Where a module keeps its full backward hooks."""
    old = module._is_full_backward_hook is False
    return ("_backward_pre_hooks",) if old else ("_backward_hooks", "_backward_pre_hooks")


def replicate(module: nn.Module) -> nn.Module:
    """The copy of a module that `nn.DataParallel` makes, before it gets its weights."""
    replica: nn.Module = getattr(type(module), REPLICATE)(module)
    return replica


CALL = "_call_impl"
"""What `nn.Module.__call__` calls, with all hooks: it finds it on the instance, where it tells who calls a module."""

COMPILED_CALL = "_compiled_call_impl"
"""What it calls instead where the module is compiled."""

push_function_mode: Callable[[Any], None] = _bound("torch._C._push_on_torch_function_stack", _FOLLOWED)
pop_function_mode: Callable[[], Any] = _bound("torch._C._pop_torch_function_stack", _FOLLOWED)
function_modes: Callable[[], int] = _bound("torch._C._len_torch_function_stack", _FOLLOWED)
function_mode: Callable[[int], Any] = _bound("torch._C._get_function_stack_at", _FOLLOWED)
"""The stack of function modes: the one that follows a host's code is taken off while a module that it calls runs; one
stands for the default device.
"""

# -- compilers, exporters and transforms -------------------------------------------------------------------------------

try:
    from torch._compile import _disable_dynamo
except ImportError:
    _disable_dynamo = torch.compiler.disable  # as good, but imports the compiler at once
disable_dynamo = _disable_dynamo
"""Keeps `torch.compile` out of a function, and imports the compiler when it is needed."""

tracing_state: Callable[[], Any] = _bound("torch._C._get_tracing_state", "calls that `torch.jit.trace` might record")
"""None unless `torch.jit.trace` runs."""

functorch_interpreter: Callable[[], Any] = _bound(
    "torch._C._functorch.peek_interpreter_stack", "the refusal of `torch.func` transforms"
)
"""None unless a `torch.func` transform is in force."""

is_fx_symbolic_tracing: Callable[[], bool] = _bound(
    "torch.fx._symbolic_trace.is_fx_symbolic_tracing", "the refusal of `torch.fx` traces"
)
"""Whether `torch.fx.symbolic_trace` runs."""

_DYNAMO = "torch._dynamo"


def dynamo_is_imported() -> bool:
    """Whether the compiler was ever imported; else nothing is compiled."""
    return _DYNAMO in sys.modules


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's code is compiled as a whole, by `nn.Module.compile` or `torch.compile`."""
    return module._compiled_call_impl is not None or type(module).__module__.startswith(_DYNAMO)


# -- settings ----------------------------------------------------------------------------------------------------------

_CHOSEN = "kernels that a recompute chooses as its forward did"

_Setting = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How a setting of the process is read, and written."""


def _setting(read: str, written: str, *args: str) -> _Setting:
    get, set_ = (_bound(f"torch._C.{name}", _CHOSEN) for name in (read, written))
    return (partial(get, *args), partial(set_, *args)) if args else (get, set_)


SETTINGS: tuple[_Setting, ...] = (
    *(
        _setting(f"_get_{kernel}_sdp_enabled", f"_set_sdp_use_{kernel}")
        for kernel in ("flash", "mem_efficient", "math", "cudnn", "overrideable")
    ),
    *(
        _setting(f"_get_{name}", f"_set_{name}")
        for name in (
            "sdp_priority_order",
            "math_sdp_allow_fp16_bf16_reduction",
            "cudnn_enabled",
            "cudnn_benchmark",
            "cudnn_deterministic",
            "mkldnn_enabled",
            "mkldnn_deterministic",
        )
    ),
)
"""What chooses kernels: those of attention and their order, cuDNN's and oneDNN's."""

BENCHMARK = 8
"""The place of `torch.backends.cudnn.benchmark` among them."""

PRECISIONS: dict[tuple[str, str], _Setting] = {
    (backend, operation): _setting("_get_fp32_precision_getter", "_set_fp32_precision_setter", backend, operation)
    for backend, operations in (
        ("generic", ("all",)),
        ("cuda", ("all", "matmul", "conv", "rnn")),
        ("mkldnn", ("all", "matmul", "conv", "rnn")),
    )
    for operation in operations
}
"""The precision of products of float32, by backend and operation: one follows those before it that stand for more,
unless it is told otherwise. (The older names of the same raise where both are in use.)
"""


def default_device() -> torch.device | None:
    """The device that `torch.set_default_device`, or ``with torch.device(...)``, has put in force, each by a mode: the
    uppermost. None: there is none.
    """
    number = function_modes()
    while number:
        number -= 1
        mode = function_mode(number)
        if isinstance(mode, _DeviceContext):
            return mode.device
    return None


# -- operators and memory ----------------------------------------------------------------------------------------------

no_torch_function: Callable[[], AbstractContextManager[Any]] = _bound(
    "torch._C.DisableTorchFunction", "captures of a model"
)
"""A context in which no `TorchFunctionMode` sees a call."""

no_torch_dispatch: Callable[[], AbstractContextManager[Any]] = _bound(
    "torch._C._DisableTorchDispatch", "the comparison of what is rebuilt with what was"
)
"""A context in which no `TorchDispatchMode` sees a call."""

version_shared: Callable[[], AbstractContextManager[Any]] = partial(
    _bound("torch._C._SetExcludeDispatchKeyGuard", "selective units"),
    _bound("torch._C.DispatchKey.ADInplaceOrView", "selective units"),
    False,
)
"""A context in which `Tensor.detach` gives a tensor with the same version counter, also below autograd."""


def arguments_of(operator: Any) -> Any:
    """What an operator is declared to take: names, defaults, whether it writes to them."""
    return operator._schema.arguments


def storage_id(storage: torch.UntypedStorage) -> int:
    """What tells one memory from another, also where both are empty, as an address does not."""
    return int(storage._cdata)


def rename_node(node: torch.fx.Node, name: str) -> None:
    """Give a node of a graph another name, which may be taken: then a number is added."""
    node._rename(name)
