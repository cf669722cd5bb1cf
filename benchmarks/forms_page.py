"""The sections of RECORDS.md in which forms of one computation stand side by side."""

from collections.abc import Sequence
from typing import Any

from benchmarks.page import Row, format_ms, markdown, setting


def _forms(rows: Sequence[Row], field: str, names: Sequence[str]) -> str:
    """A line a case: milliseconds and MiB of every form, and the ratios to the first one.

    Args:
      rows: of a record; what is not of `programs.compare` says which case a row belongs to.
      field: what the rows call the form.
      names: the fields that name a case.
    """
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[n] for n in names), []).append(row)
    forms = [row[field] for row in next(iter(cases.values()))]
    table = []
    for case, found in cases.items():
        first, *others = found
        sizes = (r["temp_bytes"] for r in found)
        table.append(
            [
                ", ".join(str(part) for part in case),
                *(format_ms({"median_ms": r["ms"]}) for r in found),
                *(f"{r['ms'] / first['ms']:.2f}" for r in others),
                *("-" if size is None else f"{size / 2**20:.1f}" for size in sizes),
            ]
        )
    header = [
        ", ".join(names), *(f"{form}, ms" for form in forms),
        *(f"{form} / {forms[0]}" for form in forms[1:]), *(f"{form}, MiB" for form in forms),
    ]  # fmt: skip
    return markdown(header, table)


def _wins(rows: Sequence[Row], field: str, ratio: str, part: str) -> str:
    """How often each other form of a part is the faster one, and by which ratios."""
    base = rows[0][field]
    told = []
    for form in dict.fromkeys(r[field] for r in rows if r[field] != base):
        found = [r[ratio] for r in rows if r[field] == form and r[part] == rows[-1][part]]
        faster = sum(r < 1 for r in found)
        told.append(
            f"{form} {faster} of {len(found)} times (ratios {min(found):.2f} to {max(found):.2f})"
        )
    return f"Faster than {base}, {rows[-1][part]}: {'; '.join(told)}."


def pair(record: dict[str, Any]) -> str:
    """The section of `benchmarks.pair`."""
    rows = record["rows"]
    return "\n\n".join(
        [
            "## A factorised convolution: two convolutions, products, merged",
            f"Milliseconds at batch {rows[0]['batch']}, median of rounds in which all forms took "
            "turns, compilation excluded; MiB of temporary arrays. Products: windows of x times V, "
            "windows of that times U. Merged: one convolution with the kernel of the factors. "
            "Local: the output and the gradients of U, s and V, which is what a unit of a direct "
            "method computes.",
            setting(record, "python -m benchmarks.pair --json benchmarks/records/pair.json"),
            _wins(rows, "form", "ratio_to_convolutions", "pass"),
            _forms(rows, "form", ("shape", "rank", "pass")),
        ]
    )


def stacked(record: dict[str, Any]) -> str:
    """The section of `benchmarks.stacked`."""
    rows = record["rows"]
    return "\n\n".join(
        [
            "## Equal units in turn and stacked",
            f"Milliseconds at batch {rows[0]['batch']}, median of rounds in which both forms took "
            "turns, compilation excluded; MiB of temporary arrays. Hidden units of chains of equal "
            "ones, ssa at rank 0.25; stacked: one `jax.vmap` over arrays that are stacked already. "
            "Manifold: projection and retraction. Update: gradients and the whole chain.",
            setting(record, "python -m benchmarks.stacked --json benchmarks/records/stacked.json"),
            _wins(rows, "form", "ratio_to_in_turn", "part"),
            _forms(rows, "form", ("model", "units", "part")),
        ]
    )
