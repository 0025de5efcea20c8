"""Give each unit of a converted model its mode and its chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from revwire._budget.fit import MOST_STEPS, Trial, fit
from revwire._budget.marker import ended, turn
from revwire._budget.progress import Progress
from revwire._budget.ways import Ways
from revwire._capture.arguments import Call
from revwire._errors import BudgetError
from revwire._forwards.base import take_off
from revwire._forwards.converted import Converted, Parted, converted, switch
from revwire._plan.costed import with_costs
from revwire._plan.hints import Hints
from revwire._plan.options import Budget, Options
from revwire._plan.plan import Plan, PlannedChain
from revwire._surroundings.as_found import left_as_found
from revwire._surroundings.interrupts import interruptible
from revwire._surroundings.randomness import (
    accelerators_of,
    python_random_state,
    random_states,
    set_python_random_state,
    set_random_states,
)
from revwire.measure._training_step import (
    allocate_gradients,
    autocast_left,
    device_of,
    mean_square,
    own_leaves,
    run_model,
)

MOST_LOOKS = 4
"""Runs in which `probed` looks for cuts."""


def spend_less(model: nn.Module, call: Call, options: Options, hints: Hints) -> None:
    """Cut the units of a converted model into chunks, and give each its mode, as the caller or the planner wants it."""
    state = converted(model)
    if options.budget is None:
        ways = Ways(model, state, call, options.chunks, hints)
        with Progress(MOST_LOOKS, "looking for what may be cut, run") as ways.looks:
            next(iter(ways)).apply()
        found = state.plan
    else:
        wanted = options.checkpoint is None and bool(state.checkpointed)  # the planner's to decide
        switch(state.checkpointed, on=not wanted)
        ways = Ways(model, state, call, options.chunks, hints, choose=wanted)
        found = _fitted(model, state, call, options.budget, ways, hints)
    for forward in [f for f in state.checkpointed if not f.on]:
        take_off(forward.module)
        state.checkpointed.remove(forward)
    for one in [p for p in state.parted if p.forward.count == 1]:
        take_off(one.forward.module)
        state.parted.remove(one)
    names = tuple(forward.path for forward in state.checkpointed)
    planned = map(with_costs, found.chains, state.chains)
    chains = tuple(_with_parts(chain, number, state.parted) for number, chain in enumerate(planned))
    state.plan = replace(found, chains=chains, checkpointed=names)


def _fitted(model: nn.Module, state: Converted, call: Call, budget: Budget, ways: Ways, hints: Hints) -> Plan:
    """The plan in which each unit has the mode, and the chunks, that the planner picks."""
    leaves = own_leaves((call.args, call.kwargs))
    device = device_of(model, leaves)
    drawn, python_drawn = random_states(accelerators_of(model.parameters())), python_random_state()

    def forward() -> Any:
        set_random_states(drawn)  # each draws the same: which layers it leaves out, say
        set_python_random_state(python_drawn)
        with entered():
            output = run_model(model, leaves)
            ended(state.chains)
            return mean_square(output)

    def step() -> None:
        loss = forward()
        if not loss.requires_grad:
            raise BudgetError(
                f"{state.plan.model}: got outputs that need no gradient; expected a step to measure; unfreeze some "
                "weights"
            )
        turn(state.chains)
        loss.backward()

    def make_once() -> None:
        forward()

    with (
        left_as_found(model, leaves, backward=True),
        torch.enable_grad(),
        autocast_left(device) as entered,
        Progress(MOST_STEPS) as progress,
    ):
        allocate_gradients(model)
        ways.around = entered
        run, once = partial(interruptible, step), partial(interruptible, make_once)
        trial = Trial(state.plan, state.chains, run, once, device, progress, hints.weights)
        return fit(trial, budget, ways)


def _with_parts(planned: PlannedChain, number: int, parted: Iterable[Parted]) -> PlannedChain:
    """The plan of a chain with the parts of its cores."""
    mine = [p for p in parted if p.chain == number]
    parts = {p.place: p.forward.parts for p in mine}
    cores = [tuple((p.forward.path, p.forward.count) for p in mine if p.place == i) for i in range(len(planned.units))]
    units = (replace(u, parts=parts.get(i, 1), cores=cores[i]) for i, u in enumerate(planned.units))
    return replace(planned, units=tuple(units))
