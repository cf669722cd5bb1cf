"""What each part of SSA is worth: the whole method, and the method without one part at a time.

    python -m experiments.ablation
    python -m experiments.ablation --quick --dataset=digits --model=mlp

The parts are the terms of the local loss (cross-entropy, alignment, orthogonality, Hoyer), the
tangent projection and the retraction. The twins are fixed here, since only then does the alignment
term do anything: tracked twins take the weights' factors at every refresh, where the term
vanishes. Ranks fall by the hybrid schedule, whose first phase has the Hoyer term.

ablation.png is the table's picture. All flags of a run change the base; `experiments.study` says
what the folder holds and how a study goes on.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import bars, flags, study
from experiments.study import Study, Variant
from experiments.study_table import Column, accuracy, hidden_angle, per_cent

DEFAULTS = {
    "rank_schedule": "hybrid",
    "beta": 1e-3,
    "gamma": 1e-3,
    "feedback_update": "fixed",
}

VARIANTS = (
    Variant("full", "full", {}),
    Variant("no_task", "without cross-entropy", {"alpha": 0.0}),
    Variant("no_alignment", "without alignment", {"beta": 0.0}),
    Variant("no_orthogonality", "without orthogonality", {"gamma": 0.0}),
    Variant("no_hoyer", "without Hoyer", {"hoyer": 0.0}),
    Variant("no_projection", "without projection", {"projection": "none"}),
    # Its drift is what the variant shows, so nothing repairs it.
    Variant("no_retraction", "without retraction", {"retraction": "none", "drift_bound": 0.0}),
)


def drift(name: str, rows: Sequence[study.Row]) -> str:
    """Largest |XᵀX - I| over U, V and seeds after the last epoch."""
    del name
    return f"{max(r['drift'] for r in rows):.0e}" if rows else "-"


def columns(folder: Path) -> list[Column]:
    """Everything from the summaries."""
    del folder
    return [
        Column("test accuracy", accuracy),
        Column("rank", per_cent("rank_fraction")),
        Column("MACs", per_cent("macs_ratio")),
        Column("drift", drift),
        Column("hidden angle", hidden_angle),
    ]


STUDY = Study(
    "ablation",
    VARIANTS,
    columns,
    "Rank is relative to full rank and MACs to the dense network; drift is the largest |XᵀX - I| "
    "over U, V and seeds; angles are between local and true gradient, the mean over hidden units.",
    quick={"model": "mlp"},
)

# Key of a summary -> what the picture calls it.
SHOWN = {"test_accuracy": "test accuracy", "rank_fraction": "rank", "macs_ratio": "MACs"}


def panel(rows: Sequence[study.Row]) -> bars.Panel:
    """Accuracy, rank and MACs of every variant that has a run."""
    good = [row for row in rows if row["status"] != "not_finite"]
    found = {v.label: [r for r in good if r["variant"] == v.name] for v in VARIANTS}
    found = {label: ours for label, ours in found.items() if ours}
    return bars.Panel(
        "% (rank of full rank, MACs of the dense network's)",
        list(found),
        [
            bars.Bars(name, [[100 * r[key] for r in ours] for ours in found.values()])
            for key, name in SHOWN.items()
        ],
    )


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    if (drawn := panel(rows)).names:
        bars.draw(settings.folder / "ablation.png", [drawn])
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(main)
