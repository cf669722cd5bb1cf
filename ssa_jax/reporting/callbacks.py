"""Callbacks by name: called with the row of each epoch."""

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssa_jax.errors import ConfigError

Row = dict[str, Any]
Callback = Callable[[Row], None]


def _scalars(row: Row) -> dict[str, float]:
    return {n: v for n, v in row.items() if isinstance(v, int | float)}


def to_csv(folder: Path) -> Callback:
    """Writes the numbers of each epoch to metrics.csv in the run's folder."""
    rows: list[Row] = []

    def write(row: Row) -> None:
        rows.append(_scalars(row))
        names = list(dict.fromkeys(name for r in rows for name in r))
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    return write


def to_wandb(folder: Path) -> Callback:
    """Logs the numbers of each epoch to Weights & Biases, offline unless WANDB_MODE says else.

    A run of its own, named like the folder, for every run of ours: wandb would else hand out the
    one that is open and drop the rows of all that follow, whose steps begin again.

    Raises:
      ConfigError: wandb is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("--callbacks=wandb needs wandb: pip install 'ssa_jax[wandb]'")
    import os

    import wandb

    run = wandb.init(
        project="ssa_jax",
        name=folder.name,
        dir=str(folder.parent),
        mode=os.environ.get("WANDB_MODE", "offline"),
        reinit="create_new",
    )
    return lambda row: run.log(_scalars(row), step=row["step"])


CALLBACKS: dict[str, Callable[[Path], Callback]] = {"csv": to_csv, "wandb": to_wandb}
