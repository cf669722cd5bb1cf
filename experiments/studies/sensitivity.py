"""Where SSA's loss coefficients may lie: α, β, γ and η over decades, and how runs fail beyond.

    python -m experiments.studies.sensitivity
    python -m experiments.studies.sensitivity --quick --dataset=digits --model=mlp

Two planes of the four coefficients, task against alignment and orthogonality against Hoyer, the
other two at their defaults. Accuracies are of a validation split, a tenth of the training images
that nothing trains on, since coefficients are chosen by them. As in
`experiments.studies.ablation` the twins are fixed, since only then does the alignment term do
anything, and ranks fall by the hybrid schedule, whose first phase has the Hoyer term.

Each run is one of OUTCOMES; sensitivity.png shows the planes.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.show import variants
from experiments.show.runs import Row
from experiments.show.variants import Column, finite
from experiments.studies import ablation, program, study
from experiments.studies.study import Study, Variant
from ssa_jax.reporting import plots

# Shares of the study's best accuracy: at least this much is stable, less than this collapsed.
STABLE, COLLAPSED = 0.95, 0.5
# Times the accuracy of guessing, below which a run has collapsed however the best one fares.
LEAST_CHANCES = 3
# Mark of a picture -> what it means.
OUTCOMES = {"S": "stable", "w": "weaker", "P": "over-pruned", "C": "collapsed", "X": "diverged"}
# What the terms of the coefficients are called.
TERMS = {"alpha": "task", "beta": "alignment", "gamma": "orthogonality", "hoyer": "Hoyer"}
PRUNED = "sudden drop at a rank step"


class Plane(NamedTuple):
    """Two fields of the config, their symbols, and the decades (powers of ten) of each."""

    x: str
    y: str
    symbols: tuple[str, str]
    x_decades: Sequence[int]
    y_decades: Sequence[int]

    def name(self, i: int, j: int) -> str:
        """The variant at decades i of x and j of y."""
        return f"{self.x}_1e{i}_{self.y}_1e{j}"


PLANES = (
    Plane("alpha", "beta", ("α", "β"), range(-2, 3), range(-4, 1)),
    Plane("gamma", "hoyer", ("γ", "η"), range(-4, 1), range(-5, 0)),
)

VARIANTS = tuple(
    Variant(
        plane.name(i, j),
        f"{plane.symbols[0]} = 1e{i}, {plane.symbols[1]} = 1e{j}",
        {plane.x: 10.0**i, plane.y: 10.0**j},
    )
    for plane in PLANES
    for i in plane.x_decades
    for j in plane.y_decades
)

# Of each plane two corners that lie opposite each other.
CORNERS = [plane.name(plane.x_decades[k], plane.y_decades[k]) for plane in PLANES for k in (0, -1)]


def outcome(row: Row, best: float) -> str:
    """The mark of a run.

    Args:
      row: its summary.
      best: highest validation accuracy of the study.
    """
    if row["status"] == "not_finite":
        return "X"
    share = row["test_accuracy"] / best if best else 0.0
    guessing = row["test_accuracy"] * row["classes"] < LEAST_CHANCES
    if share >= STABLE and not guessing:
        return "S"
    if any(finding["name"] == PRUNED for finding in row["diagnosis"]):
        return "P"
    return "C" if share < COLLAPSED or guessing else "w"


def worst(rows: Sequence[Row], best: float) -> str:
    """The mark of a variant: that of its seed that fares worst; empty without a run."""
    marks = [outcome(row, best) for row in rows]
    return max(marks, key=list(OUTCOMES).index, default="")


def best_accuracy(rows: Sequence[Row]) -> float:
    """The highest validation accuracy of runs that stayed finite; 0 without any."""
    return max((r["test_accuracy"] for r in finite(rows)), default=0.0)


def columns(folder: Path) -> list[Column]:
    """From the summaries; the outcome of a variant is that of all runs in the folder."""
    rows = study.read_results(folder)
    best = best_accuracy(rows)

    def mark(name: str, _: Sequence[Row]) -> str:
        return OUTCOMES[worst([row for row in rows if row["variant"] == name], best)]

    return [
        Column("validation accuracy", variants.accuracy),
        Column("train loss", variants.train_loss),
        variants.RANK,
        Column("outcome", mark),
    ]


def panel(plane: Plane, rows: Sequence[Row]) -> plots.Panel:
    """A plane's mean accuracies in per cent, NaN where there is none, and its marks."""
    best = best_accuracy(rows)
    values: list[list[float]] = []
    marks: list[list[str]] = []
    for j in plane.y_decades:
        points = [[r for r in rows if r["variant"] == plane.name(i, j)] for i in plane.x_decades]
        good = [[r["test_accuracy"] for r in finite(p)] for p in points]
        values.append([100 * statistics.fmean(g) if g else float("nan") for g in good])
        marks.append([worst(p, best) for p in points])
    x, y = (
        f"{symbol} ({TERMS[field]})"
        for symbol, field in zip(plane.symbols, (plane.x, plane.y), strict=True)
    )
    return plots.Panel(
        (x, y),
        [f"1e{i}" for i in plane.x_decades],
        [f"1e{j}" for j in plane.y_decades],
        values,
        marks,
    )


def draw(file: Path, rows: Sequence[Row]) -> Path | None:
    """Draws the planes."""
    legend = ", ".join(f"{mark} {meaning}" for mark, meaning in OUTCOMES.items())
    title = f"Validation accuracy (%): {legend}"
    return plots.draw_panels(file, [panel(plane, rows) for plane in PLANES], title)


STUDY = Study(
    "sensitivity",
    VARIANTS,
    columns,
    f"Outcomes are those of the worst seed: stable with at least {STABLE:.0%} of the best "
    f"accuracy here; else over-pruned where a rank step shows a sudden drop, collapsed below "
    f"{COLLAPSED:.0%} of the best or {LEAST_CHANCES} times chance, weaker in between; "
    "diverged is a loss that is not finite.",
    draw,
    defaults={**ablation.DEFAULTS, "validation": 0.1},
    seeds=1,
    quick={"model": "mlp"},
    quick_only=CORNERS,
)

if __name__ == "__main__":
    program.run(STUDY)
