"""Every learning method on several networks, with several seeds, and what a step costs.

    python -m experiments.methods
    python -m experiments.methods --models=smallconv --datasets=cifar10,cifar100
    python -m experiments.methods --quick

`--models` and `--datasets` are lists; without them the study runs a perceptron, two networks of
convolutions and a residual one on CIFAR-10. SSA appears in three forms: `ssa_direct` learns from
the output error and composed paths that follow the weights, `ssa_sequential` walks the error down
through twins that take the weights' factors before every step, and `ssa_fixed` keeps the paths of
its first, random twins. The other methods take the defaults of their feedback. A variant is
named for its method, and where there are several networks or data sets for those too.
`experiments.study` says what the folder holds and how a study goes on; costs.json is measured once
every cell is done, with nothing else running here, and methods.png is drawn.

Step time and memory are of the training step alone, relative to backpropagation on the same
network and batch; see `experiments.step_costs`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from experiments import bars, flags, step_costs, study
from experiments.study import Settings, Study, Variant
from experiments.study_table import Column, accuracy, hidden_angle, per_cent
from ssa_jax.data import DATASETS
from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS
from ssa_jax.models import MODELS

COSTS = "costs.json"
REFERENCE = "bp"
ROUNDS, QUICK_ROUNDS = 15, 3
MODELS_COMPARED, QUICK_MODELS = ("mlp", "smallconv", "vgg13", "resnet32"), ("mlp",)
QUICK_FORMS = ("bp", "dfa", "ssa_direct")


def _ssa(name: str, label: str, **changes: Any) -> Variant:
    return Variant(name, label, {"method": "ssa", **changes})


# The methods, for any network.
FORMS = (
    *(Variant(name, name, {"method": name}) for name in METHODS if name != "ssa"),
    _ssa(
        "ssa_direct", "ssa direct",
        feedback="composed", feedback_update="tracked", feedback_lookahead=0,
    ),
    _ssa("ssa_ahead", "ssa direct, 1 ahead", feedback="composed", feedback_update="tracked"),
    _ssa(
        "ssa_sequential", "ssa sequential",
        feedback="sequential", feedback_update="tracked", feedback_every=1,
    ),
    _ssa(
        "ssa_fixed", "ssa direct, fixed twins",
        feedback="composed", feedback_update="fixed", feedback_lookahead=0,
    ),
)  # fmt: skip


def columns(folder: Path, references: Mapping[str, str]) -> list[Column]:
    """Accuracy, angle and size from the summaries; step costs where they are measured.

    Args:
      folder: of the study.
      references: name of a variant -> that of the one to which its costs are relative.
    """
    costs = study.read_json(folder / COSTS).get("costs", {})
    return [
        Column("test accuracy", accuracy),
        Column("hidden angle", hidden_angle),
        Column("parameters", per_cent("params_ratio")),
        Column("step time", _relative(costs, references, "ms")),
        Column("step memory", _relative(costs, references, "bytes")),
    ]


def _relative(
    costs: dict[str, dict[str, Any]], references: Mapping[str, str], key: str
) -> Callable[[str, Sequence[study.Row]], str]:
    def text(name: str, rows: Sequence[study.Row]) -> str:
        del rows
        here, reference = (costs.get(n, {}).get(key) for n in (name, references[name]))
        return f"{here / reference:.2f}" if here and reference else "-"

    return text


class Network(NamedTuple):
    """A model and a data set, and what the names of their variants begin with."""

    model: str
    dataset: str
    prefix: str = ""

    def variant(self, form: Variant) -> Variant:
        """A method on this network."""
        label = f"{self.model} on {self.dataset}, {form.label}" if self.prefix else form.label
        changes = {**form.changes, "model": self.model, "dataset": self.dataset}
        return Variant(self.prefix + form.name, label, changes)


def networks_of(models: Sequence[str], datasets: Sequence[str]) -> list[Network]:
    """Every model on every data set."""
    several = len(models) * len(datasets) > 1
    return [Network(m, d, f"{m}_{d}_" if several else "") for d in datasets for m in models]


def study_of(networks: Sequence[Network]) -> Study:
    """The study of all methods on networks."""
    references = {n.prefix + form.name: n.prefix + REFERENCE for n in networks for form in FORMS}
    return Study(
        "methods",
        [network.variant(form) for network in networks for form in FORMS],
        lambda folder: columns(folder, references),
        "Angles are between local and true gradient, the mean over hidden units; parameters are "
        "for inference, relative to the dense network; step time (refreshes of the feedback "
        "included) and memory are relative to bp.",
        quick_only=[n.prefix + form for n in networks for form in QUICK_FORMS],
    )


# Of one network, whichever it is.
STUDY = study_of(networks_of(("smallconv",), ("cifar10",)))


def chosen() -> list[Network]:
    """The networks that the flags name.

    Raises:
      ConfigError: an unknown one, or one twice.
    """
    values, lists = absl_flags.FLAGS, []
    for flag, known, usual in (
        ("models", MODELS, QUICK_MODELS if values.quick else MODELS_COMPARED),
        ("datasets", DATASETS, ("cifar10",)),
    ):
        names = values[flag].value or usual
        if len(set(names)) < len(names) or not set(names) <= set(known):
            raise ConfigError(f"--{flag} must be among {', '.join(known)}, got {','.join(names)}")
        lists.append(names)
    return networks_of(*lists)


def measure_costs(methods: Study, networks: Sequence[Network], settings: Settings) -> None:
    """Measures costs.json, network by network, unless it holds them, and rewrites the table."""
    file = settings.folder / COSTS
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    forms = [f for f in FORMS if not settings.quick or f.name in QUICK_FORMS]
    for network in networks:
        variants = [network.variant(form) for form in forms]
        costs = study.read_json(file).get("costs", {})
        if {v.name for v in variants} <= costs.keys():
            continue
        print(f"measuring step costs of {network.model} on {network.dataset}", flush=True)
        cells = [study.make_cell(settings, v, settings.config.seed) for v in variants]
        configs = {cell.variant: cell.config for cell in cells}
        found = step_costs.measure(configs, rounds, study.load(cells[0].config))
        study.write_json(file, {**found, "costs": {**costs, **found["costs"]}})
    study.write_results(methods, settings)


def panel(networks: Sequence[Network], rows: Sequence[study.Row]) -> bars.Panel:
    """The accuracy of every method, a bar a network."""
    good = [row for row in rows if row["status"] != "not_finite"]
    done = {row["variant"] for row in good}
    forms = [f for f in FORMS if any(n.prefix + f.name in done for n in networks)]
    return bars.Panel(
        "test accuracy (%)",
        [form.label for form in forms],
        [
            bars.Bars(
                f"{n.model} on {n.dataset}",
                [
                    [100 * r["test_accuracy"] for r in good if r["variant"] == n.prefix + form.name]
                    for form in forms
                ],
            )
            for n in networks
        ],
    )


def main() -> None:
    """Runs the study that the flags give, draws it and shows it."""
    networks = chosen()
    methods = study_of(networks)
    settings = study.settings_from_flags(methods)
    rows = study.run_study(methods, settings)
    if study.all_done(methods, settings, rows):
        measure_costs(methods, networks, settings)
    if (drawn := panel(networks, rows)).names:
        bars.draw(settings.folder / "methods.png", [drawn])
    study.show(methods, settings, rows)


def define() -> None:
    """Defines the flags of this study beside those of all."""
    study.define({})
    absl_flags.DEFINE_list("models", [], f"Networks; default: {','.join(MODELS_COMPARED)}.")
    absl_flags.DEFINE_list("datasets", [], "Data sets; default: cifar10.")


if __name__ == "__main__":
    define()
    flags.run_program(main)
