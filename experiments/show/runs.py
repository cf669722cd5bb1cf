"""What runs reached and cost, a line a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.show import markdown
from ssa_jax.methods import ON_FACTORS

Row = dict[str, Any]

# Settings by which no two runs are the same.
OWN = ("workdir", "resume")
# Of `table`, which takes summaries of finished runs.
SHORT = ("method", "test accuracy", "hidden angles", "parameters", "rank", "MACs", "time", "state")
# Of `line`, which takes a run that goes on as well.
HEADER = (
    "run", "state", "epochs", "test accuracy", "train loss", "rank", "ranks", "parameters", "MACs",
    "wall time", "compile time", "diagnosis",
)  # fmt: skip


def text(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    """A number of a row as a text; a dash where it is missing."""
    value = row.get(key)
    return "-" if value is None else form.format(value if scale == 1 else scale * value)


def _sizes(row: Row) -> tuple[str, str]:
    """Parameters and MACs, with their shares of the dense network's."""

    def size(key: str, form: str) -> str:
        share = text(row, f"{key}_ratio", "{:.0f} %", 100)
        return "-" if row.get(key) is None else f"{text(row, key, form, 1e-6)} ({share})"

    return size("params", "{:.3f} M"), size("macs", "{:.2f} M")


def line(name: str, row: Row) -> Sequence[str]:
    """The line of a run under `HEADER`.

    Args:
      name: of the run.
      row: its summary or, while it runs, its last epoch's row and a status; a dash for what is
        missing.
    """
    ranks, findings = row.get("ranks") or {}, row.get("diagnosis")
    return (
        name,
        row["status"].replace("_", " "),
        # The last row of a run knows its epoch, the summary how many are whole.
        text(row, "epochs" if "epochs" in row else "epoch", "{:.0f}"),
        text(row, "test_accuracy", "{:.2f} %", 100),
        text(row, "train_loss", "{:.3f}"),
        text(row, "rank_fraction", "{:.1f} %", 100) if row.get("factorized") else "-",
        " ".join(map(str, ranks.values())) or "-",
        *_sizes(row),
        text(row, "wall_s", "{:.1f} s"),
        text(row, "compile_s", "{:.1f} s"),
        "-" if findings is None else ", ".join(f["name"] for f in findings) or "healthy",
    )


def method(summary: Row) -> str:
    """The method of a run, with what changes its network."""
    parts, size = [summary["method"]], summary.get("unit_size") or 1
    if summary["method"] == "ssa":
        # Runs stored before there was a choice to tell were direct, and looked at no unit ahead.
        share, energy = (summary.get(f"feedback_{of}") or 1 for of in ("rank", "energy"))
        sequential = "sequential" if share == 1 else f"walking through {share:g} of its directions"
        if energy < 1:
            most = "" if share == 1 else f", {share:g} of its directions at most"
            sequential = f"walking through {energy:g} of the error's energy{most}"
        n = summary.get("feedback_lookahead")
        direct = ["direct", *[f"units of {size}"] * (size > 1), *[f"{n} ahead"] * bool(n)]
        parts.append(sequential if summary.get("feedback") == "sequential" else ", ".join(direct))
    elif size > 1:
        parts.append(f"in units of {size}")
    if summary["factorized"] != (summary["method"] in ON_FACTORS):
        parts.append("on factors" if summary["factorized"] else "(dense)")
    if summary["rank_schedule"] != "none" and summary["factorized"]:
        parts.append(f"({summary['rank_schedule']} ranks)")
    return " ".join(parts)


def names(paths: Sequence[Path]) -> list[str]:
    """For each folder the fewest last parts of its path that no other one ends in."""
    parts = [path.resolve().parts for path in paths]

    def alone(own: tuple[str, ...]) -> str:
        for n in range(1, len(own)):
            if sum(other[-n:] == own[-n:] for other in parts) == 1:
                return "/".join(own[-n:])
        return str(Path(*own))

    return [alone(own) for own in parts]


def table(summaries: Sequence[Row], called: Sequence[str] = (), configs: Sequence[Row] = ()) -> str:
    """One line a run, as Markdown.

    Angles are between the local and the true gradient of each hidden unit, first to last; ratios
    are to the dense network of the same name. Where runs of one method are told apart by neither
    network nor ranks, a line begins with the name of the run and ends with the settings in which
    it differs from them.

    Args:
      summaries: of finished runs.
      called: their names.
      configs: their settings.
    """
    lines = [_short(summary) for summary in summaries]
    labels = [line[0] for line in lines]
    if not called or len(set(labels)) == len(labels):
        return markdown.table(*markdown.filled((SHORT, lines)))
    told = []
    for name, line, config in zip(called, lines, configs, strict=True):
        others = [c for c, label in zip(configs, labels, strict=True) if label == line[0]]
        told.append((name, *line, _apart(config, others) or "-"))
    return markdown.table(*markdown.filled((("run", *SHORT, "settings"), told)))


def _apart(config: Row, others: Sequence[Row]) -> str:
    """The settings in which some of the others differ from a run, of those that both have."""
    own = (k for k, v in config.items() if k not in OWN and any(o.get(k, v) != v for o in others))
    return ", ".join(f"{k}={config[k]}" for k in own)


def _short(summary: Row) -> Sequence[str]:
    params, macs = _sizes(summary)
    return (
        method(summary),
        text(summary, "test_accuracy", "{:.2f} %", 100),
        " ".join(f"{angle:.0f}°" for angle in (summary["angles"] or [])[:-1]) or "-",
        params,
        text(summary, "rank_fraction", "{:.0f} %", 100) if summary["factorized"] else "dense",
        macs,
        text(summary, "wall_s", "{:.0f} s"),
        summary["status"],
    )
