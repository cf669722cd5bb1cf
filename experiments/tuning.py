"""The learning rate of every method by itself, so that none is compared at another one's.

    python -m experiments.tuning
    python -m experiments.tuning --quick --dataset=digits --model=mlp

Backpropagation, direct feedback alignment and direct SSA at learning rates from a quarter of the
default to eight times it. Accuracies are of a validation split, a tenth of the training images that
nothing trains on, since the rate is chosen by them. `--optimizer=momentum` asks the same of another
optimiser, whose rates are the flag's times the same factors.

tuning.png shows accuracy against rate. All flags of a run change the base; `experiments.study` says
what the folder holds and how a study goes on.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import curves, flags, study
from experiments.study import Study, Variant
from experiments.study_table import Column, accuracy, train_loss
from ssa_jax.runs.config import Config

DEFAULTS = {"validation": 0.1}
METHODS = {"bp": "bp", "dfa": "dfa", "ssa": "ssa direct"}
RATES = tuple(factor * Config().learning_rate for factor in (0.25, 0.5, 1, 2, 4, 8))


def _name(method: str, rate: float) -> str:
    return f"{method}_{rate:g}"


VARIANTS = tuple(
    Variant(_name(method, rate), f"{label}, {rate:g}", {"method": method, "learning_rate": rate})
    for method, label in METHODS.items()
    for rate in RATES
)


def _finite(rows: Sequence[study.Row], name: str) -> list[float]:
    return [
        100 * r["test_accuracy"]
        for r in rows
        if r["variant"] == name and r["status"] != "not_finite"
    ]


def best_rate(method: str, rows: Sequence[study.Row]) -> float | None:
    """The rate of the highest mean validation accuracy; None where no run stayed finite."""
    means = {r: statistics.fmean(v) for r in RATES if (v := _finite(rows, _name(method, r)))}
    return max(means, key=lambda rate: means[rate], default=None)


def columns(folder: Path) -> list[Column]:
    """From the summaries; the best rate is that of all runs in the folder."""
    rows = study.read_results(folder)
    best = {_name(m, rate) for m in METHODS if (rate := best_rate(m, rows)) is not None}
    return [
        Column("validation accuracy", accuracy),
        Column("train loss", train_loss),
        Column("best of its method", lambda name, _: "yes" if name in best else ""),
    ]


STUDY = Study(
    "tuning",
    VARIANTS,
    columns,
    "Accuracies are of a tenth of the training images, which nothing trained on. A best rate at "
    "either end of the list says that the list is too short.",
    quick={"model": "mlp"},
    quick_only=[_name(m, rate) for m in METHODS for rate in RATES[1:4:2]],
)


def panel(rows: Sequence[study.Row]) -> curves.Panel:
    """Validation accuracy by rate, a curve a method."""
    return curves.Panel(
        "learning rate (thousandths)",
        "validation accuracy (%)",
        [
            curves.Curve(
                label,
                [
                    curves.Point.of([1e3 * rate], values)
                    for rate in RATES
                    if (values := _finite(rows, _name(method, rate)))
                ],
            )
            for method, label in METHODS.items()
        ],
        log="x",
    )


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    curves.draw(settings.folder / "tuning.png", [panel(rows)])
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(main)
