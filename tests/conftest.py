"""Settings of all tests."""

import os
from importlib.util import find_spec

import torch
from hypothesis import settings

# The training stacks are tested where all of them are installed: pip install -e '.[stacks]'.
collect_ignore = [] if all(find_spec(name) for name in ("accelerate", "lightning", "peft", "onnx")) else ["stacks"]

torch.set_num_threads(1)  # the tensors are tiny: threads would wait for each other longer than they compute

# The same examples in every run of the checks, so that a change is judged by itself; at home each run tries new ones.
settings.register_profile("checks", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("checks")
