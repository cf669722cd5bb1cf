"""How fast training converges: loss and gradient on the manifold, over many seeds.

    python -m experiments.convergence
    python -m experiments.convergence --quick

A perceptron, twenty seeds: backpropagation, backpropagation on factors, direct feedback alignment
and direct SSA. Two lengths are followed by step: the training loss, the mean over an epoch, and
the norm of the true gradient on a fixed training batch, tangent to the Stiefel manifolds where a
layer holds factors (`ssa_jax.training.metrics.tangent`). The empirical rate of a run is the slope,
by least squares over its epochs, of the logarithm of either against the logarithm of the step: a
rate of -1/2 says that it falls as 1/√t. Rates compare methods; norms compare on the same
coordinates alone, those of dense weights or those of factors.

convergence.png shows the mean over seeds and one standard deviation around it. `experiments.study`
says what the folder holds and how a study goes on.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments import curves, flags, study
from experiments.study import Study, Variant
from experiments.study_table import Column, accuracy, spread

DEFAULTS = {"model": "mlp"}
SEEDS = 20
# What is followed, and what the picture calls it.
FOLLOWED = (
    ("train_loss", "training loss (nats)"),
    ("gradient_norm", "norm of the gradient on the manifold"),
)

VARIANTS = (
    Variant("bp", "bp", {"method": "bp"}),
    Variant("svd_bp", "svd_bp", {"method": "svd_bp"}),
    Variant("dfa", "dfa", {"method": "dfa"}),
    Variant("ssa", "ssa direct", {"method": "ssa"}),
)


def measured(rows: Sequence[study.Row]) -> study.Row:
    """The steps at which the epochs ended, and what is followed there."""
    names = ("step", *(name for name, _ in FOLLOWED))
    return {f"{name}_by_epoch": [row[name] for row in rows] for name in names}


def rate(steps: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log value against log step by least squares; None of fewer than two points."""
    if len(steps) < 2:
        return None
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])


def _rate(name: str) -> Callable[[str, Sequence[study.Row]], str]:
    def text(variant: str, rows: Sequence[study.Row]) -> str:
        del variant
        rates = (rate(r["step_by_epoch"], r[f"{name}_by_epoch"]) for r in rows)
        return spread([r for r in rates if r is not None], ".3f")

    return text


def _last(name: str) -> Callable[[str, Sequence[study.Row]], str]:
    def text(variant: str, rows: Sequence[study.Row]) -> str:
        del variant
        return spread([r[f"{name}_by_epoch"][-1] for r in rows], ".4f")

    return text


def columns(folder: Path) -> list[Column]:
    """Where the seeds ended, and how fast they went there."""
    del folder
    return [
        Column("test accuracy", accuracy),
        Column("train loss", _last("train_loss")),
        Column("rate of the loss", _rate("train_loss")),
        Column("gradient norm", _last("gradient_norm")),
        Column("rate of the norm", _rate("gradient_norm")),
    ]


STUDY = Study(
    "convergence",
    VARIANTS,
    columns,
    "The train loss is the mean over the last epoch; the gradient norm is that of the true "
    "gradient on a fixed training batch after it, tangent to the manifolds where a layer holds "
    "factors. Rates are slopes of the logarithm against the logarithm of the step, by least "
    "squares over all epochs of a run.",
    measured,
    quick={"epochs": 3, "train_size": 1280, "seeds": 2},
    quick_only=("bp", "dfa", "ssa"),
)


def panels(rows: Sequence[study.Row]) -> list[curves.Panel]:
    """What is followed by step, means over seeds; both axes logarithmic."""
    good = [r for r in rows if r["status"] != "not_finite" and r["step_by_epoch"]]
    return [
        curves.Panel("step", title, [_curve(v, name, good) for v in VARIANTS], log="xy")
        for name, title in FOLLOWED
        if good
    ]


def _curve(variant: Variant, name: str, rows: Sequence[study.Row]) -> curves.Curve:
    ours = [r for r in rows if r["variant"] == variant.name]
    # Epochs that all seeds have.
    steps = zip(*(r["step_by_epoch"] for r in ours), strict=False)
    values = zip(*(r[f"{name}_by_epoch"] for r in ours), strict=False)
    points = [curves.Point.of(x, y) for x, y in zip(steps, values, strict=True)]
    return curves.Curve(variant.label, points)


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    if drawn := panels(rows):
        curves.draw(settings.folder / "convergence.png", drawn)
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define(DEFAULTS, seeds=SEEDS)
    flags.run_program(main)
