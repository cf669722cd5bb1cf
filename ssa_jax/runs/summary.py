"""What a run tells of itself: the row of an epoch, its line on the terminal, the summary."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from ssa_jax.data import Images
from ssa_jax.networks.units import Unit
from ssa_jax.runs import build
from ssa_jax.runs.build import Costs
from ssa_jax.runs.config import Config
from ssa_jax.training import train
from ssa_jax.training.metrics import Probe
from ssa_jax.types import TrainState

Array = jax.Array
Row = dict[str, Any]


def probe_row(probe: Probe) -> Row:
    """The part of an epoch's row that a probe measured."""
    return {
        "angles": _degrees(probe.angles),
        "weight_angles": _degrees(probe.weight_angles),
        "signal_angles": _degrees(probe.signal_angles),
        "subspace_angles": _degrees(probe.subspace_angles),
        "gradient_ratios": [float(r) for r in probe.gradient_ratios],
        "signal_ratios": [float(r) for r in probe.signal_ratios],
        "drift": float(probe.drift),
        "gradient_norm": float(probe.gradient_norm),
        **{f"local_{k}": [float(x) for x in v] for k, v in probe.terms.items()},
    }


def _degrees(angles: Iterable[Array | None]) -> list[float | None]:
    return [None if a is None else round(float(a), 3) for a in angles]


def line(row: Row, epochs: int) -> str:
    """The row of an epoch as one line for the terminal."""
    hidden = row["angles"][:-1]
    stored = list(row["ranks"].values())
    parts = [
        f"epoch {row['epoch']}/{epochs}",
        f"loss {row['train_loss']:.4f}",
        f"test {shown_score(row)}",
        f"angle {sum(hidden) / max(1, len(hidden)):.1f}°",
        f"ranks {stored}" if stored else "",
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


def settings(config: Config) -> Row:
    """The settings by which tables name a run."""
    return {
        "method": config.method,
        "model": config.model,
        "dataset": config.dataset,
        "seed": config.seed,
        "factorized": config.factorized,
        "rank_schedule": config.rank_schedule,
        "feedback": config.feedback if config.method == "ssa" else None,
        "feedback_lookahead": config.feedback_lookahead if config.method == "ssa" else None,
        "feedback_rank": config.feedback_rank if config.method == "ssa" else None,
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


def sizes(units: Sequence[Unit], state: TrainState, data: Images, dense: Costs) -> Row:
    """Steps, classes, ranks and costs of a state, the latter also relative to the dense network."""
    size = build.network_costs(tuple(units), state.params, state.mstate, data)
    return {
        "steps": int(state.step),
        "classes": data.classes,
        "params": size.params,
        "params_ratio": size.params / dense.params,
        "macs": size.macs,
        "macs_ratio": size.macs / dense.macs,
        "ranks": train.ranks(state.params),
        "rank_fraction": build.rank_fraction(state.params),
    }
