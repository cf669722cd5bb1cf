"""A study as a program: its flags, what it shows in the end, and how it is called."""

from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags as absl_flags

from experiments import flags, folders
from experiments.show import study_page, variants
from experiments.show.runs import Row
from experiments.studies import study as study_lib
from experiments.studies.study import Settings, Study
from ssa_jax.errors import ConfigError
from ssa_jax.settings import check_seeds

# What `--quick` sets where the command line does not: it shows that a study runs, no more.
# Schedules end with the run, which a limit on the steps of a long one would not let them.
QUICK = {"epochs": 1, "train_size": 2560, "max_steps": 0, "seeds": 1}


def define(study: Study) -> None:
    """Defines the flags of a study beside those of a run."""
    flags.define(study.defaults)
    text = "Runs of each variant, at --seed, --seed + 1, ..."
    absl_flags.DEFINE_integer("seeds", study.seeds, text)
    flags.define_path("folder", "Where trials go, and where a study goes on; default: new.")
    absl_flags.DEFINE_list("only", [], "Run these variants alone; the table has all in the folder.")
    absl_flags.DEFINE_boolean("quick", False, "A short look: few steps, perhaps few variants.")


def _set_by(study: Study) -> set[str]:
    """The fields that all variants of a method set, so that a flag would say nothing of it."""
    groups: dict[str | None, list[set[str]]] = {}
    for variant in study.variants:
        groups.setdefault(variant.changes.get("method"), []).append(set(variant.changes))
    return set.union(*(set.intersection(*group) for group in groups.values()))


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
    for name in _set_by(study):
        if not values[name].using_default_value:
            raise ConfigError(f"--{name} is set by this study; choose variants with --only")
    check_seeds(values.seed, values.seeds)
    for name in values.only:
        if name not in study.labels:
            raise ConfigError(f"--only must be among {', '.join(study.labels)}, got {name}")
    folder = Path(values.folder or folders.new(study.name))
    only = values.only or study.default_variants(values.quick)
    return Settings(config, values.seeds, folder, only, values.quick)


def show(study: Study, settings: Settings, rows: Sequence[Row]) -> None:
    """Draws the results, writes their page, prints the table and where all lies."""
    folder, labels = settings.folder, study.labels
    study.draw(folder / f"{study.name}.png", rows)
    study_page.draw_curves(folder, labels, rows)
    table = variants.lines(labels, study.columns(folder), rows)
    runs = [study_page.each_run(labels, rows)]
    study_page.write(
        folder, study_lib.about(study, settings.config), table, study_lib.note(study), runs
    )


def run(study: Study, prepare: Callable[[Settings], Settings] = lambda settings: settings) -> None:
    """The program of a study, which prepares the settings that the flags give."""

    def main() -> None:
        settings = prepare(settings_from_flags(study))
        show(study, settings, study_lib.run_study(study, settings))

    define(study)
    flags.run_program(main)
