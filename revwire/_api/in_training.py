"""What the callbacks of training frameworks share: convert a network by its first call in training, take up the form
that a checkpoint has, calibrate again as weights move, and tell what it gains. Nothing here knows a framework.

Note [When a callback converts]
    How a network is called is known when it is called: a training step may add arguments to a batch, or run it on parts
    of one. So conversion waits for the first call in train mode with gradients: under the autocast, on the device and
    with the arguments of training. A reference pass without gradients, or an evaluation before training, does not
    count. By then the network may stand inside of DistributedDataParallel, which does not mind: its hooks are on the
    parameters, which stay. What shards parameters (FSDP) does: for that, an example converts it before it is wrapped.
    The processes of a group take the plan of the first, as their first batches differ in length.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from itertools import repeat
from typing import Any

import torch
from torch import nn

from revwire._api.calibrate import calibrate
from revwire._api.config import lost, lost_words
from revwire._api.convert import convert
from revwire._api.of_first import of_first
from revwire._api.plan import plan as planned
from revwire._api.revert import revert
from revwire._capture.arguments import Call, as_call
from revwire._errors import ConversionError, CouplingError, FunctionLostWarning
from revwire._forwards.converted import converted, is_converted
from revwire._forwards.first_call import FirstCall
from revwire._forwards.install import refuse_converted, take_all_off
from revwire._plan.plan import Plan
from revwire._structures import mapped
from revwire.couplings import Coupling, Innovation
from revwire.measure._trace import keeps_peak
from revwire.measure.sizes import MIB

_PLANNED = [name for name in signature(planned).parameters if name not in ("model", "example_inputs")]
_OPTIONS = [*_PLANNED, "plan", "calibrate"]


class InTraining:
    """One network, from the start of training to its end. See Note [When a callback converts].

    Args:
        caller: what errors call the callback.
        options: those of `revwire.convert`, but for ``strict``.
        example_inputs: converts before training, on this example; None: the first call of training does.
        revert_at_end: whether the original wiring is given back.
        recalibrate_every: after so many optimizer steps predictors are fitted to the last call; None: never.

    Raises:
        ConversionError: there is no such option.
    """

    def __init__(
        self,
        caller: str,
        options: Mapping[str, Any],
        example_inputs: Any = None,
        revert_at_end: bool = False,
        recalibrate_every: int | None = None,
    ) -> None:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise ConversionError(f"{caller}: got the option {unknown[0]!r}; expected one of {', '.join(_OPTIONS)}")
        if recalibrate_every is not None and (type(recalibrate_every) is not int or recalibrate_every < 1):
            raise ConversionError(
                f"{caller}: got recalibrate_every={recalibrate_every!r}; expected a number of optimizer steps from 1"
            )
        self.caller, self.options, self.example = caller, dict(options), example_inputs
        self.revert_at_end, self.recalibrate_every = revert_at_end, recalibrate_every
        self.network: nn.Module | None = None
        self.mine = False  # whether the conversion is this one's
        self._hook: Any = None
        self._last: Call | None = None
        self._steps, self._seconds, self._timed = 0, 0.0, 0
        self._since: float | None = None

    def prepare(self, network: nn.Module) -> None:
        """Before anything wraps the network: convert it, if there is an example."""
        if self.example is not None and not is_converted(network):
            self._rewire(network, self._example_for(network))

    def begin(self, network: nn.Module, trained: Plan | None = None) -> None:
        """Training begins.

        Args:
            network: as it is called, inside of what wraps it.
            trained: the form in which a checkpoint's weights were trained, if it goes on from one.

        Warns:
            FunctionLostWarning: the caller has converted it to another form, which loses what was trained.

        Raises:
            ConversionError: it can no longer be converted.
        """
        self.network, self._since = network, None
        if is_converted(network):
            if trained is not None:
                self._compare(network, trained)
            self._watch(network)
            return
        if trained is not None:
            self.options = {"plan": trained, **_kept(self.options)}
        try:
            refuse_converted(network)
        except ConversionError as error:
            raise ConversionError(
                f"{self.caller}: {error}; pass example_inputs=, which converts before the framework wraps it"
            ) from None
        if self.example is not None:
            self._rewire(network, self._example_for(network))
        else:
            before = vars(network).get("forward")
            vars(network)["forward"] = FirstCall(network, before, self._rewire, _is_no_step)

    def step_begins(self) -> None:
        """An optimizer step begins, with its first batch."""
        self._since = time.perf_counter()

    def step_ends(self, context: AbstractContextManager[Any] | None = None) -> None:
        """An optimizer step was made; ``context`` is that in which the network is called, such as an autocast."""
        if self._since is not None:  # else it holds a conversion
            self._seconds, self._timed = self._seconds + time.perf_counter() - self._since, self._timed + 1
        self._since, self._steps = None, self._steps + 1
        if self.recalibrate_every and self._steps % self.recalibrate_every == 0 and self._predicts():
            assert self.network is not None
            with context or nullcontext():
                calibrate(self.network, [_plain(self._last)])

    def metrics(self) -> dict[str, float]:
        """What to log: MiB at the peak of a step above rest, as planned, with each block checkpointed and stored
        (on paper, or as a memory budget predicts); on accelerators, MiB that were allocated at most since conversion;
        and the mean seconds of the steps since the last time.
        """
        if self.network is None or not is_converted(self.network):
            return {}
        told = _forecast(converted(self.network).plan)
        device = _device_of(self.network)
        if (allocator := _allocator_of(device)) is not None:
            told["peak_mib"] = allocator.max_memory_allocated(device) / MIB
        if self._timed:
            told["step_seconds"] = self._seconds / self._timed
            self._seconds, self._timed = 0.0, 0
        return {f"revwire/{name}": value for name, value in told.items()}

    def end(self) -> None:
        """Training is over: nothing waits any more, and the wiring is the original one if it is to be."""
        if self._hook is not None:
            self._hook.remove()
        network, self._hook, self._last = self.network, None, None
        waits = network is not None and isinstance(vars(network).get("forward"), FirstCall)
        if network is not None and (waits or (self.revert_at_end and is_converted(network))):
            revert(network)

    def couplings(self) -> list[Coupling]:
        """Those of the caller's own that the options name."""
        given = self.options.get("coupling")
        return [c for c in (given.values() if isinstance(given, Mapping) else [given]) if isinstance(c, Coupling)]

    def _rewire(self, network: nn.Module, call: Any) -> None:
        self._since = None
        convert(network, call, **self._agreed(network, call))
        self.mine = True
        self._watch(network)

    def _agreed(self, network: nn.Module, call: Any) -> dict[str, Any]:
        """The options; in a process group, the plan that the first process makes with them."""
        if "plan" in self.options:
            return self.options
        options = {name: value for name, value in self.options.items() if name in _PLANNED}
        plan = of_first(lambda: planned(network, call, **options))
        return self.options if plan is None else {"plan": plan, **_kept(self.options)}

    def _watch(self, network: nn.Module) -> None:
        """Note the calls of a converted network, and its peak, from here on."""
        couplings = [c for chain in converted(network).chains for c in chain.couplings]
        if self.recalibrate_every and self._hook is None:
            if couplings and not self._predicts(network):
                raise CouplingError(
                    f"{self.caller}: got recalibrate_every={self.recalibrate_every} for coupling "
                    f"{couplings[0].name!r}, which predicts nothing; expected coupling='innovation', or leave it out"
                )
            self._hook = network.register_forward_pre_hook(self._note, with_kwargs=True)
        device = _device_of(network)
        if (allocator := _allocator_of(device)) is not None:
            allocator.reset_peak_memory_stats(device)

    def _note(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_no_step(network):
            self._last = Call(args, kwargs)

    def _predicts(self, network: nn.Module | None = None) -> bool:
        network = network or self.network
        return (network is not None and is_converted(network)) and any(
            isinstance(c, Innovation) for chain in converted(network).chains for c in chain.couplings
        )

    def _compare(self, network: nn.Module, trained: Plan) -> None:
        """Give a network the form in which its weights were trained; or warn, where its conversion is the caller's."""
        here = converted(network).present_plan()
        if self.mine and self.example is not None:
            if replace(here, trained=True) != replace(trained, trained=True):
                take_all_off(network)
                convert(network, self._example_for(network), plan=trained)
            return
        names = lost([u.scheme for u in trained.units], [u.scheme for u in here.units] or repeat(None))
        if names:
            said = lost_words(trained.model, names, "the form that it has here")
            warnings.warn(said, FunctionLostWarning, stacklevel=3)

    def _example_for(self, network: nn.Module) -> Call:
        device, call = _device_of(network), as_call(self.example)
        args, kwargs = mapped((call.args, call.kwargs), lambda t: t.to(device) if isinstance(t, torch.Tensor) else t)
        return Call(args, kwargs)


def _is_no_step(network: nn.Module) -> bool:
    return not (network.training and torch.is_grad_enabled())


def _kept(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that may stand beside a plan."""
    return {name: options[name] for name in ("calibrate",) if name in options}


def _plain(call: Call | None) -> Any:
    """A call as users write examples, where they can."""
    assert call is not None, "a step ends after a call"
    return call if call.args and call.kwargs else call.args or call.kwargs


def _device_of(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def _allocator_of(device: torch.device) -> Any:
    """The module with its statistics; None where it has none."""
    return torch.get_device_module(device) if device.type != "cpu" and keeps_peak(device) else None


def _forecast(plan: Plan) -> dict[str, float]:
    """MiB at the peak of a step, by what a user could do."""
    if plan.forecast is not None:
        points = {"planned": plan.forecast.planned, "stored": plan.forecast.stored}
        points |= {"checkpointing": plan.forecast.checkpoint} if plan.forecast.checkpoint else {}
        return {f"{name}_mib": point.peak_bytes / MIB for name, point in points.items()}
    if plan.peaks is None:
        return {}
    peaks = {"planned": plan.peaks.planned, "checkpointing": plan.peaks.checkpointing, "stored": plan.peaks.stored}
    return {f"{name}_mib": count / MIB for name, count in peaks.items()}
