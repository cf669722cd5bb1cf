"""Fine-tuning: a network trained by backpropagation, put on factors and tuned on other data.

    python -m experiments.studies.finetune
    python -m experiments.studies.finetune --quick

Two tasks: MNIST and then Fashion-MNIST, and five classes of CIFAR-10 and then its other five, at 16
pixels. For each task and seed a dense perceptron is trained by backpropagation on all images of the
first data set (the variants `..._before`, which the others of their task and seed need), gets a new
classifier, and is tuned on `--train_size` images of the second in one of these ways:

- `bp`: all its weights, dense, by backpropagation;
- `head`: the classifier alone;
- `lora_R`: the classifier and an `nnx.LoRA` of rank R beside each of the other layers, whose own
  weights rest, by backpropagation;
- `ssa_P`, `svd_bp_P`: put on factors at P per cent of full rank by `factorize`, by SSA or by
  backpropagation, with ranks that fall by the hybrid schedule.

Two sizes belong to each: what is trained (of factors: at the end), and what is stored in the end
for inference, where LoRA's matrices have been added to the dense ones. finetune.png shows accuracy
against both. The rates are those that did best on a held-out fifth of the second data set.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from experiments.show import charts, variants
from experiments.show.runs import Row
from experiments.show.variants import Column, Text
from experiments.studies import program, study
from experiments.studies.study import Study, Variant
from experiments.studies.trials import Trial
from ssa_jax import data as data_lib
from ssa_jax.data import Dataset
from ssa_jax.errors import ConfigError
from ssa_jax.runs import trained
from ssa_jax.runs.given import NOTHING, PREFIX, Given

NAME = "finetune"
SIDE = 16
BEFORE = "before"
LORA_RANKS = (16, 64, 128)
PER_CENT = {"svd_bp": (25,), "ssa": (50, 25, 12)}
# Chosen on a held-out fifth of the second data sets, seed 0.
RATES = {"bp": 2e-3, "head": 8e-3, "lora": 4e-3, "svd_bp": 2e-3, "ssa": 2e-3}


class Task(NamedTuple):
    """Names of the data sets of before and of after, and what the table calls them."""

    before: str
    after: str
    label: str


def only_classes(data: Dataset, classes: Sequence[int]) -> Dataset:
    """The images of some classes, which are numbered anew from zero in their order."""

    def part(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kept = np.isin(labels, classes)
        return images[kept], np.searchsorted(classes, labels[kept]).astype(np.int32)

    train = part(data.train_images, data.train_labels)
    return Dataset(
        *train, *part(data.test_images, data.test_labels), len(classes), data.crop, data.flip
    )


def first_five(data_dir: str | None) -> Dataset:
    """CIFAR-10's airplanes, automobiles, birds, cats and deer, at 16 pixels."""
    return only_classes(data_lib.shrunk(data_lib.load("cifar10", data_dir), SIDE), range(5))


def last_five(data_dir: str | None) -> Dataset:
    """CIFAR-10's dogs, frogs, horses, ships and trucks, at 16 pixels."""
    return only_classes(data_lib.shrunk(data_lib.load("cifar10", data_dir), SIDE), range(5, 10))


_HERE = "experiments.studies.finetune"
TASKS = {
    "fashion": Task("mnist", "fashion_mnist", "Fashion-MNIST after MNIST"),
    "cifar": Task(f"{_HERE}:first_five", f"{_HERE}:last_five", "CIFAR-10, last five classes"),
}


def forms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a way of tuning -> what the table calls it, and its settings."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "bp": ("bp, all weights", {"method": "bp"}),
        "head": ("bp, classifier alone", {"method": "bp"}),
    }
    for r in LORA_RANKS:
        found[f"lora_{r}"] = (f"LoRA of rank {r}", {"method": "bp"})
    for method, starts in PER_CENT.items():
        for p in starts:
            changes = {"method": method, "rank_init": p / 100, "rank_schedule": "hybrid"}
            found[f"{method}_{p}"] = (f"{method} from {p} %", changes)
    return {
        name: (label, {**changes, "learning_rate": RATES[name.rstrip("_0123456789")]})
        for name, (label, changes) in found.items()
    }


def variants_of(tasks: Mapping[str, Task]) -> list[Variant]:
    """Training on the first data set, and every way of tuning on the second."""
    found = []
    for name, task in tasks.items():
        first = {"method": "bp", "model": "mlp", "dataset": task.before, "train_size": 0}
        first["learning_rate"] = RATES["bp"]
        found.append(Variant(f"{name}_{BEFORE}", f"{task.label}: before", first))
        for form, (label, changes) in forms().items():
            changes = {**changes, "model": f"{PREFIX}:mlp", "dataset": task.after}
            found.append(Variant(f"{name}_{form}", f"{task.label}: {label}", changes))
    return found


class Resting(nnx.Variable[Any]):
    """What is not trained."""


def rest(layer: nnx.Linear) -> nnx.Linear:
    """Takes a layer's weights out of training; returns it."""
    for name in ("kernel", "bias"):
        setattr(layer, name, Resting(getattr(layer, name).get_value()))
    return layer


def to_tune(model: Any, form: str, classes: int, seed: int) -> Any:
    """The trained network with a new classifier, prepared for a way of tuning.

    Args:
      model: a dense `mlp`, which is changed.
      form: a key of `forms`.
      classes: of the new data.
      seed: of what is new.
    """
    rngs = nnx.Rngs(seed)
    *hidden, last = model.units
    last.map = nnx.Linear(last.map.in_features, classes, rngs=rngs)
    if form == "head" or form.startswith("lora"):
        for unit in hidden:
            base = rest(unit.map)
            if form != "head":
                rank = int(form.removeprefix("lora_"))
                sizes = base.in_features, rank, base.out_features
                unit.map = nnx.LoRA(*sizes, base_module=base, rngs=rngs)
    return model


def given(trial: Trial) -> Given:
    """The network that a trial tunes, from the folder of its task's first training.

    Raises:
      ConfigError: that is not done.
    """
    name, _, form = trial.variant.partition("_")
    if form == BEFORE:
        return NOTHING
    path = trial.path.with_name(f"{name}_{BEFORE}-seed{trial.config.seed}")
    if not (path / "summary.json").exists():
        raise ConfigError(f"{trial.path.name} tunes what {path.name} trains, which is not done")
    model = trained.restore(path).model
    classes = study.load(trial.config).classes
    return Given(model=to_tune(model, form, classes, trial.config.seed))


def stored(folder: Path) -> Callable[[str, Row], float]:
    """(variant, result) -> parameters at the end: with LoRA those of the dense network."""
    results = folder / "results.jsonl"
    rows = study.read_results(folder) if results.exists() else []
    split = [(*row["variant"].partition("_")[::2], row["params"]) for row in rows]
    dense = {task: params for task, form, params in split if form == BEFORE}

    def size(variant: str, row: Row) -> float:
        task, _, form = variant.partition("_")
        merged = form == "head" or form.startswith("lora")
        return dense.get(task, float("nan")) if merged else row["params"]

    return size


def columns(folder: Path) -> list[Column]:
    """Accuracy, and both sizes in thousands of parameters."""
    size = stored(folder)

    def thousands(of: Callable[[str, Row], float]) -> Text:
        return lambda name, rows: variants.spread(lambda r: of(name, r) / 1e3, ".0f", " k")(
            name, rows
        )

    return [
        Column("test accuracy", variants.accuracy),
        Column("train loss", variants.train_loss),
        Column("trained", thousands(lambda _, row: row["params"])),
        Column("stored", thousands(size)),
    ]


def panels(folder: Path, rows: Sequence[Row]) -> list[charts.Panel]:
    """Accuracy against both sizes, two panels a task."""
    size = stored(folder)
    groups = {g: [f for f in forms() if f.rstrip("_0123456789") == g] for g in RATES}
    sizes = {"trained": lambda _, row: row["params"], "stored in the end": size}
    return [
        charts.Panel(
            f"parameters {what}",
            "test accuracy (%)",
            [
                charts.over_variants(g, [f"{name}_{f}" for f in names], rows, of)
                for g, names in groups.items()
            ],
            task.label,
            log=("x",),
        )
        for name, task in TASKS.items()
        for what, of in sizes.items()
    ]


STUDY = Study(
    NAME,
    variants_of(TASKS),
    columns,
    "Trained: parameters that training moves, of factors those of the last step; stored: what "
    "inference needs, with LoRA the dense network that it is added to.",
    lambda file, rows: charts.draw(file, panels(file.parent, rows)),
    defaults={"train_size": 10_000},
    quick_only=[f"fashion_{f}" for f in (BEFORE, "lora_64", "ssa_25")],
    given=given,
)

if __name__ == "__main__":
    program.run(STUDY)
