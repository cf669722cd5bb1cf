"""The table of a study: a line a variant, means over its seeds."""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.table import markdown

Row = dict[str, Any]


class Column(NamedTuple):
    """A column: its title, and (name of a variant, summaries of its seeds) -> the cell's text."""

    title: str
    text: Callable[[str, Sequence[Row]], str]


def table(labels: Mapping[str, str], columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The results of a study as Markdown; see `cells`."""
    return markdown(*cells(labels, columns, rows))


def cells(
    labels: Mapping[str, str], columns: Sequence[Column], rows: Sequence[Row]
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The results of a study: the header, and a line a variant that has any.

    Args:
      labels: name of a variant -> how the table calls it; in the table's order.
      columns: between the label and the number of seeds.
      rows: summaries with the name of their variant. A run that was not finite counts in the
        state alone, and in no mean.
    """
    lines: list[Sequence[str]] = []
    for name, label in labels.items():
        ours = [r for r in rows if r["variant"] == name]
        good = [r for r in ours if r["status"] != "not_finite"]
        if ours:
            texts = (c.text(name, good) for c in columns)
            lines.append((label, *texts, str(len(good)), _states(ours)))
    return ("variant", *(c.title for c in columns), "n", "state"), lines


def _states(rows: Sequence[Row]) -> str:
    counts = Counter(r["status"].replace("_", " ") for r in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def spread(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """Mean ± sample standard deviation; the mean alone of one value, a dash of none."""
    if not values:
        return "-"
    text = f"{statistics.fmean(values):{form}}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):{form}}"
    return f"{text} {unit}".rstrip()


def accuracy(name: str, rows: Sequence[Row]) -> str:
    """Test accuracy in per cent."""
    del name
    return spread([100 * r["test_accuracy"] for r in rows], unit="%")


def train_loss(name: str, rows: Sequence[Row]) -> str:
    """Cross-entropy over the last epoch, in training."""
    del name
    return spread([r["train_loss"] for r in rows], ".3f")


def hidden_angle(name: str, rows: Sequence[Row]) -> str:
    """Angle between local and true gradient, mean over hidden units and seeds."""
    del name
    angles = [a for r in rows for a in r["angles"][:-1]]
    return f"{statistics.fmean(angles):.1f}°" if angles else "-"


def per_cent(key: str) -> Callable[[str, Sequence[Row]], str]:
    """The mean of a share in the summaries, in per cent."""

    def text(name: str, rows: Sequence[Row]) -> str:
        del name
        return f"{100 * statistics.fmean(r[key] for r in rows):.1f} %" if rows else "-"

    return text


def size_columns(folder: Path) -> list[Column]:
    """Accuracy beside the size that is left, all from the summaries."""
    del folder
    return [
        Column("test accuracy", accuracy),
        Column("train loss", train_loss),
        Column("parameters", per_cent("params_ratio")),
        Column("MACs", per_cent("macs_ratio")),
        Column("rank", per_cent("rank_fraction")),
    ]
