"""The learning rate of every method by itself, so that none is compared at another one's.

    python -m experiments.studies.tuning
    python -m experiments.studies.tuning --quick --dataset=digits --model=mlp

Every method, SSA one unit ahead, at learning rates from a quarter of the default to eight
times it; `--only=bp_0.001,bp_0.002` takes some. Accuracies are of a validation split, a tenth of
the training images that nothing trains on, since the rate is chosen by them.
`--optimizer=momentum` asks the same of another optimiser, whose rates are the flag's times the same
factors.

tuning.png shows accuracy against rate. All flags of a run change the base.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column, finite
from experiments.studies import program, study
from experiments.studies.study import Study, Variant, of_methods
from ssa_jax import methods
from ssa_jax.errors import ConfigError
from ssa_jax.runs.config import Config

METHODS = {one.name: one for one in of_methods(*methods.METHODS)}
RATES = tuple(factor * Config().learning_rate for factor in (0.25, 0.5, 1, 2, 4, 8))


def _name(method: str, rate: float) -> str:
    return f"{method}_{rate:g}"


VARIANTS = tuple(
    Variant(_name(method, rate), f"{form.label}, {rate:g}", {**form.changes, "learning_rate": rate})
    for method, form in METHODS.items()
    for rate in RATES
)


def best_rate(method: str, rows: Sequence[Row]) -> float | None:
    """The rate of the highest mean validation accuracy; None where no run stayed finite."""
    runs = {rate: finite(rows, _name(method, rate)) for rate in RATES}
    means = {
        rate: statistics.fmean(r["test_accuracy"] for r in rs) for rate, rs in runs.items() if rs
    }
    return max(means, key=lambda rate: means[rate], default=None)


def _best(rows: Sequence[Row]) -> dict[str, float]:
    """The best rate of every method that has runs."""
    return {m: rate for m in METHODS if (rate := best_rate(m, rows)) is not None}


def best_rates(folder: Path) -> dict[str, float]:
    """The best rate of every method that a folder of this study has runs of.

    Raises:
      ConfigError: none.
    """
    rates = _best(study.read_results(folder)) if (folder / "results.jsonl").is_file() else {}
    if not rates:
        raise ConfigError(f"{folder} holds no runs of `experiments.studies.tuning`")
    return rates


def columns(folder: Path) -> list[Column]:
    """From the summaries; the best rate is that of all runs in the folder."""
    best = {_name(m, rate) for m, rate in _best(study.read_results(folder)).items()}
    return [
        Column("validation accuracy", variants.accuracy),
        Column("train loss", variants.train_loss),
        Column("best of its method", lambda name, _: "yes" if name in best else ""),
    ]


def panel(rows: Sequence[Row]) -> charts.Panel:
    """Validation accuracy by rate, a curve a method."""
    rates = {_name(m, rate): rate for m in METHODS for rate in RATES}
    curves = [
        charts.over_variants(
            form.label, [_name(m, rate) for rate in RATES], rows, lambda name, _: 1e3 * rates[name]
        )
        for m, form in METHODS.items()
        if any(finite(rows, _name(m, rate)) for rate in RATES)
    ]
    return charts.Panel("learning rate × 1000", "validation accuracy (%)", curves, log="x")


STUDY = Study(
    "tuning",
    VARIANTS,
    columns,
    "Accuracies are of a tenth of the training images, which nothing trained on. A best rate at "
    "either end of the list says that the list is too short.",
    lambda file, rows: charts.draw(file, [panel(rows)]),
    defaults={"validation": 0.1},
    quick={"model": "mlp"},
    quick_only=[_name(m, rate) for m in ("bp", "dfa", "ssa") for rate in RATES[1:4:2]],
)

if __name__ == "__main__":
    program.run(STUDY)
