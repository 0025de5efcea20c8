"""A part in a process of its own, which is ended when its time is over: rows come as they are done."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from time import monotonic

import torch

from benchmarks.gpu.device import first_line
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.subjects import Setting
from benchmarks.harness.record import Row, environment

ENVIRONMENT = "environment"
"""No part: what the device is called, which only a process that may use it can say."""


class Stopped(Exception):  # noqa: N818 (it is no fault)
    """A part did not come to its end; says why."""


def rows(part: str, setting: Setting, done: set[str], seconds: float) -> Iterator[Row]:
    """The rows of a part, from its process.

    A CUDA device is used by processes that began after it: so they are started anew. On a CPU they are forked, which
    takes no time.

    Raises:
        Stopped: it failed, or took longer than ``seconds``; what came before has been yielded.
    """
    until = monotonic() + seconds
    context = get_context("fork" if setting.device.type == "cpu" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(part, setting, done, theirs), daemon=False)
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, until - monotonic())):
            try:
                row, reason = ours.recv()
            except EOFError:
                process.join()
                raise Stopped(f"its process ended with {process.exitcode}") from None
            if reason:
                raise Stopped(reason)
            if row is None:
                return
            yield row
        raise Stopped(f"stopped after {seconds:.0f} s")
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(part: str, setting: Setting, done: set[str], to: Connection) -> None:
    if setting.device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(setting.device)
    gc.freeze()  # what is imported stays; garbage is collected often, and need not be looked for in it
    try:
        if part == ENVIRONMENT:
            to.send((environment(str(setting.device)), None))
        else:
            for row in PARTS[part].measure(setting, done):
                to.send((row, None))
        to.send((None, None))
    except Exception as error:  # noqa: BLE001 - whatever it is, the record says it, and the next part is run
        to.send((None, first_line(error)))
