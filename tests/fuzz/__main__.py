"""`python -m tests.fuzz`: many seeds, and what became of them."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import record
from fuzz.program import Program
from fuzz.runner import Outcome, check, check_seed, survived
from fuzz.shrink import shrunk


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--seeds", default="0:300", help="one seed, or FIRST:END")
    parser.add_argument("--show", action="store_true", help="the source text of each model, and what became of it")
    parser.add_argument("--shrink", action="store_true", help="of each fault, the statements that matter")
    parser.add_argument("--json", type=Path, help="where the summary is written; it is printed else")
    parser.add_argument("--record", action="store_true", help="the summary as a record in benchmarks/results")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    measure = partial(outcomes_of, options)
    if options.record:
        record.run("fuzz", {"seeds": options.seeds}, lambda: [measure()]).publish()
        return
    text = json.dumps(measure(), indent=1)
    text = re.sub(r"\[\s+(\d+(,\s+\d+)*)\s+\]", lambda m: "[" + re.sub(r"\s+", " ", m[1]) + "]", text)
    if options.json is None:
        say(text)
    else:
        options.json.write_text(text + "\n")


def outcomes_of(options: argparse.Namespace) -> dict[str, Any]:
    """The summary of what became of the seeds; it tells of each fault when it is found."""
    first, _, end = options.seeds.partition(":")
    seeds = range(int(first), int(end or int(first) + 1))
    outcomes, started = [], time.time()
    with contextlib.ExitStack() as stack:
        found: Iterable[Outcome] = map(check_seed, seeds)  # here, where a debugger looks
        if options.jobs > 1:
            spawn = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(options.jobs, mp_context=spawn))
            found = pool.map(survived, seeds)
        for outcome in found:
            outcomes.append(outcome)
            if outcome.fault is not None or options.show:
                say(f"seed {outcome.seed}: {outcome.fault.kind if outcome.fault else 'no fault'}")
            if options.show or (options.shrink and outcome.fault is not None):
                show(outcome, shrink=options.shrink)
    return summary(outcomes, time.time() - started)


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show(outcome: Outcome, *, shrink: bool) -> None:
    program, fault = Program.draw(outcome.seed), outcome.fault
    if shrink and fault is not None:

        def fails(less: Program) -> bool:
            found = check(less).fault
            return found is not None and found.kind == fault.kind

        program = shrunk(program, fails)
    say(program.essence() if shrink else program.text())
    say(f"{outcome.units} units, {outcome.calls} calls, raised: {outcome.raised or None}")
    for text in outcome.told:
        say(f"warned: {text}")
    if fault is not None:
        say(fault.detail)


def summary(outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """How many seeds, how many of them rewired and checked, and the seeds of each kind of fault."""
    kinds = Counter(o.fault.kind for o in outcomes if o.fault is not None)
    return {
        "seeds": len(outcomes),
        "seconds": round(seconds, 1),
        "rewired": sum(o.units > 0 for o in outcomes),
        "finished three calls": sum(o.calls == 3 for o in outcomes),
        "raised by the original": dict(Counter(o.raised.split(":")[0] for o in outcomes if o.raised)),
        "faults": [
            {
                "kind": k,
                "count": n,
                "seeds": [o.seed for o in outcomes if o.fault is not None and o.fault.kind == k][:8],
            }
            for k, n in kinds.most_common()
        ],
    }


if __name__ == "__main__":
    main()
