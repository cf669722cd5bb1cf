"""What each part of SSA is worth: the whole method, and the method without one part at a time.

    python -m experiments.ablation
    python -m experiments.ablation --quick --dataset=digits --model=mlp

The parts are the terms of the local loss (cross-entropy, alignment, orthogonality, Hoyer), the
tangent projection and the retraction. The twins are fixed here, since only then does the alignment
term do anything: tracked twins take the weights' factors at every refresh, where the term
vanishes. Ranks fall by the hybrid schedule, whose first phase has the Hoyer term.

All flags of a run change the base; `experiments.study` says what the folder holds and how a study
goes on.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from experiments import flags, study
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
)


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(functools.partial(study.main, STUDY))
