"""Accuracy at equal size: one rank for all layers, the paper's heuristic, and a shared-out budget.

    python -m experiments.budget
    python -m experiments.budget --quick --dataset=digits --model=mlp

A budget is the size of the whole network at its end over the dense network's, in parameters or
(`--budget_kind=macs`) in multiply-accumulates, the same for three schedules:

- `uniform` has from its first step the largest fraction of full rank that fits;
- `hybrid` starts at `--rank_init` and falls by the paper's heuristic to the floor that fits: the
  linear phase as far as the floor lets it, then twenty cuts over all of training by the energy
  rule, whose share is lowered from `--energy` where its cuts would not reach the floor;
- `adaptive` starts at `--rank_init`, and shares the falling budget out among all layers.

The share of full rank that a budget leaves stands in the table: a 3x3 convolution of equal widths
at a fifth of full rank has 40 % of its dense parameters. With `--max_steps` the schedules end
there, so that a short run ends at its budget too. `experiments.study` says what the folder holds
and how a study goes on; budget.png is the table's picture.
"""

import dataclasses

from experiments import curves, flags, study
from experiments.study import Settings, Study, Variant
from experiments.study_table import size_columns

DEFAULTS = {"rank_cuts": 20}
BUDGETS = (0.1, 0.15, 0.2, 0.3, 0.5)
# Name of the variants, label, rank schedule.
SCHEDULES = (
    ("uniform", "uniform", "none"),
    ("hybrid", "hybrid", "hybrid"),
    ("adaptive", "adaptive", "adaptive"),
)

VARIANTS = tuple(
    Variant(
        f"{name}_{round(100 * budget):02}",
        f"{label} {budget:.0%}",
        {"rank_schedule": schedule, "rank_budget": budget},
    )
    for budget in reversed(BUDGETS)
    for name, label, schedule in SCHEDULES
)


STUDY = Study(
    "budget",
    VARIANTS,
    size_columns,
    "The budget is in the variant's name; parameters and MACs are those reached, over the dense "
    "network's, and rank is the mean over layers of rank over full rank.",
)


def to_its_end(settings: Settings) -> Settings:
    """The settings with schedules that end where the runs do."""
    config = settings.config
    if not config.max_steps or config.schedule_steps:
        return settings
    config = dataclasses.replace(config, schedule_steps=config.max_steps)
    return settings._replace(config=config)


def frontier(rows: list[study.Row], kind: str) -> list[curves.Curve]:
    """Mean and deviation of the accuracy by the size reached, one curve a schedule."""
    found, good = [], [r for r in rows if r["status"] != "not_finite"]
    for prefix, label, _ in SCHEDULES:
        names = [v.name for v in VARIANTS if v.name.startswith(f"{prefix}_")]
        cells = [ours for name in names if (ours := [r for r in good if r["variant"] == name])]
        points = [
            curves.Point.of(
                [100 * r[f"{kind}_ratio"] for r in ours], [100 * r["test_accuracy"] for r in ours]
            )
            for ours in cells
        ]
        points.sort()
        if points:
            found.append(curves.Curve(label, points))
    return found


def main() -> None:
    """Runs the study that the flags give, shows it and draws it."""
    settings = to_its_end(study.settings_from_flags(STUDY))
    rows = study.run_study(STUDY, settings)
    kind = settings.config.budget_kind
    unit = {"params": "parameters", "macs": "MACs"}[kind]
    panel = curves.Panel(
        f"{unit} over the dense network's (%)", "test accuracy (%)", frontier(rows, kind)
    )
    file = curves.draw(settings.folder / "budget.png", [panel])
    # After its picture is drawn, which is on its page too.
    study.show(STUDY, settings, rows)
    if file:
        print(f"plot: {file}")


if __name__ == "__main__":
    study.define(DEFAULTS)
    flags.run_program(main)
