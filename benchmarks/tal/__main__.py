"""``python -m benchmarks.tal train|evaluate|predict|check|synthesize|compare|memory|plot``; each says what it takes
with ``--help``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.record import PICTURES, RESULTS, run
from benchmarks.tal.schema import Config, ConfigError

app = typer.Typer(
    help="End-to-end temporal action localization, on revwire.", no_args_is_help=True, pretty_exceptions_enable=False
)

ConfigOption = Annotated[
    str, typer.Option("--config", help="A YAML file, or the name of one in benchmarks/tal/configs.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Differences, as in training.steps=100.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Output = Annotated[
    Path, typer.Option(help="Folder of the record (and of its picture).", show_default="benchmarks/results")
]
Memories = Annotated[str, typer.Option("--memory", help="Ways to keep activations, by commas.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Default: the latest of this run.")]


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint of this run.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Copy the record to benchmarks/results.")] = False,
    quiet: Quiet = False,
) -> None:
    """Train, test, and write the record of the run. Under torchrun, or with training.devices, on several processes."""
    from benchmarks.tal import runs

    loaded = _loaded(config, overrides)
    record = runs.train(loaded, runs.latest(loaded) if resume else None, progress=not quiet)
    if publish:
        print(dataclasses.replace(record, name=f"tal_run_{loaded.name}").write())
    print(json.dumps(record.results, indent=1))
    print(f"logs, checkpoints, predictions and record: {loaded.folder}")


@app.command()
def evaluate(
    config: ConfigOption,
    overrides: Overrides = None,
    checkpoint: Checkpoint = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file of detections instead of a network.")
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Of a file of detections: AR@AN and recall at k x segments, too.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Test a checkpoint, or a file of detections in ActivityNet's form."""
    from benchmarks.tal import runs

    loaded = _loaded(config, overrides)
    if predictions is not None:
        from benchmarks.tal import loading
        from benchmarks.tal.evaluation import evaluate as score

        test = loading.truth(loaded).test
        print(score(test, predictions, loaded.thresholds))
        if recall:
            from benchmarks.tal import recall as recalls

            print(recalls.summary(test, json.loads(predictions.read_text("utf8"))["results"], loaded.thresholds))
        return
    figures = runs.evaluate(loaded, checkpoint or runs.latest(loaded), progress=not quiet)
    print("\n".join(f"{name:<10} {100 * value:6.2f}" for name, value in figures.items()))


@app.command()
def predict(
    config: ConfigOption,
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    overrides: Overrides = None,
    videos: Annotated[
        Path | None, typer.Option(help="Folder of any videos; default: those of the test subset.")
    ] = None,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
) -> None:
    """Detect actions in videos: a JSON file in ActivityNet's form, times in seconds."""
    from benchmarks.tal import runs

    loaded = _loaded(config, overrides)
    found = runs.predict(loaded, checkpoint or runs.latest(loaded), videos, output, progress=not quiet)
    print(f"{sum(map(len, found.values()))} detections in {len(found)} videos: {output}")


@app.command()
def check(
    config: ConfigOption,
    overrides: Overrides = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Decode every frame.")] = False,
    workers: Annotated[int, typer.Option(help="Files at a time.")] = 4,
    quiet: Quiet = False,
) -> None:
    """Audit annotations and videos before a long run; exit code 1 if a video is missing, corrupt or truncated."""
    from benchmarks.tal import loading
    from benchmarks.tal.audit import audit

    loaded = _loaded(config, overrides)
    truth, faults = loading.truth(loaded), 0
    for name, subset in (("training", truth.training), ("test", truth.test)):
        found = audit(subset, loading.path(loaded, "videos"), thorough=thorough, workers=workers, progress=not quiet)
        print(f"{name}: {sum(len(v.segments) for v in subset.videos)} actions of {len(truth.classes)} classes; {found}")
        faults += len(found.missing) + len(found.faulty)
    raise typer.Exit(int(faults > 0))


@app.command()
def synthesize(
    output: Annotated[Path, typer.Option(help="Folder to write to: videos, and annotations.json.")],
    videos: Annotated[int, typer.Option(help="How many; every third is for validation.")] = 90,
    seed: int = 0,
    size: Annotated[int, typer.Option(help="Pixels of either side.")] = 64,
    quiet: Quiet = False,
) -> None:
    """Draw videos with actions that differ from distractors only in motion or order, as real MP4 files with
    annotations.
    """
    from benchmarks.tal.synthetic import synthesize as draw

    print(draw(output, videos=videos, seed=seed, size=size, progress=not quiet))


@app.command()
def compare(
    config: ConfigOption,
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds in which the variants' steps are timed; 0: not at all.")] = 5,
    output: Output = RESULTS,
) -> None:
    """Stored activations, checkpointing, re2tal, bdia and a frozen backbone: figures, peak memory and seconds, as one
    record.
    """
    from benchmarks.tal import comparison

    record = comparison.compare(config, overrides or [], seeds, jobs, rounds)
    record.publish(output)
    raise typer.Exit(int(record.status != "ok"))


@app.command()
def memory(
    config: ConfigOption,
    overrides: Overrides = None,
    frames: Annotated[str, typer.Option(help="Frames of a clip, by commas.")] = "64,128,256",
    batch: Annotated[str, typer.Option(help="Clips of a step, by commas.")] = "1",
    memories: Memories = "stored,checkpoint,re2tal,bdia",
    rounds: Annotated[int, typer.Option(help="Rounds in which steps are timed; 0: not at all.")] = 0,
    output: Output = RESULTS,
) -> None:
    """Peak memory (and seconds) of a training step against the number of frames, on clips of noise: a record, and a
    picture of it.
    """
    from benchmarks.tal import costs, report

    loaded = _loaded(config, overrides)
    counts, batches = ([int(n) for n in text.split(",")] for text in (frames, batch))
    chosen = {"config": dataclasses.asdict(loaded), "frames": counts, "batch": batches, "rounds": rounds}
    classes = 1 if loaded.class_agnostic else 20
    device = costs.device(loaded)
    record = run(
        f"tal_memory_{loaded.name}",
        chosen,
        lambda: costs.by_frames(loaded, memories.split(","), counts, batches, classes=classes, rounds=rounds),
        device.type,
    )
    record.publish(output)
    if record.results:
        mine = [row for row in record.results if row["batch"] == batches[0]]
        folder = PICTURES if output == RESULTS else output
        print(report.memory_curve(mine, folder / f"{record.name}.png"))
    raise typer.Exit(int(record.status != "ok"))


@app.command()
def largest(
    config: ConfigOption,
    overrides: Overrides = None,
    batch: Annotated[str, typer.Option(help="Clips of a step, by commas.")] = "1",
    start: Annotated[int, typer.Option(help="Frames to begin with, and to which the answer is exact.")] = 256,
    memories: Memories = "stored,checkpoint,re2tal,bdia",
    output: Output = RESULTS,
) -> None:
    """The largest number of frames of which a training step fits into the GPU's memory: a record."""
    from benchmarks.tal import costs

    loaded = _loaded(config, overrides)
    chosen = {"config": dataclasses.asdict(loaded), "start": start}
    classes = 1 if loaded.class_agnostic else 20
    cases = [(memory, int(b)) for b in batch.split(",") for memory in memories.split(",")]
    record = run(
        f"tal_largest_{loaded.name}",
        chosen,
        lambda: [costs.largest(loaded, memory, b, start, classes=classes) for memory, b in cases],
        costs.device(loaded).type,
    )
    record.publish(output)
    raise typer.Exit(int(record.status != "ok"))


@app.command()
def plot(
    config: ConfigOption,
    predictions: Annotated[Path, typer.Option(help="A file of detections.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")],
    overrides: Overrides = None,
    most: Annotated[int, typer.Option(help="Videos to draw.")] = 10,
) -> None:
    """Draw true and predicted segments of test videos (PNG and HTML), and mAP against tIoU."""
    from benchmarks.tal import loading, report
    from benchmarks.tal.evaluation import evaluate as score

    loaded = _loaded(config, overrides)
    truth = loading.truth(loaded).test
    detections = json.loads(predictions.read_text(encoding="utf-8"))["results"]
    shown = truth.only(detections)
    for video in shown.videos[:most]:
        for path in report.timeline(video, detections[video.id], truth.classes, output):
            print(path)
    result = score(shown, detections, loaded.thresholds)
    curve = {f"{t:g}": float(m) for t, m in zip(result.tious, result.map, strict=True)}
    print(report.map_curve({loaded.name: curve}, output / "map_by_tiou.png"))


def _loaded(config: str, overrides: list[str] | None) -> Config:
    from benchmarks.tal.config import load  # imports all networks, to know their options

    return load(config, overrides or [])


def main() -> None:
    """Run a command; what is wrong with its input is one line, and exit code 2."""
    from benchmarks.tal.annotations import AnnotationError
    from benchmarks.tal.evaluation import PredictionError
    from benchmarks.tal.scores import ScoreError

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    try:
        app(standalone_mode=True)
    except (ConfigError, AnnotationError, PredictionError, ScoreError) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
