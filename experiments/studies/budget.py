"""Accuracy at equal size: one rank for all layers, the paper's heuristic, and a shared-out budget.

    python -m experiments.studies.budget
    python -m experiments.studies.budget --quick --dataset=digits --model=mlp

A budget is the size of the whole network at its end over the dense network's, in parameters or
(`--budget_kind=macs`) in multiply-accumulates, the same for three schedules:

- `uniform` has from its first step the largest fraction of full rank that fits;
- `hybrid` starts at `--rank_init` and falls by the paper's heuristic to the floor that fits: the
  linear phase as far as the floor lets it, then twenty cuts over all of training by the energy
  rule, whose share is lowered from `--energy` where its cuts would not reach the floor;
- `adaptive` starts at `--rank_init`, and shares the falling budget out among all layers.

The share of full rank that a budget leaves stands in the table: a 3x3 convolution of equal widths
at a fifth of full rank has 40 % of its dense parameters. With `--max_steps` the schedules end
there, so that a short run ends at its budget too. budget.png is the table's picture.
"""

import dataclasses
import functools

from experiments.show import charts, variants
from experiments.studies import program
from experiments.studies.study import Settings, Study, Variant

BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.5)
# Name and label of the variants -> rank schedule.
SCHEDULES = {"uniform": "none", "hybrid": "hybrid", "adaptive": "adaptive"}


def _name(schedule: str, budget: float) -> str:
    return f"{schedule}_{round(100 * budget):02}"


VARIANTS = tuple(
    Variant(
        _name(name, budget),
        f"{name} {budget:.0%}",
        {"rank_schedule": schedule, "rank_budget": budget},
    )
    for budget in reversed(BUDGETS)
    for name, schedule in SCHEDULES.items()
)
# The curves of the picture.
GROUPS = {schedule: [_name(schedule, budget) for budget in BUDGETS] for schedule in SCHEDULES}


def to_its_end(settings: Settings) -> Settings:
    """The settings with schedules that end where the runs do."""
    config = settings.config
    if not config.max_steps or config.schedule_steps:
        return settings
    config = dataclasses.replace(config, schedule_steps=config.max_steps)
    return settings._replace(config=config)


STUDY = Study(
    "budget",
    VARIANTS,
    variants.SIZES,
    "The budget is in the variant's name; parameters and MACs are those reached, over the dense "
    "network's, and rank is the mean over layers of rank over full rank.",
    functools.partial(charts.draw_frontiers, GROUPS),
    defaults={"rank_cuts": 20},
)

if __name__ == "__main__":
    program.run(STUDY, to_its_end)
