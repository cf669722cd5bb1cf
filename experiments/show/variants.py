"""The table of a study: a line a variant, means over its seeds."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.show import markdown
from experiments.show.markdown import Table
from experiments.show.runs import Row

# (name of a variant, summaries of its runs that stayed finite) -> the text in its line.
Text = Callable[[str, Sequence[Row]], str]


class Column(NamedTuple):
    """A column: its title, and what it says of a variant."""

    title: str
    text: Text


def finite(rows: Sequence[Row], variant: str | None = None) -> list[Row]:
    """The runs, all or those of a variant, that stayed finite."""
    good = [row for row in rows if row["status"] != "not_finite"]
    return good if variant is None else [row for row in good if row["variant"] == variant]


def table(labels: Mapping[str, str], columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """The results of a study as Markdown; see `lines`."""
    return markdown.table(*lines(labels, columns, rows))


def lines(labels: Mapping[str, str], columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """The results of a study: the header, and a line a variant that has any.

    Args:
      labels: name of a variant -> how the table calls it; in the table's order.
      columns: between the label and the number of seeds.
      rows: summaries with the name of their variant. A run that was not finite counts in the
        state alone, and in no mean.
    """
    body: list[Sequence[str]] = []
    for name, label in labels.items():
        if runs := [r for r in rows if r["variant"] == name]:
            good = finite(runs)
            texts = (c.text(name, good) for c in columns)
            body.append((label, *texts, str(len(good)), _states(runs)))
    return ("variant", *(c.title for c in columns), "n", "state"), body


def _states(rows: Sequence[Row]) -> str:
    counts = Counter(r["status"].replace("_", " ") for r in rows)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def mean(values: Callable[[Row], Iterable[float]], form: str) -> Text:
    """The mean over all values of all runs; a dash of none."""

    def text(variant: str, rows: Sequence[Row]) -> str:
        del variant
        numbers = [value for row in rows for value in values(row)]
        return form.format(statistics.fmean(numbers)) if numbers else "-"

    return text


def spread(value: Callable[[Row], float | None], form: str, unit: str = "") -> Text:
    """Mean ± sample standard deviation; the mean alone of one run, a dash of none."""

    def text(variant: str, rows: Sequence[Row]) -> str:
        del variant
        numbers = [x for row in rows if (x := value(row)) is not None]
        if not numbers:
            return "-"
        deviation = f" ± {statistics.stdev(numbers):{form}}" if len(numbers) > 1 else ""
        return f"{statistics.fmean(numbers):{form}}{deviation}{unit}"

    return text


def per_cent(key: str) -> Text:
    """The mean of a share in the summaries, in per cent."""
    return mean(lambda row: [100 * row[key]], "{:.1f} %")


def angle(key: str) -> Text:
    """The mean over hidden units and seeds of an angle to the truth."""
    return mean(lambda row: row[key][:-1], "{:.1f}°")


accuracy = spread(lambda row: 100 * row["test_accuracy"], ".2f", " %")
# The mean over the last epoch, in training.
train_loss = spread(lambda row: row["train_loss"], ".3f")
# Between local and true gradient.
hidden_angle = angle("angles")


def always(*columns: Column) -> Callable[[Path], Sequence[Column]]:
    """Columns that need nothing but the summaries, whatever the study's folder."""
    return lambda folder: columns


PARAMETERS = Column("parameters", per_cent("params_ratio"))
MACS = Column("MACs", per_cent("macs_ratio"))
RANK = Column("rank", per_cent("rank_fraction"))
# Accuracy beside the size that is left.
SIZES = always(
    Column("test accuracy", accuracy), Column("train loss", train_loss), PARAMETERS, MACS, RANK
)
