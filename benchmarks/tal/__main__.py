"""``python -m benchmarks.tal train|evaluate|predict|extract|check|synthesize|compare|memory|largest|plot|analyse``;
each says what it takes with ``--help``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.harness.record import PICTURES, RESULTS, run
from benchmarks.tal.schema import Config, ConfigError, Protocol

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
Checkpoint = Annotated[str, typer.Option(help="A path, or 'best' or 'last' of the run of --config.")]
MaybeConfig = Annotated[
    str | None, typer.Option("--config", help="As for train; without it, that of the checkpoint, which is a path then.")
]
OnlyFound = Annotated[
    bool, typer.Option("--only-found", help="Do not score test videos that are not there; else they count as missed.")
]


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the latest checkpoint of this run.")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="Copy the record to benchmarks/results.")] = False,
    only_found: OnlyFound = False,
    quiet: Quiet = False,
) -> None:
    """Train, test, and write the record of the run. Under torchrun, or with training.devices, on several processes."""
    from benchmarks.tal import runs

    loaded = _loaded(config, overrides, only_found)
    record = runs.train(loaded, runs.latest(loaded) if resume else None, progress=not quiet)
    if publish:
        print(dataclasses.replace(record, name=f"tal_run_{loaded.name}").write())
    print(json.dumps(record.results, indent=1))
    print(f"logs, checkpoints, predictions and record: {loaded.folder}")


@app.command()
def evaluate(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    checkpoint: Checkpoint = "last",
    predictions: Annotated[
        Path | None, typer.Option(help="Score this file of detections instead of a network.")
    ] = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Of a file of detections: AR@AN and recall at k x segments, too.")
    ] = False,
    protocol: Annotated[
        Protocol, typer.Option(help="Of a file of detections: thumos14 is that of THUMOS-14's own toolkit.")
    ] = "activitynet",
    ambiguous: Annotated[
        Path | None, typer.Option(help="For thumos14, its Ambiguous_test.txt, where the annotations lack these.")
    ] = None,
    only_found: OnlyFound = False,
    quiet: Quiet = False,
) -> None:
    """Test a checkpoint, or a file of detections: JSON in ActivityNet's form, or THUMOS's text."""
    from benchmarks.tal import runs

    if predictions is not None:
        from benchmarks.tal import loading, thumos
        from benchmarks.tal.evaluation import evaluate as score

        loaded = _loaded(_needed(config), overrides, only_found)
        test = loading.truth(loaded).test
        test = test if ambiguous is None else thumos.marked(test, ambiguous)
        print(score(test, predictions, loaded.thresholds, only_found=loaded.data.only_found, protocol=protocol))
        if recall or loaded.recall:
            from benchmarks.tal import detection_files
            from benchmarks.tal import recall as recalls

            counts = loaded.recall or (1, 5)
            print(recalls.summary(test, detection_files.plain(predictions), loaded.thresholds, counts))
        return
    if recall or ambiguous or protocol != "activitynet":
        raise ConfigError(
            "--recall, --protocol, --ambiguous: got a checkpoint; expected --predictions, a file to score"
        )
    loaded, path = _of_checkpoint(config, overrides, checkpoint, only_found)
    figures = runs.evaluate(loaded, path, progress=not quiet)
    print("\n".join(f"{name:<10} {100 * value:6.2f}" for name, value in figures.items()))


@app.command()
def predict(
    config: MaybeConfig = None,
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("detections.json"),
    videos: Annotated[
        Path | None, typer.Option(help="A video, or a folder of any videos; default: those of the test subset.")
    ] = None,
    checkpoint: Checkpoint = "last",
    class_scores: Annotated[
        Path | None, typer.Option(help="Classes of these videos, for a class-agnostic network; default: 'action'.")
    ] = None,
    most: Annotated[int, typer.Option(help="Of --videos, how many to print and to draw.")] = 10,
    quiet: Quiet = False,
) -> None:
    """Detect actions in videos: a JSON file in ActivityNet's form, times in seconds. Of --videos, which needs nothing
    but a checkpoint, the best are printed, and drawn in a folder beside the file.
    """
    from benchmarks.tal import report, runs

    loaded, path = _of_checkpoint(config, overrides, checkpoint)
    if class_scores is not None or videos is not None:
        chosen = None if class_scores is None else str(class_scores.resolve())
        loaded = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, class_scores=chosen))
    found = runs.predict(loaded, path, videos, output, progress=not quiet)
    if videos is not None:
        shown = dict(list(found.items())[:most])
        print(report.table(shown))
        for name, detections in shown.items():
            for picture in report.predicted(name, detections, output.with_suffix("")):
                print(picture)
    print(f"{sum(map(len, found.values()))} detections in {len(found)} videos: {output}")


@app.command()
def extract(
    output: Annotated[Path, typer.Option(help="Folder to write to: rows, and config.yaml to train on them.")],
    config: MaybeConfig = None,
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option(help="A path, or 'best' or 'last' of the run of --config.")] = None,
    videos: Annotated[
        Path | None, typer.Option(help="A video, or a folder of any videos; default: those for training and tests.")
    ] = None,
    snippet: Annotated[int | None, typer.Option(help="Sampled frames that make a row by themselves.")] = None,
    every: Annotated[int | None, typer.Option(help="Video frames from row to row, with --snippet.")] = None,
    hdf5: Annotated[bool, typer.Option("--hdf5", help="One HDF5 file instead of a .npy file for each video.")] = False,
    batch: Annotated[int, typer.Option(help="Clips at a time.")] = 1,
    quiet: Quiet = False,
) -> None:
    """Write features of a backbone: its configuration's weights, or a checkpoint's. Goes on where it was broken off;
    exit code 1 if a video cannot be read.
    """
    from benchmarks.tal import checkpoints, extraction

    trained = None
    if checkpoint is None:
        loaded = _loaded(_needed(config), overrides)
    else:
        loaded, path = _of_checkpoint(config, overrides, checkpoint)
        trained = checkpoints.read(path)
    options = {"snippet": snippet, "every": every, "hdf5": hdf5, "batch": batch, "progress": not quiet}
    found = extraction.extract(loaded, output, trained=trained, source=videos, **options)
    print(f"{found}\npython -m benchmarks.tal train --config {output / 'config.yaml'}")
    raise typer.Exit(int(bool(found.unreadable)))


@app.command()
def check(
    config: ConfigOption,
    overrides: Overrides = None,
    thorough: Annotated[bool, typer.Option("--thorough", help="Decode every frame.")] = False,
    workers: Annotated[int, typer.Option(help="Files at a time.")] = 4,
    quiet: Quiet = False,
) -> None:
    """Audit annotations, and videos or features, before a long run; exit code 1 if one is missing or broken."""
    from benchmarks.tal import loading
    from benchmarks.tal.audit import audit, audit_features, of_annotations

    loaded = _loaded(config, overrides)
    truth, broken = loading.truth(loaded, quietly=True), 0
    print("\n".join(of_annotations(truth.faults, truth.training, truth.test)))
    for name, subset in (("training", truth.training), ("test", truth.test)):
        options = {"workers": workers, "progress": not quiet}
        if loaded.data.features.path is None:
            found = audit(subset, loading.path(loaded, "videos"), thorough=thorough, **options)
        else:
            found = audit_features(subset, *loading.extracted(loaded), **options)
        print(f"{name}: {sum(len(v.segments) for v in subset.videos)} actions of {len(truth.classes)} classes; {found}")
        broken += len(found.missing) + len(found.faulty)
    raise typer.Exit(int(broken > 0))


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
    only_found: OnlyFound = False,
) -> None:
    """Draw true and predicted segments of test videos (PNG and HTML), and mAP against tIoU."""
    from benchmarks.tal import detection_files, loading, report
    from benchmarks.tal.evaluation import evaluate as score

    loaded = _loaded(config, overrides, only_found)
    truth = loading.truth(loaded).test
    detections = detection_files.plain(predictions)
    drawn = [(video, found) for name, found in detections.items() if (video := truth.video(name)) is not None]
    for video, found in drawn[:most]:
        for path in report.timeline(video, found, truth.classes, output):
            print(path)
    result = score(truth, detections, loaded.thresholds, only_found=loaded.data.only_found)
    if result.missed:
        print(result.missing)
    curve = {f"{t:g}": float(m) for t, m in zip(result.tious, result.map, strict=True)}
    print(report.map_curve({loaded.name: curve}, output / "map_by_tiou.png"))


@app.command()
def analyse(
    config: ConfigOption,
    predictions: Annotated[Path, typer.Option(help="A file of detections.")],
    output: Annotated[Path, typer.Option(help="Folder to write to: analysis.json, .png and .html.")],
    overrides: Overrides = None,
    edges: Annotated[
        str, typer.Option(help="Parts of the segments: thumos14 or activitynet, or five as large as each other.")
    ] = "equal",
    threshold: Annotated[float | None, typer.Option(help="tIoU of the profile; default: the first.")] = None,
) -> None:
    """Say where errors are, as DETAD does: kinds of false detections, and which segments are found worse or not."""
    from benchmarks.tal import analysis, analysis_report, detection_files, loading

    loaded = _loaded(config, overrides)
    truth = loading.truth(loaded).test
    if edges != "equal" and edges not in analysis.EDGES:
        raise ConfigError(f"--edges: got {edges!r}; expected equal, {', '.join(analysis.EDGES)}")
    if threshold is not None and threshold not in loaded.thresholds:
        raise ConfigError(f"--threshold: got {threshold}; expected one of {loaded.thresholds} (thresholds)")
    parts = analysis.EDGES.get(edges) or analysis.quantiles(truth)
    found = analysis.analyse(truth, detection_files.plain(predictions), loaded.thresholds, parts, threshold)
    print(analysis_report.text(found))
    for path in analysis_report.write(found, output):
        print(path)


def _loaded(config: str, overrides: list[str] | None, only_found: bool = False) -> Config:
    from benchmarks.tal.config import load  # imports all networks, to know their options

    return load(config, [*(overrides or []), *(["data.only_found=true"] if only_found else [])])


def _needed(config: str | None) -> str:
    if config is None:
        raise ConfigError("--config: got none; expected the configuration that says which videos these are")
    return config


def _of_checkpoint(
    config: str | None, overrides: list[str] | None, checkpoint: str, only_found: bool = False
) -> tuple[Config, Path]:
    """The configuration of a checkpoint, given or its own, and its path."""
    from benchmarks.tal import checkpoints

    loaded = None if config is None else _loaded(config, overrides, only_found)
    path = checkpoints.named(loaded, checkpoint)
    return loaded or checkpoints.read(path).alone([*(overrides or []), f"data.only_found={only_found}"]), path


def _line(error: Exception) -> str:
    """What is wrong, without the trace that a data loader's process puts before it."""
    text = str(error)
    return text.rstrip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def main() -> None:
    """Run a command; what is wrong with its input is one line, and exit code 2."""
    from benchmarks.tal.errors import InputError
    from revwire import RevwireError

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it advertises
    try:
        app(standalone_mode=True)
    except (InputError, RevwireError) as error:
        typer.echo(f"error: {_line(error)}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
