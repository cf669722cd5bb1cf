"""What each part of SSA is worth: the whole method, and the method without one part at a time.

    python -m experiments.studies.ablation
    python -m experiments.studies.ablation --quick --dataset=digits --model=mlp

The parts are the terms of the local loss (cross-entropy, alignment, orthogonality, Hoyer), the
tangent projection and the retraction. The twins are fixed here, since only then does the alignment
term do anything: tracked twins take the weights' factors at every refresh, where the term
vanishes. Ranks fall by the hybrid schedule, whose first phase has the Hoyer term.

ablation.png is the table's picture. All flags of a run change the base.
"""

from collections.abc import Sequence

from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column
from experiments.studies import program
from experiments.studies.study import Study, Variant

DEFAULTS = {"rank_schedule": "hybrid", "beta": 1e-3, "gamma": 1e-3, "feedback_update": "fixed"}

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
# Key of a summary -> what the picture calls it.
SHOWN = {"test_accuracy": "test accuracy", "rank_fraction": "rank", "macs_ratio": "MACs"}


def drift(variant: str, rows: Sequence[Row]) -> str:
    """Largest |XᵀX - I| over U, V and seeds after the last epoch."""
    del variant
    return f"{max(r['drift'] for r in rows):.0e}" if rows else "-"


def panel(rows: Sequence[Row]) -> charts.BarPanel:
    """Accuracy, rank and MACs of every variant that has a finite run."""
    runs = {v.label: ours for v in VARIANTS if (ours := variants.finite(rows, v.name))}
    return charts.BarPanel(
        "accuracy; rank of full rank; MACs of the dense network's (%)",
        list(runs),
        [
            charts.Bars(name, [[100 * r[key] for r in ours] for ours in runs.values()])
            for key, name in SHOWN.items()
        ],
    )


STUDY = Study(
    "ablation",
    VARIANTS,
    variants.always(
        Column("test accuracy", variants.accuracy),
        variants.RANK,
        variants.MACS,
        Column("drift", drift),
        Column("hidden angle", variants.hidden_angle),
    ),
    "Rank is relative to full rank and MACs to the dense network; drift is the largest |XᵀX - I| "
    "over U, V and seeds; angles are between local and true gradient, the mean over hidden units.",
    lambda file, rows: charts.draw(file, [panel(rows)]),
    defaults=DEFAULTS,
    quick={"model": "mlp"},
)

if __name__ == "__main__":
    program.run(STUDY)
