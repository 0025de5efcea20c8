"""What is logged while a run goes on; a resumed run goes on in the same files."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


def loggers(folder: Path, resumed: int | None) -> list[Logger]:
    """A table (CSV) and TensorBoard's files in a run's folder.

    Args:
        resumed: the optimizer step from which a run goes on, in the files of before, where lines of later steps go;
            None: it begins, in files of its own.
    """
    version = None if resumed is None else _last(folder / "csv")
    if version is None:
        return [CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")]
    table = CSVLogger(folder, name="csv", version=version)
    _continue(table, resumed or 0)
    return [table, TensorBoardLogger(folder, name="tensorboard", version=version, purge_step=resumed)]


def _last(folder: Path) -> int | None:
    numbers = [int(path.name.removeprefix("version_")) for path in folder.glob("version_*")]
    return max(numbers, default=None)


@rank_zero_only
def _continue(table: CSVLogger, step: int) -> None:
    """Begin with the lines of before; Lightning's logger would begin with none. Lines count steps from 0."""
    path = Path(table.log_dir, "metrics.csv")
    rows: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        path.unlink()
    for row in rows:
        if int(row["step"]) < step:
            table.experiment.log_metrics({k: v for k, v in row.items() if v and k != "step"}, int(row["step"]))
    table.save()
