"""The end of a backward pass: what its walks held is freed, and what waits to be read is read at once."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from revwire._runtime.range import RangeCheck
from revwire._torch import queue_callback


class Question(Protocol):
    """A check that is read late."""

    def numbers(self) -> Tensor | None:
        """What is to be read, in one dimension; None where nothing is."""

    def judge(self, values: list[float] | None) -> None:
        """Hear what they were; raises where the check failed."""


class Ending:
    """What one backward pass, through however many chains, does at its end.

    It waits for each device once; where a check failed, once more to tell what.
    """

    _running: ClassVar[WeakValueDictionary[int, Ending]] = WeakValueDictionary()  # the pass itself owns it
    _lock = Lock()

    def __init__(self) -> None:
        self.frees: list[Callable[[], None]] = []
        self.questions: list[Question] = []
        self.ranges: dict[int, RangeCheck] = {}

    @classmethod
    def of(cls, task: int) -> Ending:
        """That of the pass with this id, which runs on this thread."""
        with cls._lock:
            found = cls._running.get(task)
            if found is None:
                found = cls._running[task] = cls()
                queue_callback(found.come)
        return found

    def add(self, question: Question, free: Callable[[], None] | None = None) -> None:
        """Ask this at the end, after ``free`` was called."""
        self.questions.append(question)
        if free is not None:
            self.frees.append(free)

    def come(self) -> None:
        """The pass is over.

        Raises:
            RangeError: a value left the range of the streams.
            ReconstructionError: a comparison failed.
        """
        for free in self.frees:
            free()
        for check in [*self.ranges.values()]:
            check.reach.came_back(check.training)
            self.ranges.update((id(other), other) for other in check.reach.unread)
        answer([*self.ranges.values(), *self.questions])


def answer(questions: list[Question]) -> None:
    """Read them by one transfer from each device, and judge them in order."""
    asked = [question.numbers() for question in questions]
    read: dict[int, list[float]] = {}
    for device in {t.device for t in asked if t is not None}:
        here = [(i, t) for i, t in enumerate(asked) if t is not None and t.device == device]
        values = torch.cat([t for _, t in here]).tolist()
        for i, t in here:
            read[i], values = values[: len(t)], values[len(t) :]
    for i, question in enumerate(questions):
        question.judge(read.get(i))
