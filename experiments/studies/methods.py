"""Every learning method on several networks, with several seeds, and what a step costs.

    python -m experiments.studies.methods
    python -m experiments.studies.methods --models=smallconv --datasets=cifar10,cifar100
    python -m experiments.studies.methods --quick

`--models` and `--datasets` are lists; without them the study runs a perceptron, two networks of
convolutions and a residual one on CIFAR-10. SSA appears in three forms: `ssa_direct` learns from
the output error and composed paths that follow the weights, `ssa_sequential` walks the error down
through twins that take the weights' factors before every step, and `ssa_fixed` keeps the paths of
its first, random twins. The other methods take the defaults of their feedback. A variant is
named for its method, and where there are several networks or data sets for those too. With
`--tuned`, the folder of an `experiments.studies.tuning`, each method takes the learning rate that
did best there. costs.json is measured once every trial of `--only` is done, with nothing else
running here; methods.png is drawn.

Step time and memory are of the training step alone, relative to backpropagation on the same
network and batch; see `experiments.measure.step_costs`.
"""

import functools
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from experiments import flags
from experiments.measure import step_costs
from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column, Text, finite
from experiments.studies import program, study, tuning
from experiments.studies.study import Settings, Study, Variant
from ssa_jax.data import DATASETS
from ssa_jax.data.streams import STREAMS
from ssa_jax.methods import METHODS
from ssa_jax.models import MODELS
from ssa_jax.runs.workdir import read_json, write_json

COSTS = "costs.json"
REFERENCE = "bp"
ROUNDS, QUICK_ROUNDS = 15, 3
MODELS_COMPARED, QUICK_MODELS = ("mlp", "smallconv", "vgg13", "resnet32"), ("mlp",)
NO_RATES: Mapping[str, float] = types.MappingProxyType({})
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
    study.DIRECT._replace(name="ssa_ahead"),
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
    costs = read_json(folder / COSTS).get("costs", {})
    return [
        Column("test accuracy", variants.accuracy),
        Column("rate", _rate),
        Column("hidden angle", variants.hidden_angle),
        variants.PARAMETERS,
        Column("step time", _relative(costs, references, "ms")),
        Column("step memory", _relative(costs, references, "bytes")),
    ]


def _rate(variant: str, rows: Sequence[Row]) -> str:
    """The learning rate; a dash of runs that were stored before a summary had it."""
    del variant
    return f"{rows[0]['learning_rate']:g}" if rows and "learning_rate" in rows[0] else "-"


def _relative(costs: dict[str, Row], references: Mapping[str, str], key: str) -> Text:
    def text(variant: str, rows: Sequence[Row]) -> str:
        del rows
        cost, reference = (costs.get(v, {}).get(key) for v in (variant, references[variant]))
        return f"{cost / reference:.2f}" if cost and reference else "-"

    return text


class Network(NamedTuple):
    """A model and a data set, what the names of their variants begin with, and rates by method."""

    model: str
    dataset: str
    prefix: str = ""
    rates: Mapping[str, float] = NO_RATES

    def variant(self, form: Variant) -> Variant:
        """A method on this network, at the rate of its own where there is one."""
        label = f"{self.model} on {self.dataset}, {form.label}" if self.prefix else form.label
        changes = {**form.changes, "model": self.model, "dataset": self.dataset}
        if rate := self.rates.get(form.changes["method"]):
            changes["learning_rate"] = rate
        return Variant(self.prefix + form.name, label, changes)


def networks_of(
    models: Sequence[str], datasets: Sequence[str], rates: Mapping[str, float] = NO_RATES
) -> list[Network]:
    """Every model on every data set."""
    several = len(models) * len(datasets) > 1
    return [Network(m, d, f"{m}_{d}_" if several else "", rates) for d in datasets for m in models]


def study_of(networks: Sequence[Network]) -> Study:
    """The study of all methods on networks."""
    references = {n.prefix + form.name: n.prefix + REFERENCE for n in networks for form in FORMS}
    return Study(
        "methods",
        [network.variant(form) for network in networks for form in FORMS],
        functools.partial(columns, references=references),
        "Angles are between local and true gradient, the mean over hidden units; parameters are "
        "for inference, relative to the dense network; step time (refreshes of the feedback "
        "included) and memory are relative to bp.",
        lambda file, rows: charts.draw(file, [panel(networks, rows)]),
        quick_only=[n.prefix + form for n in networks for form in QUICK_FORMS],
    )


# Of one network, whichever it is.
STUDY = study_of(networks_of(("smallconv",), ("cifar10",)))


def chosen() -> list[Network]:
    """The networks that the flags name.

    Raises:
      ConfigError: an unknown one, or one twice, or a folder without a study of learning rates.
    """
    tuned = absl_flags.FLAGS.tuned
    usual = QUICK_MODELS if absl_flags.FLAGS.quick else MODELS_COMPARED
    known = (*DATASETS, *STREAMS)
    return networks_of(
        flags.chosen("models", MODELS, usual),
        flags.chosen("datasets", known, ("cifar10",)),
        tuning.best_rates(Path(tuned)) if tuned else NO_RATES,
    )


def measure_costs(methods: Study, networks: Sequence[Network], settings: Settings) -> None:
    """Measures costs.json, network by network, unless it holds them, and rewrites the table."""
    file = settings.folder / COSTS
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    for network in networks:
        variants_of_it = map(network.variant, FORMS)
        reference = network.prefix + REFERENCE
        compared = [v for v in variants_of_it if v.name in settings.only or v.name == reference]
        costs = read_json(file).get("costs", {})
        if {v.name for v in compared} <= costs.keys():
            continue
        print(f"measuring step costs of {network.model} on {network.dataset}", flush=True)
        trials = [study.make_trial(settings, v, settings.config.seed) for v in compared]
        configs = {trial.variant: trial.config for trial in trials}
        measured = step_costs.measure(configs, rounds, study.load(trials[0].config))
        write_json(file, {**measured, "costs": {**costs, **measured["costs"]}})
    study.write_results(methods, settings)


def panel(networks: Sequence[Network], rows: Sequence[Row]) -> charts.BarPanel:
    """The accuracy of every method, a bar a network."""
    done = {row["variant"] for row in finite(rows)}
    forms = [f for f in FORMS if any(n.prefix + f.name in done for n in networks)]

    def accuracies(variant: str) -> list[float]:
        return [100 * row["test_accuracy"] for row in finite(rows, variant)]

    return charts.BarPanel(
        "test accuracy (%)",
        [form.label for form in forms],
        [
            charts.Bars(
                f"{n.model} on {n.dataset}", [accuracies(n.prefix + form.name) for form in forms]
            )
            for n in networks
        ],
    )


def main() -> None:
    """Runs the study that the flags give, and measures its costs, and shows it."""
    networks = chosen()
    methods = study_of(networks)
    settings = program.settings_from_flags(methods)
    rows = study.run_study(methods, settings)
    if study.all_done(settings, rows):
        measure_costs(methods, networks, settings)
    program.show(methods, settings, rows)


if __name__ == "__main__":
    program.define(STUDY)
    absl_flags.DEFINE_list("models", [], f"Networks; default: {','.join(MODELS_COMPARED)}.")
    absl_flags.DEFINE_list("datasets", [], "Data sets; default: cifar10.")
    absl_flags.DEFINE_string("tuned", "", "Folder of a study of learning rates, to take them from.")
    flags.run_program(main)
