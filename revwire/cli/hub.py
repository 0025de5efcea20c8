"""Models of Hugging Face, by their configuration alone: from a folder, or from the hub where it can be reached."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import nn

from revwire.cli.usage import UsageError, first_line

TOKENS, SAMPLES = 128, 16_000


def configuration(name: str) -> Any:
    """The configuration in a folder, or of a repository on the hub.

    Raises:
        UsageError: there is none, or the hub is out of reach.
    """
    from transformers import AutoConfig

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells each attempt
    folder = os.path.expanduser(name)
    try:
        return AutoConfig.from_pretrained(folder if os.path.isdir(folder) else name)
    except Exception as error:  # the hub's client has many of its own
        where = f"a config.json in {name}" if os.path.isdir(folder) else "a folder, or a hub that can be reached"
        raise UsageError(
            f"hf:{name}: got no configuration ({first_line(error)}); expected {where}; pass a local folder that has "
            "the model's config.json: hf:./FOLDER"
        ) from error


def network(name: str, config: Any, pretrained: bool) -> nn.Module:
    """The model of a configuration, with random weights unless ``pretrained``."""
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    any_kind: Any = transformers.AutoModel  # untyped
    kind = getattr(transformers, named, any_kind)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # training has no use for it
    if pretrained:
        model = kind.from_pretrained(name, config=config)
    else:
        model = kind.from_config(config) if kind is any_kind else kind(config)
    found: nn.Module = model
    return found


def main_input(model: nn.Module) -> str:
    """The keyword of what it is about: tokens, pixels or sound."""
    return str(getattr(model, "main_input_name", "input_ids"))


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Random inputs as the configuration describes them."""
    config: Any = model.config
    made = {main_input(model): _made(main_input(model), config)}
    if getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = _tokens(config)
    return made


def _made(name: str, config: Any) -> torch.Tensor:
    if name.startswith("pixel_values"):
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = getattr(vision, "num_channels", 3)
        frames = getattr(vision, "num_frames", None)
        return torch.randn(2, channels, height, width) if frames is None else torch.randn(
            1, frames, channels, height, width
        )  # fmt: skip
    if name == "input_features":
        return torch.randn(1, getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500))
    if name == "input_values":
        return torch.randn(1, SAMPLES)
    return _tokens(config)


def _tokens(config: Any) -> torch.Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limits = [getattr(text, n, None) for n in ("max_position_embeddings", "n_positions", "max_target_positions")]
    length = min([TOKENS, *(n for n in limits if isinstance(n, int) and n > 0)])
    return torch.randint(getattr(text, "vocab_size", 100), (2 if length > 1 else 1, length))
