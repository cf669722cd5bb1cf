"""A study: variants of one configuration, each run with several seeds, and one table of them.

The folder of a study holds study.json (settings, hardware, versions, commit), a workdir for each
variant and seed (see `trials`), results.jsonl (the summaries of all that are done), table.md and,
at the end, a picture, curves.png and index.html.
Several processes may work on one folder: each takes the trials that no other one is running, and
`--only` says among which.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments import folders
from experiments.show import study_page, variants
from experiments.show.runs import Row
from experiments.show.variants import Column
from experiments.studies.trials import Trial, check_same, going_on, result, run_trial
from ssa_jax.reporting.environment import environment
from ssa_jax.runs import inputs
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, write_json, write_text

_EMPTY: Mapping[str, Any] = types.MappingProxyType({})


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
      name: for `--only` and for folders.
      label: for the table.
      changes: the config fields in which it differs from the study's base.
    """

    name: str
    label: str
    changes: dict[str, Any]


# SSA one unit ahead, its default form in networks that are not deep; the name says what it is.
_DIRECT = {"feedback": "composed", "feedback_update": "tracked", "feedback_lookahead": 1}
DIRECT = Variant("ssa", "ssa direct, 1 ahead", {"method": "ssa", **_DIRECT})


def of_methods(*names: str) -> tuple[Variant, ...]:
    """A variant a learning method."""
    return tuple(DIRECT if n == "ssa" else Variant(n, n, {"method": n}) for n in names)


class Study(NamedTuple):
    """What a study compares and how it is shown.

    Attributes:
      name: of the program.
      variants: rows of the table, in order.
      columns: folder of the study -> columns between the label and the number of seeds.
      note: what the columns mean, below the table.
      draw: (file, results of the runs that are done) -> draws their picture, NAME.png.
      measured: rows of a run's metrics.jsonl -> what its result tells beside its summary.
      defaults: of the flags, where they are not those of a run.
      seeds: how many, by default.
      quick: what `--quick` sets beside `QUICK`, or in its place.
      quick_only: the variants that `--quick` runs; all if empty.
      given: a trial -> objects in place of names in its config.
    """

    name: str
    variants: Sequence[Variant]
    columns: Callable[[Path], Sequence[Column]]
    note: str
    draw: Callable[[Path, Sequence[Row]], Path | None] = lambda file, rows: None
    measured: Callable[[Sequence[Row]], Row] = lambda rows: {}
    defaults: Mapping[str, Any] = _EMPTY
    seeds: int = 3
    quick: Mapping[str, Any] = _EMPTY
    quick_only: Sequence[str] = ()
    given: Callable[[Trial], Given] = lambda trial: NOTHING

    @property
    def labels(self) -> dict[str, str]:
        """Name of a variant -> how tables call it."""
        return {v.name: v.label for v in self.variants}

    def default_variants(self, quick: bool) -> Sequence[str]:
        """The names of the variants that run where `--only` names none."""
        return (self.quick_only if quick else ()) or list(self.labels)


class Settings(NamedTuple):
    """One call of a study.

    Attributes:
      config: what the variants change.
      seeds: runs of each variant.
      folder: of the study.
      only: names of the variants to run.
      quick: a short look, whose numbers mean nothing.
    """

    config: Config
    seeds: int
    folder: Path
    only: Sequence[str]
    quick: bool = False

    def all_seeds(self) -> range:
        """The seeds of every variant."""
        return range(self.config.seed, self.config.seed + self.seeds)


def run_study(study: Study, settings: Settings) -> list[Row]:
    """Runs the trials that are not done yet; returns and writes the results of all that are.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: as `ssa_jax.runs.run.run`; the
        folder holds another study, or a trial of another configuration.
      KeyboardInterrupt: after Ctrl-C, with a message that says how to go on.
    """
    # Seeds outside, so that every variant has a result before any has its second.
    trials = [make_trial(settings, v, s) for s in settings.all_seeds() for v in study.variants]
    for trial in trials:
        trial.config.validate()
    _open(study, settings)

    with going_on(f"--folder={settings.folder}", functools.partial(write_results, study, settings)):
        for trial in trials:
            if trial.variant in settings.only:
                given = functools.partial(study.given, trial)
                run_trial(trial, functools.partial(load, trial.config), given)
                write_results(study, settings)
    return write_results(study, settings)


def load(config: Config) -> Data:
    """The data set of a config, read once in this process."""
    return _load(config.dataset, config.data_dir, config.image_size)


@functools.cache
def _load(dataset: str, data_dir: str | None, image_size: int) -> Data:
    return inputs.load(Config(dataset=dataset, data_dir=data_dir, image_size=image_size))


def make_trial(settings: Settings, variant: Variant, seed: int) -> Trial:
    """The trial of a variant and a seed."""
    path = settings.folder / f"{variant.name}-seed{seed}"
    changes = {**variant.changes, "seed": seed, "workdir": str(path), "resume": False}
    return Trial(variant.name, dataclasses.replace(settings.config, **changes))


def all_done(settings: Settings, rows: Sequence[Row]) -> bool:
    """Whether every variant of `only` has all its seeds, whichever process ran them."""
    done = {(row["variant"], row["seed"]) for row in rows}
    return all((name, seed) in done for name in settings.only for seed in settings.all_seeds())


def _open(study: Study, settings: Settings) -> None:
    """Makes the study's folder, or sees that it holds nothing but this study."""
    open_folder(settings.folder, study.name, {"config": dataclasses.asdict(settings.config)})
    check_same(_present(study, settings))


def open_folder(folder: Path, name: str, facts: Mapping[str, Any]) -> Row:
    """Makes the folder of a study of that name, or sees that it is; returns its record.

    Args:
      folder: its study.json is written where it is empty or not there.
      name: of the study.
      facts: what the record has beside the hardware, versions and commit.

    Raises:
      WorkdirError: it cannot be written, or holds other things.
    """
    file = folder / "study.json"
    with folders.writing(folder), folders.locked(folder):
        if not file.exists():
            if any(folder.iterdir()):
                raise WorkdirError(f"{folder} holds other things; give another --folder")
            write_json(file, {"study": name, **facts, **environment()})
    record = read_json(file)
    if record.get("study") != name:
        raise WorkdirError(
            f"{folder} holds the study {record.get('study')!r}; give another --folder"
        )
    return record


def _present(study: Study, settings: Settings) -> Iterator[Trial]:
    """The trials that the folder holds, of however many seeds."""
    for variant in study.variants:
        paths = settings.folder.glob(f"{variant.name}-seed*")
        seeds = (path.name.removeprefix(f"{variant.name}-seed") for path in paths)
        for seed in sorted(int(s) for s in seeds if s.isdigit()):
            yield make_trial(settings, variant, seed)


def write_results(study: Study, settings: Settings) -> list[Row]:
    """Writes results.jsonl and table.md of all trials that are done; returns their rows."""
    folder = settings.folder
    with folders.locked(folder):
        rows = []
        for trial in _present(study, settings):
            if summary := result(trial):
                measured = study.measured(Workdir(trial.path).rows())
                rows.append({"variant": trial.variant, **summary, **measured})
        write_text(folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        table = variants.lines(study.labels, study.columns(folder), rows)
        study_page.write_table(folder, about(study, settings.config), table, note(study))
    return rows


def read_results(folder: Path) -> list[Row]:
    """The rows of a folder's results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def about(study: Study, config: Config) -> str:
    """What was trained, in a line."""
    limit = f", at most {config.max_steps} steps" if config.max_steps else ""
    if config.train_size:
        limit += f" of at most {config.train_size} images"

    def all_of(name: str) -> str:
        values = (v.changes.get(name, getattr(config, name)) for v in study.variants)
        return ", ".join(dict.fromkeys(values))

    return (
        f"{all_of('model')} on {all_of('dataset')}, {config.epochs} epochs{limit}, batch "
        f"{config.batch_size}"
    )


def note(study: Study) -> str:
    """What the table's columns mean."""
    return f"Mean ± sample standard deviation over n seeds. {study.note}"
