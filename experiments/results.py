"""What a run reached and cost, as the cells of a line."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]

HEADER = (
    "run", "state", "epochs", "test accuracy", "train loss", "rank", "ranks", "parameters", "MACs",
    "wall time", "compile time", "diagnosis",
)  # fmt: skip


def cells(name: str, found: Row) -> Sequence[str]:
    """The line of a run under `HEADER`.

    Args:
      name: of the run.
      found: its summary or, while it runs, its last row and a status; a dash for what is missing.
    """

    def text(key: str, form: str, scale: float = 1.0) -> str:
        value = found.get(key)
        return "-" if value is None else form.format(scale * value)

    ranks, findings = found.get("ranks") or {}, found.get("diagnosis")
    return (
        name,
        found["status"].replace("_", " "),
        # The last row of a run knows its epoch, the summary how many are whole.
        text("epochs" if "epochs" in found else "epoch", "{:.0f}"),
        text("test_accuracy", "{:.2f} %", 100),
        text("train_loss", "{:.3f}"),
        text("rank_fraction", "{:.1f} %", 100) if found.get("factorized") else "-",
        " ".join(str(rank) for rank in ranks.values()) or "-",
        _size(text("params", "{:.3f} M", 1e-6), text("params_ratio", "{:.0f} %", 100)),
        _size(text("macs", "{:.2f} M", 1e-6), text("macs_ratio", "{:.0f} %", 100)),
        text("wall_s", "{:.1f} s"),
        text("compile_s", "{:.1f} s"),
        "-" if findings is None else ", ".join(f["name"] for f in findings) or "healthy",
    )


def _size(size: str, ratio: str) -> str:
    return size if size == "-" else f"{size} ({ratio})"
