"""The frontier of compression and accuracy: the paper's rank schedule, and adaptive ranks.

    python -m experiments.ranks
    python -m experiments.ranks --quick

On VGG-13, `hybrid` falls linearly over the first 30 % of training to 0.5, 0.7 or 0.9 of the
initial rank, and then cuts by the energy rule, which keeps 0.90, 0.95 or 0.99 of the energy;
`adaptive` shares budgets of parameters out among all layers. The ends of the frontier are ranks
that stay as they begin, and the dense network trained by backpropagation. ranks.png shows accuracy
against both sizes, parameters and multiply-accumulates. `experiments.budget` compares schedules
that end at one size; `experiments.study` says what the folder holds and how a study goes on.
"""

from collections.abc import Sequence
from typing import Any

from experiments import curves, flags, study
from experiments.study import Study, Variant
from experiments.study_table import size_columns

DEFAULTS = {"model": "vgg13"}
TARGETS = (0.9, 0.7, 0.5)
ENERGIES = (0.99, 0.95, 0.90)
BUDGETS = (0.5, 0.3, 0.2, 0.1)
SIZES = (("params_ratio", "parameters"), ("macs_ratio", "MACs"))


def _hybrid(target: float, energy: float) -> Variant:
    return Variant(
        f"hybrid_{100 * target:.0f}_{100 * energy:.0f}",
        f"hybrid, {target:g} of r0, energy {energy:.2f}",
        {"rank_schedule": "hybrid", "rank_target": target, "energy": energy},
    )


def _adaptive(budget: float) -> Variant:
    changes = {"rank_schedule": "adaptive", "rank_budget": budget}
    return Variant(f"adaptive_{100 * budget:.0f}", f"adaptive, {budget:.0%}", changes)


HYBRID = {t: [_hybrid(t, e) for e in ENERGIES] for t in TARGETS}
ADAPTIVE = [_adaptive(budget) for budget in BUDGETS]
FIXED = Variant("fixed", "ranks stay at r0", {"method": "ssa", "rank_schedule": "none"})
DENSE = Variant("bp", "bp, dense", {"method": "bp", "rank_schedule": "none"})
VARIANTS = (DENSE, FIXED, *(v for row in HYBRID.values() for v in row), *ADAPTIVE)


STUDY = Study(
    "ranks",
    VARIANTS,
    size_columns,
    "Parameters and MACs are those at the end, for inference, over the dense network's; rank is "
    "the mean over layers of rank over full rank.",
    quick={"model": "mlp", "epochs": 2},
    quick_only=("bp", "hybrid_90_99", "hybrid_50_90", "adaptive_20"),
)


def frontier(rows: Sequence[study.Row], size: str) -> list[curves.Curve]:
    """Accuracy by size, a curve a fall of the hybrid schedule, one of budgets, two ends."""
    groups: list[tuple[str, Sequence[Variant]]] = [
        *((f"hybrid, {target:g} of r0, energy {_listed()}", HYBRID[target]) for target in TARGETS),
        ("adaptive, by budget", ADAPTIVE),
        (FIXED.label, [FIXED]),
        (DENSE.label, [DENSE]),
    ]
    return [curves.Curve(label, _points(rows, variants, size)) for label, variants in groups]


def _listed() -> str:
    return f"{min(ENERGIES):.2f} to {max(ENERGIES):.2f}"


def _points(rows: Sequence[Any], variants: Sequence[Variant], size: str) -> list[curves.Point]:
    points = []
    for variant in variants:
        ours = [r for r in rows if r["variant"] == variant.name and r["status"] != "not_finite"]
        if ours:
            sizes = [100 * r[size] for r in ours]
            points.append(curves.Point.of(sizes, [100 * r["test_accuracy"] for r in ours]))
    return sorted(points, key=lambda p: p.x)


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    panels = [
        curves.Panel(
            f"{name} over the dense network's (%)", "test accuracy (%)", frontier(rows, size)
        )
        for size, name in SIZES
    ]
    curves.draw(settings.folder / "ranks.png", panels)
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(main)
