"""How fast training converges: loss and gradient on the manifold, over many seeds.

    python -m experiments.studies.convergence
    python -m experiments.studies.convergence --quick

A perceptron, twenty seeds: backpropagation, backpropagation on factors, direct feedback alignment
and direct SSA. Two lengths are followed by step: the training loss, the mean over an epoch, and
the norm of the true gradient on a fixed training batch, tangent to the Stiefel manifolds where a
layer holds factors (`ssa_jax.training.metrics.tangent`). The empirical rate of a run is the slope,
by least squares over its epochs, of the logarithm of either against the logarithm of the step: a
rate of -1/2 says that it falls as 1/√t. Rates compare methods; norms compare on the same
coordinates alone, those of dense weights or those of factors.

convergence.png shows the mean over seeds and one standard deviation around it.
"""

from collections.abc import Sequence

import numpy as np

from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column, Text, finite, spread
from experiments.studies import program
from experiments.studies.study import Study, Variant, of_methods

# What is followed, and what the picture calls it.
FOLLOWED = {
    "train_loss": "training loss",
    "gradient_norm": "length of the true gradient",
}

VARIANTS = of_methods("bp", "svd_bp", "dfa", "ssa")


def measured(rows: Sequence[Row]) -> Row:
    """The steps at which the epochs ended, and what is followed there."""
    return {f"{name}_by_epoch": [row[name] for row in rows] for name in ("step", *FOLLOWED)}


def rate(steps: Sequence[float], values: Sequence[float]) -> float | None:
    """Slope of log value against log step by least squares; None of fewer than two points."""
    if len(steps) < 2:
        return None
    return float(np.polyfit(np.log(steps), np.log(values), 1)[0])


def _rate(name: str) -> Text:
    return spread(lambda row: rate(row["step_by_epoch"], row[f"{name}_by_epoch"]), ".3f")


def _last(name: str) -> Text:
    return spread(lambda row: row[f"{name}_by_epoch"][-1], ".4f")


def panels(rows: Sequence[Row]) -> list[charts.Panel]:
    """What is followed by step, means over seeds; both axes logarithmic."""
    good = [r for r in finite(rows) if r["step_by_epoch"]]
    return [
        charts.Panel("step", title, [_curve(v, name, good) for v in VARIANTS], log="xy")
        for name, title in FOLLOWED.items()
        if good
    ]


def _curve(variant: Variant, name: str, rows: Sequence[Row]) -> charts.Curve:
    return charts.over_epochs(
        variant.label,
        finite(rows, variant.name),
        lambda row: row["step_by_epoch"],
        lambda row: row[f"{name}_by_epoch"],
    )


STUDY = Study(
    "convergence",
    VARIANTS,
    variants.always(
        Column("test accuracy", variants.accuracy),
        Column("train loss", _last("train_loss")),
        Column("rate of the loss", _rate("train_loss")),
        Column("gradient norm", _last("gradient_norm")),
        Column("rate of the norm", _rate("gradient_norm")),
    ),
    "The train loss is the mean over the last epoch; the gradient norm is that of the true "
    "gradient on a fixed training batch after it, tangent to the manifolds where a layer holds "
    "factors. Rates are slopes of the logarithm against the logarithm of the step, by least "
    "squares over all epochs of a run.",
    lambda file, rows: charts.draw(file, panels(rows)),
    measured,
    defaults={"model": "mlp"},
    seeds=20,
    quick={"epochs": 3, "train_size": 1280, "seeds": 2},
    quick_only=("bp", "dfa", "ssa"),
)

if __name__ == "__main__":
    program.run(STUDY)
