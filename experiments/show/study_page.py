"""The page of a study, index.html: its table, every run, curves and pictures, and how it was made.

One file with all pictures in it, which opens from disk.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.show import markdown, runs, webpage
from experiments.show.markdown import Table
from experiments.show.runs import Row
from experiments.show.variants import finite
from experiments.show.webpage import Picture, Section
from ssa_jax.reporting import plots
from ssa_jax.runs.workdir import Workdir, read_json, write_text


def write_table(folder: Path, about: str, table: Table, note: str) -> None:
    """Writes table.md, as `write` shows it on the page."""
    write_text(
        folder / "table.md", f"{about}\n\n{markdown.table(*markdown.filled(table))}\n\n{note}\n"
    )


def write(folder: Path, about: str, table: Table, note: str, more: Sequence[Section] = ()) -> None:
    """Writes the page of a study with the pictures that its folder holds, and prints its table.

    Args:
      folder: of the study, with its study.json.
      about: what was measured, in a line.
      table: header and lines of its table.
      note: what its columns mean.
      more: sections before those of its origin.
    """
    record, page = read_json(folder / "study.json"), folder / "index.html"
    pictures = [Picture(f, f"{f.stem} of the variants") for f in sorted(folder.glob("*.png"))]
    made = {name: record.get(name) for name in ("commit", "hardware")} | record.get("versions", {})
    sections = [
        Section(text=about, table=table, note=note, pictures=pictures),
        *more,
        webpage.facts("Made with", made),
    ]
    if config := record.get("config"):
        sections.append(webpage.facts("Settings, which the variants change", config))
    write_text(page, webpage.page(f"Study: {record.get('study')}", sections))
    print("\n" + (folder / "table.md").read_text())
    print(f"results: {folder}\npage: {page}")


def each_run(labels: Mapping[str, str], rows: Sequence[Row]) -> Section:
    """A line a run, whose name tells its workdir and whose state how it ended."""
    lines = [(labels[row["variant"]], *runs.line(_name(row), row)) for row in rows]
    return Section("Runs", table=(("variant", *runs.HEADER), lines))


def _name(row: Row) -> str:
    return f"{row['variant']}-seed{row['seed']}"


def draw_curves(folder: Path, labels: Mapping[str, str], rows: Sequence[Row]) -> Path | None:
    """Draws curves.png: every variant by epoch, means over its seeds; of runs that stayed finite.

    Args:
      folder: of the study, with its workdirs.
      labels: name of a variant -> how tables call it.
      rows: summaries of the runs that are done, with the names of their variants.
    """
    curves = []
    for name, label in labels.items():
        metrics = [m for r in finite(rows, name) if (m := Workdir(folder / _name(r)).rows())]
        if metrics:
            # Epochs that all seeds have.
            means = [_mean(epoch) for epoch in zip(*metrics, strict=False)]
            curves.append(plots.Named(label, means, label))
    return plots.draw_runs(folder / "curves.png", curves)


def _mean(rows: Sequence[Row]) -> Row:
    names = ("epoch", "test_accuracy", "train_loss")
    return {name: statistics.fmean(row[name] for row in rows) for name in names}
