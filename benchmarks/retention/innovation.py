"""What ``coupling="innovation"`` keeps of pretrained networks straight after conversion, beside other couplings at as
many bits.

python -m benchmarks.retention.innovation --data-root DATA

Predictors are fitted to examples that no figure is measured on: training images, training text, other sentences, every
other image of the ImageNet sample. "whole" has one unit for each block, and so half as many bits per block where a
block has two. Rows are kept in ``--scratch`` as they come, so a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import revwire
from benchmarks.harness import data
from benchmarks.harness.record import Row, run
from benchmarks.retention import cifar, imagenet_sample, language_model, sentences
from benchmarks.retention.resume import Scratch
from benchmarks.retention.wirings import or_reason

COUPLINGS = (
    *("original", "re2tal", "innovation:1", "bdia:1/2", "momentum:1/2", "innovation:1/2", "innovation:-1/2"),
    *("bdia:1/4", "innovation:1/4", "innovation:-1/4", "bdia:1/8", "innovation:1/8", "bdia", "innovation"),
)
WHOLE = ("bdia:1/2", "bdia:1/4", "innovation:1", "innovation:1/2", "innovation:1/4")


@dataclass(frozen=True)
class Subject:
    """A network with pretrained weights.

    Attributes:
        make: gives it, in evaluation mode.
        examples: what predictors are fitted to.
        measure: of a wiring: the figure.
        figure: its name; larger is better but for a loss.
        has_parts: whether its blocks have several units each.
    """

    make: Callable[[], nn.Module]
    examples: list[Any]
    measure: Callable[[nn.Module], float]
    figure: str
    has_parts: bool = False


def subjects(options: argparse.Namespace) -> Iterator[tuple[str, Subject]]:
    """(name, subject), each made when it is its turn."""
    for name in options.networks:
        yield name, NETWORKS[name](options)


def _resnet(depth: int, options: argparse.Namespace) -> Subject:
    root, generator = options.data_root, torch.Generator().manual_seed(0)
    weights = data.file(root, cifar.WEIGHTS[depth], f"ResNet-{depth} weights")
    train, (pictures, labels) = (
        cifar.images(data.file(root, cifar.ARCHIVES[split], f"the CIFAR-10 {split} images"))
        for split in ("train", "test")
    )
    chosen = torch.randperm(len(train[0]), generator=generator)[: options.examples]
    tested = torch.randperm(len(pictures), generator=generator)[: options.images]
    return Subject(
        lambda: cifar.pretrained(depth, weights),
        [cifar.NORMALIZE(part.float() / 255) for part in train[0][chosen].split(64)],
        lambda model: cifar.accuracy(model, pictures[tested], labels[tested]),
        "top-1",
    )


def _efficientnet(options: argparse.Namespace) -> Subject:
    relative = "images/imagenet_1000_samples_short256.tar"
    pictures = imagenet_sample.images(data.file(options.data_root, relative, "a sample of ImageNet"))
    normalize = imagenet_sample.NORMALIZATIONS["(x − 127) / 128"]
    seen, tested = pictures[1::2][: options.examples], pictures[::2]

    def accuracy(model: nn.Module) -> float:
        got = torch.cat(list(imagenet_sample.predictions(model, tested, normalize, 50)))
        return (got == torch.arange(0, len(pictures), 2)).double().mean().item()

    examples = [normalize(part.float() / 255) for part in seen.split(16)]
    return Subject(imagenet_sample.classifier, examples, accuracy, "top-1")


def _characters(options: argparse.Namespace) -> Subject:
    training, held_out = language_model.text()
    model = language_model.trained(options, training)
    batches = language_model.validation(options, held_out)
    windows = language_model.windows(training, 64, options.length, torch.Generator().manual_seed(5))
    return Subject(
        lambda: copy.deepcopy(model),
        list(windows[:, :-1].split(32)),
        lambda network: language_model.validation_loss(network, batches),
        "nats per character",
        has_parts=True,
    )


def _encoder(options: argparse.Namespace) -> Subject:
    tokenizer = sentences.AutoTokenizer.from_pretrained(sentences.folder())
    texts = sentences.sentences(2 * options.sentences)
    parts = [texts[i : i + 64] for i in range(0, len(texts), 64)]
    batches = [
        dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts
    ]
    half = len(batches) // 2
    true = torch.cat(list(sentences.embeddings(sentences.encoder(), batches[:half])))

    def cosine(model: nn.Module) -> float:
        found: Tensor = torch.cat(list(sentences.embeddings(model, batches[:half])))
        return F.cosine_similarity(found, true).mean().item()

    return Subject(sentences.encoder, batches[half:], cosine, "mean cosine", has_parts=True)


NETWORKS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "character model": _characters,
    "all-MiniLM-L6-v2": _encoder,
    "ResNet-20": partial(_resnet, 20),
    "ResNet-56": partial(_resnet, 56),
    "EfficientNet-Lite0": _efficientnet,
}


def row(name: str, subject: Subject, coupling: str, *, whole: bool) -> Row:
    """The figure of a network in a wiring, and the bits that it keeps per element and unit."""
    model, units, bits = subject.make(), 0, None
    if coupling != "original":
        fitted = {"calibrate": subject.examples} if coupling.startswith("innovation") else {}
        options = {"whole": "*"} if whole else {}
        revwire.convert(model, subject.examples[0], coupling=coupling, rewire="everywhere", **options, **fitted)
        plan = revwire.report(model)
        units = len(plan.units)
        bits = sum(u.kept_bytes for u in plan.units) * 8 / sum(prod(u.shape) for u in plan.units)
    found = or_reason(lambda: {"figure": subject.measure(model)})
    chosen = {"network": name, "coupling": coupling, "whole": whole, "unit": subject.figure}
    return {**chosen, "units": units, "bits": bits, "figure": None, **found}


def measured(options: argparse.Namespace, scratch: Scratch) -> list[Row]:
    """One row for each network and wiring."""
    rows: list[Row] = []
    for name, subject in subjects(options):
        cases = [(c, False) for c in COUPLINGS] + [(c, True) for c in WHOLE if subject.has_parts]
        for coupling, whole in track(cases, name):
            key = f"innovation.{name}.{coupling}.{'whole' if whole else 'parts'}"
            rows.append(scratch.row(key, lambda c=coupling, w=whole, n=name, s=subject: row(n, s, c, whole=w)))
    return rows


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data.add_option(parser)
    parser.add_argument("--examples", type=int, default=256, help="images that predictors are fitted to")
    parser.add_argument("--images", type=int, default=2000, help="test images of CIFAR-10 (default: %(default)s)")
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    language_model.add_options(parser)
    options = parser.parse_args()
    config = {**language_model.config(options), **{n: getattr(options, n) for n in ("examples", "images", "sentences")}}
    scratch = Scratch(Path(options.scratch), config)
    run("innovation", config, lambda: measured(options, scratch)).publish()


if __name__ == "__main__":
    main()
