"""The commands. Exit codes: 0 done, 1 a check that failed, 2 a command line that does not make sense, or a model that
does not build.

What a command needs is imported when it runs: PyTorch takes seconds, which ``--help`` has not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import revwire
from revwire.cli.output import errors, reported, show, working

app = typer.Typer(
    name="revwire",
    help="Make pretrained networks reversible: train them in constant memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


CHANGES_MUCH = 0.05
"""Of the function: so much more than it may be as good as before."""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"revwire {revwire.__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version, and end")
    ] = False,
) -> None:
    """Make pretrained networks reversible: train them in constant memory."""


Name = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, torchvision:NAME, pytorchvideo:NAME, hf:FOLDER or hf:ORG/NAME, or package.module:factory",
    ),
]


Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="SHAPE", help="shape of an input, such as 1,3,224,224; repeat for several"),
]


AsList = Annotated[bool, typer.Option("--as-list", help="pass the inputs as one list instead of as arguments")]


CouplingName = Annotated[
    str | None, typer.Option("--coupling", help="re2tal, bdia, bdia:1/16 …; the default is the library's")
]


Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact", help="fixed-point or floating-point streams; by default what the coupling needs"
    ),
]


Include = Annotated[list[str] | None, typer.Option("--include", metavar="GLOB", help="only these modules; repeatable")]


Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="GLOB", help="not these modules; repeatable")]


Whole = Annotated[
    list[str] | None,
    typer.Option(
        "--whole", metavar="GLOB", help="these modules one unit each; repeatable; auto: if a budget is better so"
    ),
]


ChunkCount = Annotated[
    int | None, typer.Option("--chunks", help="run units in so many chunks of the batch, or of tokens")
]


Checkpoint = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint", metavar="GLOB", help="checkpoint these modules, outside of chains; stays: the blocks that stay"
    ),
]


Rewire = Annotated[
    str | None,
    typer.Option(
        "--rewire", metavar="WHERE", help="leanest: the chains that lower the peak of a step (the default); everywhere"
    ),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget", metavar="BYTES", help="6GiB, 512MiB or least: the fastest mix of units whose step fits"
    ),
]


Train = Annotated[bool, typer.Option("--train/--eval", help="the mode the model is in")]


Pretrained = Annotated[bool, typer.Option("--pretrained", help="load the zoo's weights (from its hub)")]


Json = Annotated[bool, typer.Option("--json", help="print JSON")]


Traceback = Annotated[bool, typer.Option("--traceback", help="of an error, show where it was raised")]


@app.command("plan")
def plan_command(
    model: Name,
    input_: Inputs = None,
    as_list: AsList = False,
    coupling: CouplingName = None,
    exact: Exact = None,
    include: Include = None,
    exclude: Exclude = None,
    whole: Whole = None,
    chunks: ChunkCount = None,
    checkpoint: Checkpoint = None,
    memory_budget: MemoryBudget = None,
    rewire: Rewire = None,
    train: Train = True,
    pretrained: Pretrained = False,
    json_: Json = False,
    traceback: Traceback = False,
) -> None:
    """Show what would be rewired, and what stays and why. Changes nothing."""
    with reported(traceback):
        from revwire.cli import work

        network, inputs = work.prepared(model, input_, as_list, train, pretrained)
        options = work.conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        plan = work.plan(network, inputs, options)
    show(plan, json_)


@app.command("verify")
def verify_command(
    model: Name,
    input_: Inputs = None,
    as_list: AsList = False,
    coupling: CouplingName = None,
    exact: Exact = None,
    include: Include = None,
    exclude: Exclude = None,
    whole: Whole = None,
    chunks: ChunkCount = None,
    checkpoint: Checkpoint = None,
    memory_budget: MemoryBudget = None,
    rewire: Rewire = None,
    train: Train = True,
    pretrained: Pretrained = False,
    json_: Json = False,
    traceback: Traceback = False,
) -> None:
    """Convert, then check reconstruction and gradients. Exit code 1 where a check fails."""
    with reported(traceback):
        from revwire.cli import work

        network, inputs = work.prepared(model, input_, as_list, train, pretrained)
        options = work.conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        work.convert(network, inputs, options)
        check = revwire.verify(network, inputs)
        holds = work.holds(network, check)
    show(check, json_)
    if check.function_change > CHANGES_MUCH:
        errors(
            f"revwire: conversion changes the outputs by {check.function_change:.0%}: fine-tune at length, or convert "
            "with a coupling that changes less, such as --coupling bdia:1/64"
        )
    raise typer.Exit(0 if holds else 1)


@app.command("profile")
def profile_command(
    model: Name,
    input_: Inputs = None,
    as_list: AsList = False,
    coupling: CouplingName = None,
    exact: Exact = None,
    include: Include = None,
    exclude: Exclude = None,
    whole: Whole = None,
    chunks: ChunkCount = None,
    checkpoint: Checkpoint = None,
    memory_budget: MemoryBudget = None,
    rewire: Rewire = None,
    train: Train = True,
    pretrained: Pretrained = False,
    repeats: Annotated[int, typer.Option(min=1, help="timed rounds")] = 3,
    json_: Json = False,
    traceback: Traceback = False,
) -> None:
    """Convert, then measure memory and time against the original network, and that under checkpointing."""
    with reported(traceback):
        from revwire.cli import work

        network, inputs = work.prepared(model, input_, as_list, train, pretrained)
        options = work.conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        work.convert(network, inputs, options)
        profile = revwire.profile(network, inputs, repeats=repeats)
    show(profile, json_)


@app.command("doctor")
def doctor_command(
    device: Annotated[
        str | None, typer.Option("--device", help="to examine, such as cuda:1; by default the accelerator, or the CPU")
    ] = None,
    json_: Json = False,
    traceback: Traceback = False,
) -> None:
    """Versions, devices, kernels and settings, what would be slow or refused, and a test of seconds. Exit code 1 where
    it fails.
    """
    with reported(traceback):
        from revwire.cli import work

        with working("examining"):
            found = revwire.doctor(work.device_of(device))
    show(found, json_)
    raise typer.Exit(0 if found.healthy else 1)


@app.command("demo")
def demo_command(
    quick: Annotated[bool, typer.Option("--quick", help="smaller networks and inputs, fewer steps")] = False,
    coupling: CouplingName = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="load Kinetics weights for the video backbone from its hub")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="where memory against time is drawn")
    ] = None,
    traceback: Traceback = False,
) -> None:
    """What revwire gains, and where it gains nothing: memory and time beside checkpointing, on real inputs."""
    with reported(traceback):
        from revwire.cli import work
        from revwire.demo import run

        passed = run(quick=quick, pretrained=pretrained, **work.given(coupling=coupling, picture=picture))
    raise typer.Exit(0 if passed else 1)
