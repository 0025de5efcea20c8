"""The commands. Exit codes: 0 done, 1 a check that failed, 2 a command line that does not make sense."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import nn

import revwire
from revwire import NothingToRewireWarning, RangeError, ReconstructionError, RevwireError
from revwire.cli.models import Shape, UsageError, first_line, load
from revwire.testing import holds

app = typer.Typer(
    name="revwire",
    help="Make pretrained networks reversible: train them in constant memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


errors = Console(stderr=True, highlight=False)


Name = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, pytorchvideo:NAME or package.module:factory"),
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
) -> None:
    """Show what would be rewired, and what stays and why. Changes nothing."""
    with _reported():
        network, inputs = _prepared(model, input_, as_list, train, pretrained)
        options = _conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        with _working("tracing"):
            plan = revwire.plan(network, inputs, **options)
    _show(plan, json_)


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
) -> None:
    """Convert, then check reconstruction and gradients. Exit code 1 where a check fails."""
    with _reported():
        network, inputs = _prepared(model, input_, as_list, train, pretrained)
        options = _conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        _convert(network, inputs, options)
        with _working("checking reconstruction and gradients"):
            check = revwire.verify(network, inputs)
    _show(check, json_)
    raise typer.Exit(0 if holds(network, check) else 1)


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
) -> None:
    """Convert, then measure memory and time against the original network, and that under checkpointing."""
    with _reported():
        network, inputs = _prepared(model, input_, as_list, train, pretrained)
        options = _conversion(coupling, exact, include, exclude, whole, chunks, checkpoint, memory_budget, rewire)
        _convert(network, inputs, options)
        with _working(f"measuring four variants, {repeats} rounds"):
            profile = revwire.profile(network, inputs, repeats=repeats)
    _show(profile, json_)


@app.command("doctor")
def doctor_command(
    device: Annotated[
        str | None, typer.Option("--device", help="to examine, such as cuda:1; by default the accelerator, or the CPU")
    ] = None,
    json_: Json = False,
) -> None:
    """Versions, devices, kernels and settings, what would be slow or refused, and a test of seconds. Exit code 1 where
    it fails.
    """
    with _reported():
        try:
            chosen = torch.device(device) if device else None
        except RuntimeError as error:
            raise UsageError(f"got the device {device!r}; expected one of PyTorch's ({first_line(error)})") from None
        with _working("examining"):
            found = revwire.doctor(chosen)
    _show(found, json_)
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
) -> None:
    """What revwire gains, and where it gains nothing: memory and time beside checkpointing, on real inputs."""
    with _reported():
        from revwire.demo import run

        passed = run(quick=quick, pretrained=pretrained, **_given(coupling=coupling, picture=picture))
    raise typer.Exit(0 if passed else 1)


def _prepared(
    name: str, inputs: list[str] | None, as_list: bool, train: bool, pretrained: bool
) -> tuple[nn.Module, Any]:
    """The model and its example inputs, once it is known that the one takes the other."""
    shapes = tuple(map(_shape, inputs or ()))
    torch.manual_seed(0)
    with _working(f"building {name}"):
        subject = load(name, pretrained=pretrained)
        examples = subject.example_inputs(shapes, as_list=as_list)
        _try(subject.model.eval(), examples)
    return subject.model.train(train), examples


def _convert(network: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
    with _working("converting"), warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingToRewireWarning)  # it is an error here, which says more
        plan = revwire.report(revwire.convert(network, inputs, **options))
    if not plan.chains:
        raise UsageError(f"nothing was rewired, so there is nothing to check or to measure\n{plan}")


def _try(network: nn.Module, examples: Any) -> None:
    try:
        with torch.no_grad():
            fresh = deepcopy(examples)  # some models write to the list that they are given
            network(**fresh) if isinstance(fresh, dict) else network(*fresh)
    except Exception as error:  # whatever a model raises on an input that does not suit it
        raise UsageError(
            f"the model does not run on this input ({first_line(error)}); pass its shape with --input"
        ) from error


def _shape(text: str) -> Shape:
    try:
        shape = tuple(int(n) for n in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UsageError(f"got the input shape {text!r}; expected positive whole numbers, such as 1,3,224,224")
    return shape


CONVERSION = ("coupling", "exact", "include", "exclude", "whole", "chunks", "checkpoint", "memory_budget", "rewire")


def _conversion(*values: Any) -> dict[str, Any]:
    """The options of a conversion, in the order in which commands list them."""
    return _given(**dict(zip(CONVERSION, values, strict=True)))


def _given(**options: Any) -> dict[str, Any]:
    """Only what was said on the command line, so that defaults are stated once, in the library."""
    return {name: value for name, value in options.items() if value is not None}


def _show(result: Any, as_json: bool) -> None:
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


@contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner with the time gone by, on standard error, while it is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        progress.add_task(what, total=None)
        yield


@contextmanager
def _reported() -> Iterator[None]:
    """Errors that say what to do are one line; any other is a fault, and keeps its traceback."""
    try:
        yield
    except RevwireError as error:
        errors.print(f"revwire: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1 if isinstance(error, ReconstructionError | RangeError) else 2) from None
