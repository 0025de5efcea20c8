"""What the server of the sweep imports once, before it forks for each case. It starts no thread."""

import contextlib
import importlib

import torch  # noqa: F401

import revwire  # noqa: F401

for _package in ("timm", "torchvision", "transformers"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_package)
