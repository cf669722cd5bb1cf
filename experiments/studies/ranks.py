"""The frontier of compression and accuracy: the paper's rank schedule, and adaptive ranks.

    python -m experiments.studies.ranks
    python -m experiments.studies.ranks --quick

On VGG-13, `hybrid` falls linearly over the first 30 % of training to 0.5, 0.7 or 0.9 of the
initial rank, and then cuts by the energy rule, which keeps 0.90, 0.95 or 0.99 of the energy;
`adaptive` shares budgets of parameters out among all layers. The ends of the frontier are ranks
that stay as they begin, and the dense network trained by backpropagation. ranks.png shows accuracy
against both sizes, parameters and multiply-accumulates. `experiments.studies.budget` compares
schedules that end at one size.
"""

import functools

from experiments.show import charts, variants
from experiments.studies import program
from experiments.studies.study import Study, Variant

TARGETS = (0.9, 0.7, 0.5)
ENERGIES = (0.99, 0.95, 0.90)
BUDGETS = (0.5, 0.3, 0.2, 0.1)


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
_ENERGIES = f"energy {min(ENERGIES):.2f} to {max(ENERGIES):.2f}"
# The curves of the picture: one a fall of the hybrid schedule, one of budgets, two ends.
GROUPS = {
    **{f"hybrid, {t:g} of r0, {_ENERGIES}": [v.name for v in HYBRID[t]] for t in TARGETS},
    "adaptive, by budget": [v.name for v in ADAPTIVE],
    FIXED.label: [FIXED.name],
    DENSE.label: [DENSE.name],
}

STUDY = Study(
    "ranks",
    VARIANTS,
    variants.SIZES,
    "Parameters and MACs are those at the end, for inference, over the dense network's; rank is "
    "the mean over layers of rank over full rank.",
    functools.partial(charts.draw_frontiers, GROUPS),
    defaults={"model": "vgg13"},
    quick={"model": "mlp", "epochs": 2},
    quick_only=("bp", "hybrid_90_99", "hybrid_50_90", "adaptive_20"),
)

if __name__ == "__main__":
    program.run(STUDY)
