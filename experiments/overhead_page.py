"""The table, picture and page of `experiments.overhead`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import contestants
from experiments import bars, webpage
from experiments.table import markdown
from ssa_jax.models import MODELS
from ssa_jax.runs.workdir import read_json, write_text

NAME = "overhead"

Row = dict[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


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


def cell(folder: Path, model: str) -> Path:
    """The file of a network's rows."""
    return folder / f"{model}.json"


def results(folder: Path) -> list[Row]:
    """The rows of all networks that are measured, each beside its reference; writes them too."""
    rows = []
    for model in MODELS:
        found = read_json(cell(folder, model)).get("rows")
        if not found:
            continue
        (base,) = (r for r in found if r["method"] == contestants.REFERENCE)
        rows += [
            {
                **row,
                "macs_ratio": row["macs"] / base["macs"],
                "temp_ratio": row["temp_bytes"] and row["temp_bytes"] / base["temp_bytes"],
            }
            for row in found
        ]
    write_text(folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    return rows


def label(row: Row) -> str:
    """Method, rank and memory mode, as the table calls them."""
    if row["rank"] is None:
        return row["method"]
    return f"{row['method']} at {row['rank']:g}, {row['memory']}"


def table(rows: Sequence[Row]) -> Table:
    """A line a row; a dash for what is not measured."""
    lines = [(row["model"], label(row), *(_text(row, c) for c in COLUMNS)) for row in rows]
    return ("model", "step", *(c.title for c in COLUMNS)), lines


def _text(row: Row, column: Column) -> str:
    value = row.get(column.key)
    return "-" if value is None else column.form.format(column.scale * value)


def panels(rows: Sequence[Row]) -> list[bars.Panel]:
    """Promise and measurement of every step but the reference, a panel a network."""
    models = dict.fromkeys(row["model"] for row in rows)
    ours = {m: [r for r in rows if r["model"] == m and r["method"] != contestants.REFERENCE]
            for m in models}  # fmt: skip
    return [
        bars.Panel(
            "over hand-written bp",
            [label(row) for row in found],
            [bars.Bars(c.title, [[row[c.key]] if row[c.key] else [] for row in found])
             for c in COLUMNS if c.key in SHOWN],
            model,
            level=1.0,
        )
        for model, found in ours.items()
    ]  # fmt: skip


def write(folder: Path) -> list[Row]:
    """Writes results.jsonl, table.md, the picture and the page of what is measured so far."""
    rows, record = results(folder), read_json(folder / "study.json")
    header, lines = table(rows)
    about = f"One training step at batch {record['batch_size']}."
    write_text(folder / "table.md", f"{about}\n\n{markdown(header, lines)}\n\n{NOTE}\n")
    drawn = bars.draw(folder / f"{NAME}.png", panels(rows))
    made = {"commit": record["commit"], "hardware": record["hardware"], **record["versions"]}
    parts_of_page = [
        webpage.paragraph(about),
        webpage.table(header, lines),
        webpage.paragraph(NOTE),
        *([webpage.picture(drawn, "MACs, time and temporary arrays over bp's")] if drawn else []),
        webpage.heading("Made with"),
        webpage.facts(made),
    ]
    write_text(folder / "index.html", webpage.page(f"Study: {NAME}", parts_of_page))
    return rows
