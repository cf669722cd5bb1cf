"""How the angles between local and true gradients move while a perceptron trains.

    python -m experiments.alignment
    python -m experiments.alignment --quick

A three-layer perceptron, fifty epochs: backpropagation, feedback alignment, direct feedback
alignment, and direct SSA. The angle is that of each hidden unit, over all its parameters, on a
fixed training batch after every epoch; the last unit's is zero with all of them. The expectation
to test, which alignment.png marks: below 40° with SSA by epoch 50, above 60° with direct feedback
alignment. `experiments.study` says what the folder holds and how a study goes on.
"""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments import curves, flags, study
from experiments.study import Study, Variant
from experiments.study_table import Column, accuracy

DEFAULTS = {"model": "mlp", "epochs": 50}
# Epochs in the table, beside the last.
SHOWN = (1, 2, 5, 10, 25, 50)
# What is expected: SSA below the first, direct feedback alignment above the second; in degrees.
EXPECTED = (40.0, 60.0)

VARIANTS = (
    Variant("bp", "bp", {"method": "bp"}),
    Variant("fa", "fa", {"method": "fa"}),
    Variant("dfa", "dfa", {"method": "dfa"}),
    Variant("ssa", "ssa direct", {"method": "ssa"}),
)


def measured(rows: Sequence[study.Row]) -> study.Row:
    """The angles of hidden units, (epochs, units)."""
    return {"hidden_angles": [row["angles"][:-1] for row in rows]}


def _finite(rows: Sequence[study.Row]) -> list[study.Row]:
    return [row for row in rows if row["status"] != "not_finite" and row["hidden_angles"]]


def at_epoch(epoch: int) -> Callable[[str, Sequence[study.Row]], str]:
    """The angles of all hidden units after an epoch, next to the image first; means over seeds."""

    def text(name: str, rows: Sequence[study.Row]) -> str:
        del name
        found = [r["hidden_angles"][epoch - 1] for r in rows if len(r["hidden_angles"]) >= epoch]
        return " ".join(f"{statistics.fmean(unit):.0f}°" for unit in zip(*found, strict=True))

    return lambda name, rows: text(name, rows) or "-"


def columns(folder: Path) -> list[Column]:
    """Accuracy at the end, and angles at the epochs of `SHOWN` and at the last."""
    longest = max((len(r["hidden_angles"]) for r in study.read_results(folder)), default=0)
    epochs = sorted({*(e for e in SHOWN if e < longest), longest} - {0})
    return [
        Column("test accuracy", accuracy),
        *(Column(f"epoch {epoch}", at_epoch(epoch)) for epoch in epochs),
    ]


STUDY = Study(
    "alignment",
    VARIANTS,
    columns,
    "Angles are between the local and the true gradient of each hidden unit, over all its "
    "parameters, next to the image first; means over seeds.",
    measured,
    quick={"epochs": 3, "train_size": 1280},
)


def panels(rows: Sequence[study.Row]) -> list[curves.Panel]:
    """The angles of every hidden unit by epoch, a panel a unit."""
    good = _finite(rows)
    units = len(good[0]["hidden_angles"][0]) if good else 0
    return [
        curves.Panel(
            "epoch",
            "angle to the true gradient (degrees)",
            [_curve(v, unit, [r for r in good if r["variant"] == v.name]) for v in VARIANTS],
            f"Hidden unit {unit + 1}",
            levels=EXPECTED,
        )
        for unit in range(units)
    ]


def _curve(variant: Variant, unit: int, rows: Sequence[study.Row]) -> curves.Curve:
    """Means over seeds, of the epochs that all of them have."""
    by_epoch = list(zip(*(r["hidden_angles"] for r in rows), strict=False))
    points = [
        curves.Point.of([epoch], [angles[unit] for angles in found])
        for epoch, found in enumerate(by_epoch, start=1)
    ]
    return curves.Curve(variant.label, points)


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    if drawn := panels(rows):
        curves.draw(settings.folder / "alignment.png", drawn)
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(main)
