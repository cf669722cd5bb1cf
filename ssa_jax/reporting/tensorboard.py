"""What a run tells TensorBoard: scalars, heat maps of ranks and angles, histograms of spectra."""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssa_jax.errors import ConfigError
from ssa_jax.reporting import plots

Row = dict[str, Any]

# Entries of a row with one value, and those with one a unit.
_SCALARS = {
    "train_loss": "loss/train",
    "test_loss": "loss/test",
    "train_accuracy": "accuracy/train",
    "test_accuracy": "accuracy/test",
    "loss_before_truncation": "truncation/loss_before",
    "loss_after_truncation": "truncation/loss_after",
    "drift": "run/drift",
    "learning_rate": "run/learning_rate",
    "images_per_second": "run/images_per_second",
    "wall_s": "run/wall_s",
}
_A_UNIT = ("angles", "weight_angles", "signal_angles", "subspace_angles", "gradient_ratios",
           "signal_ratios")  # fmt: skip


def require() -> None:
    """Raises ConfigError where tensorboardX is not installed."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError("--tensorboard needs tensorboardX: pip install 'ssa_jax[tensorboard]'")


class Board:
    """Event files in a folder; `require` says whether there can be any.

    Args:
      folder: where TensorBoard looks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer: Any = None
        self._epoch = 0

    def write(self, rows: Sequence[Row], spectra: Mapping[str, np.ndarray]) -> None:
        """Writes an epoch.

        Args:
          rows: of the epochs so far, this one last.
          spectra: name of a factorised layer -> its singular values, (r,).
        """
        row = rows[-1]
        epoch = row["epoch"]
        writer = self._writer_from(epoch)
        for tag, value in scalars(row).items():
            writer.add_scalar(tag, value, epoch)
        for name, s in spectra.items():
            # What truncation zeroed waits for compaction and is no part of the spectrum.
            if np.any(s):
                writer.add_histogram(f"spectrum/{_tag(name)}", np.abs(s[s != 0]), epoch)
        for tag, picture in _pictures(rows).items():
            writer.add_image(tag, picture, epoch, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        """Ends the event file."""
        if self._writer is not None:
            self._writer.close()

    def _writer_from(self, epoch: int) -> Any:
        """The writer; after a rollback or a resumption one that takes back what comes later."""
        if self._writer is None or epoch <= self._epoch:
            from tensorboardX import SummaryWriter

            self.close()
            files = len(list(self.folder.iterdir())) if self.folder.exists() else 0
            self._writer = SummaryWriter(
                str(self.folder),
                # The first of a folder has nothing to take back.
                purge_step=epoch if files else None,
                # Names tell whole seconds alone, and are written over.
                filename_suffix=f".{files:04}",
            )
        self._epoch = epoch
        return self._writer


def scalars(row: Row) -> dict[str, float]:
    """Each number of a row by its tag; units count from 1, as in the plots."""
    values = {tag: row[name] for name, tag in _SCALARS.items() if name in row}
    terms = [name for name in row if name.startswith("local_")]
    for name in (*_A_UNIT, *terms):
        for i, value in enumerate(row.get(name, ()), start=1):
            if value is not None:
                values[f"{name}/unit_{i}"] = value
    return values | {f"rank/{_tag(k)}": rank for k, rank in row["ranks"].items()}


def _tag(path: str) -> str:
    return plots.layer(path).replace(": ", "/").replace(" ", "_")


def _pictures(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The heat maps, (height, width, 3) in uint8; none without matplotlib."""
    units = [f"unit {i}" for i in range(1, len(rows[-1]["angles"]) + 1)]
    angles = [r["angles"] for r in rows]
    # One scale for all epochs, so that a look through the pictures compares.
    widest = max(90.0, *(max(row) for row in angles))
    maps = {"angles": (units, angles, widest, "Angle to the true gradient (degrees)")}
    layers = list(rows[-1]["ranks"])
    if layers:
        ranks = [[r["ranks"][layer] / rows[0]["ranks"][layer] for layer in layers] for r in rows]
        maps["ranks"] = (
            [plots.layer(path) for path in layers],
            ranks,
            1.0,
            "Stored rank over that after the first epoch",
        )
    epochs, pictures = [r["epoch"] for r in rows], {}
    for tag, (labels, values, top, title) in maps.items():
        file = io.BytesIO()
        if plots.draw_heat_map(file, np.array(values, float).T, labels, epochs, top, title):
            pictures[f"maps/{tag}"] = np.asarray(Image.open(file).convert("RGB"))
    return pictures
