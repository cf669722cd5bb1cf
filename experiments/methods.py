"""Every learning method on one network and one budget, with several seeds, and what a step costs.

    python -m experiments.methods
    python -m experiments.methods --quick --dataset=digits --model=mlp

SSA appears in three forms: `ssa_direct` learns from the output error and composed paths that
follow the weights, `ssa_sequential` walks the error down through twins that take the weights'
factors before every step, and `ssa_fixed` keeps the paths of its first, random twins. The other
methods take the defaults of their feedback. `experiments.study` says what the folder holds and how
a study goes on; costs.json is measured once every cell is done, with nothing else running here.

Step time and memory are of the training step alone, relative to backpropagation on the same
network and batch; see `experiments.step_costs`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import flags, step_costs, study
from experiments.study import Settings, Study, Variant
from experiments.study_table import Column, accuracy, hidden_angle, per_cent
from ssa_jax.methods import METHODS

COSTS = "costs.json"
REFERENCE = "bp"
ROUNDS, QUICK_ROUNDS = 15, 3


def _ssa(name: str, label: str, **changes: Any) -> Variant:
    return Variant(name, label, {"method": "ssa", **changes})


VARIANTS = (
    *(Variant(name, name, {"method": name}) for name in METHODS if name != "ssa"),
    _ssa("ssa_direct", "ssa direct", feedback="composed", feedback_update="tracked"),
    _ssa(
        "ssa_sequential", "ssa sequential",
        feedback="sequential", feedback_update="tracked", feedback_every=1,
    ),
    _ssa("ssa_fixed", "ssa direct, fixed twins", feedback="composed", feedback_update="fixed"),
)  # fmt: skip


def columns(folder: Path) -> list[Column]:
    """Accuracy, angle and size from the summaries; step costs where they are measured."""
    costs = study.read_json(folder / COSTS).get("costs", {})
    return [
        Column("test accuracy", accuracy),
        Column("hidden angle", hidden_angle),
        Column("parameters", per_cent("params_ratio")),
        Column("step time", _relative(costs, "ms")),
        Column("step memory", _relative(costs, "bytes")),
    ]


def _relative(
    costs: dict[str, dict[str, float | None]], key: str
) -> Callable[[str, Sequence[study.Row]], str]:
    def text(name: str, rows: Sequence[study.Row]) -> str:
        del rows
        here, reference = (costs.get(n, {}).get(key) for n in (name, REFERENCE))
        return f"{here / reference:.2f}" if here and reference else "-"

    return text


STUDY = Study(
    "methods",
    VARIANTS,
    columns,
    "Angles are between local and true gradient, the mean over hidden units; parameters are for "
    "inference, relative to the dense network; step time (refreshes of the feedback included) and "
    "memory are relative to bp.",
)


def measure_costs(settings: Settings) -> None:
    """Measures costs.json, unless it holds every variant, and writes the table with it."""
    file = settings.folder / COSTS
    if study.read_json(file).get("costs", {}).keys() == {v.name for v in VARIANTS}:
        return
    print("measuring step costs", flush=True)
    configs = {v.name: study.make_cell(settings, v, settings.config.seed).config for v in VARIANTS}
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    study.write_json(file, step_costs.measure(configs, rounds))
    study.write_results(STUDY, settings)


def main() -> None:
    """Runs the study that the flags give."""
    settings = study.settings_from_flags(STUDY)
    rows = study.run_study(STUDY, settings)
    if study.all_done(STUDY, settings, rows):
        measure_costs(settings)
    study.show(STUDY, settings, rows)


if __name__ == "__main__":
    study.define({})
    flags.run_program(main)
