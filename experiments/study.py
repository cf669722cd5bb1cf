"""A study: variants of one configuration, each run with several seeds, and one table of them.

The folder of a study holds study.json (settings, hardware, versions, commit), a workdir for each
variant and seed (see `cells`), results.jsonl (the summaries of all that are done), table.md and, at
the end, index.html.
Several processes may work on one folder: each takes the cells that no other one is running, and
`--only` says among which.
"""

import dataclasses
import datetime
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags as absl_flags

from experiments import flags, study_page
from experiments.cells import Cell, locked, result, run_cell
from experiments.study_table import Column, cells, table
from ssa_jax import data as data_lib
from ssa_jax.data import Dataset
from ssa_jax.errors import ConfigError
from ssa_jax.reporting.environment import environment
from ssa_jax.runs import workdir
from ssa_jax.runs.config import Config, differences
from ssa_jax.runs.workdir import Workdir, WorkdirError, read_json, write_json, write_text
from ssa_jax.settings import check_seeds

Row = dict[str, Any]

# What `--quick` sets where the command line does not: it shows that a study runs, no more.
# Schedules end with the run, which a limit on the steps of a long one would not let them.
QUICK = {"epochs": 1, "train_size": 2560, "max_steps": 0, "seeds": 1}


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


def nothing(rows: Sequence[Row]) -> Row:
    """A summary says it all."""
    del rows
    return {}


class Study(NamedTuple):
    """What a study compares and how it is shown.

    Attributes:
      name: of the program.
      variants: rows of the table, in order.
      columns: folder of the study -> columns between the label and the number of seeds.
      note: what the columns mean, below the table.
      measured: rows of a run's metrics.jsonl -> what its result tells beside its summary.
      quick: what `--quick` sets beside `QUICK`, or in its place.
      quick_only: the variants that `--quick` runs; all if empty.
    """

    name: str
    variants: Sequence[Variant]
    columns: Callable[[Path], Sequence[Column]]
    note: str
    measured: Callable[[Sequence[Row]], Row] = nothing
    quick: Mapping[str, Any] = types.MappingProxyType({})
    quick_only: Sequence[str] = ()


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


def define(defaults: dict[str, Any], seeds: int = 3) -> None:
    """Defines the flags of a study beside those of a run."""
    flags.define(defaults)
    absl_flags.DEFINE_integer("seeds", seeds, "Runs of each variant, at --seed, --seed + 1, ...")
    flags.define_path("folder", "Where cells go; default: a new folder under runs/.")
    absl_flags.DEFINE_list("only", [], "Run these variants alone; the table has all in the folder.")
    absl_flags.DEFINE_boolean("quick", False, "A short look: few steps, perhaps few variants.")


def settings_from_flags(study: Study) -> Settings:
    """The settings that the parsed flags give.

    Raises:
      ConfigError: a flag out of range, or one that the study sets itself.
    """
    values = absl_flags.FLAGS
    if values.quick:
        for name, value in {**QUICK, **study.quick}.items():
            values.set_default(name, value)
    config = flags.config_from_flags()
    if config.workdir or config.resume:
        raise ConfigError(
            "--workdir and --resume are for single runs; a study takes --folder, and goes on with "
            "what that folder holds"
        )
    for name in set.intersection(*(set(v.changes) for v in study.variants)):
        if not values[name].using_default_value:
            raise ConfigError(f"--{name} is what this study varies; choose variants with --only")
    check_seeds(values.seed, values.seeds)
    known = [v.name for v in study.variants]
    for name in values.only:
        if name not in known:
            raise ConfigError(f"--only must be among {', '.join(known)}, got {name}")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(values.folder or f"runs/{stamp}-{study.name}")
    only = values.only or _short(study, values.quick) or known
    return Settings(config, values.seeds, folder, only, values.quick)


def run_study(study: Study, settings: Settings) -> list[Row]:
    """Runs the cells that are not done yet; returns and writes the results of all that are.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: as `ssa_jax.runs.run.run`; the
        folder holds another study, or a cell of another configuration.
      KeyboardInterrupt: after Ctrl-C, with a message that says how to go on.
    """
    # Seeds outside, so that every variant has a result before any has its second.
    cells = [make_cell(settings, v, seed) for seed in _seeds(settings) for v in study.variants]
    for cell in cells:
        cell.config.validate()
    _open(study, settings)

    try:
        for cell in cells:
            if cell.variant in settings.only:
                run_cell(cell, functools.partial(load, cell.config))
                write_results(study, settings)
    except KeyboardInterrupt as e:
        write_results(study, settings)
        # Ctrl-C or SIGTERM, which end a program with different codes.
        raise type(e)(
            f"interrupted; go on with the same flags and --folder={settings.folder}"
        ) from None
    return write_results(study, settings)


def load(config: Config) -> Dataset:
    """The data set of a config, read once in this process."""
    return _load(config.dataset, config.data_dir)


_load = functools.cache(data_lib.load)


def _seeds(settings: Settings) -> range:
    return range(settings.config.seed, settings.config.seed + settings.seeds)


def make_cell(settings: Settings, variant: Variant, seed: int) -> Cell:
    """The cell of a variant and a seed."""
    path = settings.folder / f"{variant.name}-seed{seed}"
    changes = {**variant.changes, "seed": seed, "workdir": str(path), "resume": False}
    return Cell(variant.name, dataclasses.replace(settings.config, **changes))


def all_done(study: Study, settings: Settings, rows: Sequence[Row]) -> bool:
    """Whether every variant has all its seeds, whichever process ran them.

    Of a quick study those that it runs of itself.
    """
    done = {(row["variant"], row["seed"]) for row in rows}
    wanted = _short(study, settings.quick) or [v.name for v in study.variants]
    return all((name, seed) in done for name in wanted for seed in _seeds(settings))


def _short(study: Study, quick: bool) -> Sequence[str]:
    return study.quick_only if quick else ()


def _open(study: Study, settings: Settings) -> None:
    """Makes the study's folder, or sees that it holds nothing but this study."""
    folder, record = settings.folder, settings.folder / "study.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not record.exists():
                if any(folder.iterdir()):
                    raise WorkdirError(f"{folder} holds other things; give another --folder")
                about = {"config": dataclasses.asdict(settings.config), **environment()}
                write_json(record, {"study": study.name, **about})
    except OSError as e:
        raise WorkdirError(f"cannot write to {folder}: {e.strerror}; give another --folder") from e
    found = read_json(record).get("study")
    if found != study.name:
        raise WorkdirError(f"{folder} holds the study {found!r}; give another --folder")
    for cell in _present(study, settings):
        stored = workdir.stored_config(cell.path)
        if stored and (different := differences(cell.config, stored)):
            raise WorkdirError(f"{cell.path} is a run of another configuration: {different}")


def _present(study: Study, settings: Settings) -> Iterator[Cell]:
    """The cells that the folder holds, of however many seeds."""
    for variant in study.variants:
        found = settings.folder.glob(f"{variant.name}-seed*")
        seeds = (path.name.removeprefix(f"{variant.name}-seed") for path in found)
        for seed in sorted(int(s) for s in seeds if s.isdigit()):
            yield make_cell(settings, variant, seed)


def write_results(study: Study, settings: Settings) -> list[Row]:
    """Writes results.jsonl and table.md of all cells that are done; returns their rows."""
    with locked(settings.folder):
        rows = []
        for cell in _present(study, settings):
            if summary := result(cell):
                measured = study.measured(Workdir(cell.path).rows())
                rows.append({"variant": cell.variant, **summary, **measured})
        write_text(settings.folder / "results.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
        write_text(settings.folder / "table.md", _page(study, settings, rows))
    return rows


def read_results(folder: Path) -> list[Row]:
    """The rows of a folder's results.jsonl."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def _page(study: Study, settings: Settings, rows: Sequence[Row]) -> str:
    lines = table(_labels(study), study.columns(settings.folder), rows)
    return f"{_about(study, settings)}\n\n{lines}\n\n{_note(study)}\n"


def _labels(study: Study) -> dict[str, str]:
    return {v.name: v.label for v in study.variants}


def _about(study: Study, settings: Settings) -> str:
    config = settings.config
    limit = f", at most {config.max_steps} steps" if config.max_steps else ""
    if config.train_size:
        limit += f" of at most {config.train_size} images"

    def all_of(name: str) -> str:
        return ", ".join(
            dict.fromkeys(v.changes.get(name, getattr(config, name)) for v in study.variants)
        )

    return (
        f"{all_of('model')} on {all_of('dataset')}, {config.epochs} epochs{limit}, batch "
        f"{config.batch_size}"
    )


def _note(study: Study) -> str:
    return f"Mean ± sample standard deviation over n seeds. {study.note}"


def show(study: Study, settings: Settings, rows: Sequence[Row]) -> None:
    """Writes the page of the results, prints the table and where all lies."""
    folder, labels = settings.folder, _labels(study)
    shown = cells(labels, study.columns(folder), rows)
    page = study_page.write(folder, _about(study, settings), labels, shown, _note(study), rows)
    print("\n" + (folder / "table.md").read_text())
    print(f"results: {folder}\npage: {page}")


def main(study: Study) -> None:
    """Runs the study that the flags give, and shows it."""
    settings = settings_from_flags(study)
    rows = run_study(study, settings)
    show(study, settings, rows)
