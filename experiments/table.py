"""A Markdown table of runs, from their summary.json files alone.

python -m experiments.table WORKDIR [WORKDIR ...]
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ssa_jax.methods import ON_FACTORS
from ssa_jax.runs.workdir import runs_in

Row = dict[str, Any]

HEADER = ("method", "test accuracy", "hidden angles", "parameters", "rank", "MACs", "time", "state")


def label(summary: Row) -> str:
    """Method, with what changes its network."""
    parts = [summary["method"]]
    if summary["method"] == "ssa":
        # Runs stored before there was a choice to tell were direct, and looked at no unit ahead.
        share = summary.get("feedback_rank") or 1
        sequential = "sequential" if share == 1 else f"walking through {share:g} of its directions"
        ahead = f"direct, {n} ahead" if (n := summary.get("feedback_lookahead")) else "direct"
        parts.append(sequential if summary.get("feedback") == "sequential" else ahead)
    if summary["factorized"] != (summary["method"] in ON_FACTORS):
        parts.append("on factors" if summary["factorized"] else "(dense)")
    if summary["rank_schedule"] != "none" and summary["factorized"]:
        parts.append(f"({summary['rank_schedule']} ranks)")
    return " ".join(parts)


def _cells(s: Row) -> tuple[str, ...]:
    hidden = (s["angles"] or [])[:-1]
    accuracy = s["test_accuracy"]
    return (
        label(s),
        "-" if accuracy is None else f"{100 * accuracy:.2f} %",
        " ".join(f"{angle:.0f}°" for angle in hidden) or "-",
        f"{s['params'] / 1e6:.3f} M ({100 * s['params_ratio']:.0f} %)",
        f"{100 * s['rank_fraction']:.0f} %" if s["factorized"] else "dense",
        f"{s['macs'] / 1e6:.2f} M ({100 * s['macs_ratio']:.0f} %)",
        f"{s['wall_s']:.0f} s",
        s["status"],
    )


def table(summaries: Sequence[Row]) -> str:
    """One line a run.

    Angles are between the local and the true gradient of each hidden unit, first to last; ratios
    are to the dense network of the same name.
    """
    return markdown(HEADER, [_cells(s) for s in summaries])


def markdown(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up."""
    rows = [header, *cells]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main(folders: Sequence[str]) -> int:
    """Prints the table of the given workdirs, of seeds each; 2 if one has no summary."""
    asked = any(name in ("-h", "--help") for name in folders)
    if asked or not folders:
        print(__doc__)
        return 0 if asked else 2
    summaries = []
    for folder in (path for name in folders for path in runs_in(Path(name))):
        try:
            summaries.append(json.loads((folder / "summary.json").read_text()))
        except (OSError, ValueError) as e:
            print(f"error: {folder} holds no summary.json of a run: {e}", file=sys.stderr)
            return 2
    print(table(summaries))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
