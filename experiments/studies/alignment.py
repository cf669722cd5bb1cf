"""How the angles between local and true gradients move while a perceptron trains.

    python -m experiments.studies.alignment
    python -m experiments.studies.alignment --quick

A three-layer perceptron, fifty epochs: backpropagation, feedback alignment, direct feedback
alignment, and direct SSA. The angle is that of each hidden unit, over all its parameters, on a
fixed training batch after every epoch; the last unit's is zero with all of them. The expectation
to test, which alignment.png marks: below 40° with SSA by epoch 50, above 60° with direct feedback
alignment.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column, Text, finite
from experiments.studies import program, study
from experiments.studies.study import Study, Variant, of_methods

# Epochs in the table, beside the last.
SHOWN = (1, 2, 5, 10, 25, 50)
# What is expected: SSA below the first, direct feedback alignment above the second; in degrees.
EXPECTED = (40.0, 60.0)

VARIANTS = of_methods("bp", "fa", "dfa", "ssa")


def measured(rows: Sequence[Row]) -> Row:
    """The angles of hidden units, (epochs, units)."""
    return {"hidden_angles": [row["angles"][:-1] for row in rows]}


def at_epoch(epoch: int) -> Text:
    """The angles of all hidden units after an epoch, next to the image first; means over seeds."""

    def text(variant: str, rows: Sequence[Row]) -> str:
        del variant
        angles = [r["hidden_angles"][epoch - 1] for r in rows if len(r["hidden_angles"]) >= epoch]
        means = (statistics.fmean(unit) for unit in zip(*angles, strict=True))
        return " ".join(f"{angle:.0f}°" for angle in means) or "-"

    return text


def columns(folder: Path) -> list[Column]:
    """Accuracy at the end, and angles at the epochs of `SHOWN` and at the last."""
    longest = max((len(r["hidden_angles"]) for r in study.read_results(folder)), default=0)
    epochs = sorted({*(e for e in SHOWN if e < longest), longest} - {0})
    return [
        Column("test accuracy", variants.accuracy),
        *(Column(f"epoch {epoch}", at_epoch(epoch)) for epoch in epochs),
    ]


def panels(rows: Sequence[Row]) -> list[charts.Panel]:
    """The angles of every hidden unit by epoch, a panel a unit."""
    good = [row for row in finite(rows) if row["hidden_angles"]]
    return [
        charts.Panel(
            "epoch",
            "angle to the true gradient (degrees)",
            [_curve(v, unit, finite(good, v.name)) for v in VARIANTS],
            f"Hidden unit {unit + 1}",
            levels=EXPECTED,
        )
        for unit in range(len(good[0]["hidden_angles"][0]) if good else 0)
    ]


def _curve(variant: Variant, unit: int, rows: Sequence[Row]) -> charts.Curve:
    return charts.over_epochs(
        variant.label,
        rows,
        lambda row: range(1, len(row["hidden_angles"]) + 1),
        lambda row: [angles[unit] for angles in row["hidden_angles"]],
    )


STUDY = Study(
    "alignment",
    VARIANTS,
    columns,
    "Angles are between the local and the true gradient of each hidden unit, over all its "
    "parameters, next to the image first; means over seeds.",
    lambda file, rows: charts.draw(file, panels(rows)),
    measured,
    defaults={"model": "mlp", "epochs": 50},
    quick={"epochs": 3, "train_size": 1280},
)

if __name__ == "__main__":
    program.run(STUDY)
