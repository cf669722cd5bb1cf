"""What is told of a run's rows: a line an epoch, and what the summary has of them."""

from collections.abc import Sequence
from typing import Any

import jax

Array = jax.Array
Row = dict[str, Any]


# As many as have a place in a line.
_MOST_RANKS = 16


def line(row: Row, epochs: int) -> str:
    """The row of an epoch as one line for the terminal."""
    hidden = row["angles"][:-1]
    stored = list(row["ranks"].values())
    shown = f"{min(stored)} to {max(stored)}" if len(stored) > _MOST_RANKS else str(stored)
    parts = [
        f"epoch {row['epoch']}/{epochs}",
        f"loss {row['train_loss']:.4f}",
        f"test {shown_score(row)}",
        f"mean angle {sum(hidden) / max(1, len(hidden)):.1f}°",
        f"ranks {shown}" if stored else "",
        f"{row['images_per_second']:.0f} img/s",
        f"{row['wall_s']:.0f} s",
    ]
    return "  ".join(p for p in parts if p)


def score(row: Row) -> float:
    """By which the best epoch is chosen: test accuracy, or minus the test loss without one."""
    return row["test_accuracy"] if "test_accuracy" in row else -row["test_loss"]


def shown_score(row: Row) -> str:
    """Test accuracy in per cent, or the test loss."""
    if "test_accuracy" in row:
        return f"{100 * row['test_accuracy']:.2f} %"
    return f"loss {row['test_loss']:.4g}"


def settings(config: Any) -> Row:
    """The settings by which tables name a run."""
    return {
        "method": config.method,
        "model": config.model,
        "dataset": config.dataset,
        "seed": config.seed,
        "factorized": config.factorized,
        "rank_schedule": config.rank_schedule,
        "learning_rate": config.learning_rate,
        "feedback": config.feedback if config.method == "ssa" else None,
        "feedback_lookahead": config.feedback_lookahead if config.method == "ssa" else None,
        "unit_size": config.unit_size,
        "feedback_rank": config.feedback_rank if config.method == "ssa" else None,
        "feedback_energy": config.feedback_energy if config.method == "ssa" else None,
    }


def last_epoch(rows: Sequence[Row]) -> Row:
    """What the last row says; None for each where there is no row."""
    last = rows[-1] if rows else {}
    names = (
        "test_accuracy",
        "test_top5_accuracy",
        "test_loss",
        "train_loss",
        "angles",
        "weight_angles",
        "signal_angles",
        "drift",
    )
    return {name: last.get(name) for name in names}


def best_epoch(rows: Sequence[Row]) -> Row:
    """The whole epoch of best `score`, the later of equals, whose checkpoint is kept."""
    best = max(rows, key=lambda row: (score(row), row["epoch"]), default={})
    return {"best_epoch": best.get("epoch"), "best_test_accuracy": best.get("test_accuracy")}
