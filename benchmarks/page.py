"""What the sections of RECORDS.md are made of."""

import functools
from collections.abc import Sequence
from typing import Any

from experiments.show.markdown import table

Row = dict[str, Any]

# Of numbers, but for the first column.
markdown = functools.partial(table, right=True)


def setting(record: dict[str, Any], command: str) -> str:
    """What a record was measured on, as a paragraph."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    notes = f" {record['notes']}" if record.get("notes") else ""
    return f"`{command}`; {record['hardware']}; {versions}; commit `{record['commit']}`.{notes}"


def format_ms(row: Row | None) -> str:
    """Milliseconds of a row's ``median_ms`` in three digits; a dash for no row."""
    if row is None:
        return "-"
    return f"{row['median_ms']:.0f}" if row["median_ms"] >= 100 else f"{row['median_ms']:.3g}"


def find(rows: Sequence[Row], **fields: Any) -> Row | None:
    """The first row with these fields."""
    return next((r for r in rows if all(r[k] == v for k, v in fields.items())), None)
