"""The page of a study, index.html: its table, every run, curves and pictures, and how it was made.

One file with all pictures in it, which opens from disk.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import results, webpage
from ssa_jax.reporting import plots
from ssa_jax.runs.workdir import Workdir, read_json, write_text

Row = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]

CURVES = "curves.png"


def write(
    folder: Path,
    about: str,
    labels: Mapping[str, str],
    table: Table,
    note: str,
    rows: Sequence[Row],
) -> Path:
    """Draws the curves, and writes the page with them and with the folder's other pictures.

    Args:
      folder: of the study, with its study.json and its cells.
      about: what was trained, in a line.
      labels: name of a variant -> how tables call it.
      table: header and lines of the study's table.
      note: what its columns mean.
      rows: summaries of the cells that are done, with the names of their variants.

    Returns:
      The page.
    """
    record = read_json(folder / "study.json")
    plots.draw_runs(folder / CURVES, _curves(folder, labels, rows))
    parts = [webpage.paragraph(about), webpage.table(*table), webpage.paragraph(note)]
    for file in sorted(folder.glob("*.png")):
        parts.append(webpage.picture(file, f"{file.stem} of the variants"))
    parts += [
        webpage.heading("Runs"),
        webpage.table(*_runs(labels, rows)),
        webpage.heading("Made with"),
        webpage.facts(
            {name: record.get(name) for name in ("commit", "hardware")} | record.get("versions", {})
        ),
        webpage.heading("Settings, which the variants change"),
        webpage.facts(record.get("config", {})),
    ]
    page = folder / "index.html"
    write_text(page, webpage.page(f"Study: {record.get('study')}", parts))
    return page


def _runs(labels: Mapping[str, str], rows: Sequence[Row]) -> Table:
    """A line a run, whose number says how it ended."""
    header = ("variant", *results.HEADER)
    return header, [(labels[row["variant"]], *results.cells(_name(row), row)) for row in rows]


def _name(row: Row) -> str:
    return f"{row['variant']}-seed{row['seed']}"


def _curves(folder: Path, labels: Mapping[str, str], rows: Sequence[Row]) -> list[plots.Named]:
    """The rows of every variant, means over its seeds; of runs that stayed finite."""
    curves = []
    for name, label in labels.items():
        ours = [r for r in rows if r["variant"] == name and r["status"] != "not_finite"]
        metrics = [m for r in ours if (m := Workdir(folder / _name(r)).rows())]
        if metrics:
            # Epochs that all seeds have.
            epochs = zip(*metrics, strict=False)
            curves.append((label, [_mean(epoch) for epoch in epochs]))
    return curves


def _mean(rows: Sequence[Row]) -> Row:
    names = ("epoch", "test_accuracy", "train_loss")
    return {name: statistics.fmean(row[name] for row in rows) for name in names}
