"""Markdown tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

# Header and lines.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """A table whose columns line up; with `right` all but the first are aligned to the right."""
    return tabulate(
        rows,
        header,
        # "github" does not say on which side a column is aligned.
        tablefmt="pipe" if right else "github",
        disable_numparse=True,
        colalign=("left", *["right"] * (len(header) - 1)) if right and rows else None,
    )


def of_records(records: Sequence[Mapping[str, Any]]) -> str:
    """A line a record, whose keys are the header; what is None is left out."""
    rows = [["" if v is None else str(v) for v in record.values()] for record in records]
    return table(list(records[0]), rows)


def filled(whole: Table) -> Table:
    """A table without the columns in which every line has a dash or nothing."""
    header, lines = whole
    kept = [i for i in range(len(header)) if any(line[i] not in ("-", "") for line in lines)]
    if not lines:
        return whole
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]
