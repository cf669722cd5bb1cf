"""The table, picture and page of `experiments.studies.overhead`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import contestants
from experiments.show import charts, study_page
from experiments.show.markdown import Table
from experiments.show.runs import Row, text
from ssa_jax.models import MODELS
from ssa_jax.runs.workdir import read_json, write_text

NAME = "overhead"


class Column(NamedTuple):
    """A column of the table: the key of its value in a row, and how it is written."""

    key: str
    title: str
    form: str
    scale: float = 1.0


COLUMNS = (
    Column("params_ratio", "parameters", "{:.2f}"),
    Column("macs_ratio", "MACs of bp", "{:.2f}"),
    Column("ratio_to_bp", "time of bp", "{:.2f}"),
    Column("temp_ratio", "temporary of bp", "{:.2f}"),
    Column("ms", "step time", "{:.2f} ms"),
    Column("temp_bytes", "temporary", "{:.1f} MiB", 2**-20),
    Column("peak_bytes", "peak", "{:.0f} MiB", 2**-20),
    Column("manifold_share", "projection and retraction", "{:.1f} %", 100),
    Column("refresh_share", "refresh", "{:.1f} %", 100),
    Column("svd_ms", "SVD", "{:.1f} ms"),
    Column("svd_steps", "SVD in steps", "{:.1f}"),
)
SHOWN = ("macs_ratio", "ratio_to_bp", "temp_ratio")
NOTE = (
    "Time (with its share of a refresh), MACs and temporary arrays are of one training step over "
    "those of backpropagation written by hand, parameters over the dense network's; peak is the "
    "largest size of a process that does nothing else. Projection and retraction, and refresh, are "
    "shares of the step's own time, measured apart; the SVD of all layers, done once, is in steps."
)


def file_of(folder: Path, model: str) -> Path:
    """The file of a network's rows."""
    return folder / f"{model}.json"


def results(folder: Path) -> list[Row]:
    """The rows of all networks that are measured, each beside its reference; writes them too."""
    rows = []
    for model in MODELS:
        rows += beside_reference(read_json(file_of(folder, model)).get("rows", []))
    write_text(folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return rows


def beside_reference(measured: Sequence[Row]) -> list[Row]:
    """The rows of networks with MACs and temporary arrays over those of their reference."""
    bases = {r["model"]: r for r in measured if r["method"] == contestants.REFERENCE}
    return [
        {
            **row,
            "macs_ratio": row["macs"] / base["macs"],
            "temp_ratio": row["temp_bytes"] and row["temp_bytes"] / base["temp_bytes"],
        }
        for row in measured
        for base in [bases[row["model"]]]
    ]


def label(row: Row) -> str:
    """Method, rank and memory mode, as the table calls them."""
    if row["rank"] is None:
        return row["method"]
    return f"{row['method']} at {row['rank']:g}, {row['memory']}"


def table(rows: Sequence[Row]) -> Table:
    """A line a row; a dash for what is not measured."""
    lines = [
        (row["model"], label(row), *(text(row, c.key, c.form, c.scale) for c in COLUMNS))
        for row in rows
    ]
    return ("model", "step", *(c.title for c in COLUMNS)), lines


def panels(rows: Sequence[Row]) -> list[charts.BarPanel]:
    """Promise and measurement of every step but the reference, a panel a network."""
    models: dict[str, list[Row]] = {row["model"]: [] for row in rows}
    for row in rows:
        if row["method"] != contestants.REFERENCE:
            models[row["model"]].append(row)

    def bars(column: Column, ours: Sequence[Row]) -> charts.Bars:
        key = column.key
        return charts.Bars(column.title, [[row[key]] if row[key] else [] for row in ours])

    shown = [c for c in COLUMNS if c.key in SHOWN]
    return [
        charts.BarPanel(
            "times that of hand-written backpropagation",
            [label(row) for row in ours],
            [bars(column, ours) for column in shown],
            model,
            level=1.0,
        )
        for model, ours in models.items()
    ]


def write(folder: Path) -> list[Row]:
    """Writes results.jsonl, table.md, picture and page of what is measured; prints the table."""
    rows = results(folder)
    lines = table(rows)
    about = f"One training step at batch {read_json(folder / 'study.json')['batch_size']}."
    study_page.write_table(folder, about, lines, NOTE)
    charts.draw(folder / f"{NAME}.png", panels(rows))
    study_page.write(folder, about, lines, NOTE)
    return rows
