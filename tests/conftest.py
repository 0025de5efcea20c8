"""Settings of all tests."""

import gc
import os
import sys
from importlib.util import find_spec

import torch
from hypothesis import settings

# The training stacks are tested where all of them are installed: pip install -e '.[stacks]'.
collect_ignore = [] if all(find_spec(name) for name in ("accelerate", "lightning", "peft", "onnx")) else ["stacks"]

gc.disable()  # until the first test: what is imported to find them stays
torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other longer than they compute

# The same examples in every run of the checks, so that a change is judged by itself; at home each run tries new ones.
settings.register_profile("checks", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("checks")


frozen = 0
"""How many modules had been imported when objects were last taken out of the collector's sight."""


def pytest_runtest_setup() -> None:
    """What is imported stays. Each measurement of memory collects garbage, and need not look for it in all that."""
    global frozen
    if len(sys.modules) > frozen + 100:
        gc.collect()
        gc.freeze()
        frozen = len(sys.modules)
    gc.enable()
