"""What published files of VideoMAE call its parameters, in Hugging Face's names, which are those here.

Known are Hugging Face's own, mmaction2's (OpenTAD's are named alike, with adapters), and those of the authors of
VideoMAE and VideoMAE v2. Norms and classifiers behind the blocks are left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

ANCHORS = ("embeddings.patch_embeddings.projection.weight", "patch_embed.projection.weight", "patch_embed.proj.weight")
"""The first parameter: Hugging Face's, mmaction2's, the authors'."""

_PARTS = (
    (r"^patch_embed\.proj(ection)?\.", "embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.(fc1|layers\.0\.0)\.", ".intermediate.dense."),
    (r"\.mlp\.(fc2|layers\.1)\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.attention."),
    (r"\.attention\.attention\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attention\.attention\.v_bias$", ".attention.attention.value.bias"),
)


def anchor_of(names: Mapping[str, Tensor]) -> str:
    """Which of the anchors a checkpoint has, whatever stands before it.

    Raises:
        KeyError: none.
    """
    found = [anchor for anchor in ANCHORS if any(f".{name}".endswith(f".{anchor}") for name in names)]
    if not found:
        raise KeyError(f"checkpoint: it has no VideoMAE; expected a parameter {', or '.join(ANCHORS)}")
    return found[0]


def own_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The patch embedding and the blocks of a state without prefix, renamed; one weight of queries, keys and values as
    three.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _PARTS:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".qkv.weight"):
            before = name.removesuffix("qkv.weight")
            parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
            renamed |= {f"{before}{part}.weight": own for part, own in parts}
        elif name.startswith(("embeddings.patch_embeddings.", "encoder.layer.")):
            renamed[name] = value
    return renamed
