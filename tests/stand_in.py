"""The CPU treated as an accelerator: checks are read late, and what makes the host wait for the device is counted."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def as_accelerator(monkeypatch, wanted=True):
    """Let the runtime take the CPU for a device that stalls where a number is read (or not)."""
    for module in ("_runtime.tape", "_runtime.run", "_runtime.saving", "_runtime.segment", "_forwards.checkpointed"):
        monkeypatch.setattr(f"revwire.{module}.stalls", lambda device: wanted)
    monkeypatch.setattr("revwire._streams.fixed._is_read_late", lambda device: wanted)


_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique", "_unique2"}


class _Waits(TorchDispatchMode):
    """Counts, by name, the operations that make a host wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        host = name == "equal" and args[0].nbytes == torch.get_rng_state().nbytes  # random states lie on the host
        masks = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if masks or (name in _WAITS and not host):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@contextmanager
def waits(monkeypatch):
    """How often the host waits within this, by what it waits for; also where a tensor is taken to the host, which on
    the CPU is no operation.
    """
    mode = _Waits()

    def counted(function):
        def call(t, *args, **kwargs):
            mode.found[function.__name__] += t.numel() != torch.get_rng_state().numel()
            return function(t, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, mode:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
        yield mode.found
