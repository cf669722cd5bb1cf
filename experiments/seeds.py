"""One configuration with several seeds: a folder of ordinary runs, their mean and deviation.

The folder holds a workdir for each seed (seed0/, seed1/, ...), summary.json with mean and sample
deviation, and table.md. The seeds are trained one after another.
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import folders
from experiments.show import variants
from experiments.show.runs import Row
from experiments.show.variants import Column
from experiments.studies.trials import Trial, check_same, going_on, result, run_trial
from ssa_jax.reporting import summary
from ssa_jax.runs import inputs, workdir
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.workdir import WorkdirError, write_json, write_text
from ssa_jax.settings import check_seeds

# Of the summaries of the seeds, what has a mean and a deviation.
_SPREAD = ("test_accuracy", "best_test_accuracy", "train_loss", "drift", "params", "params_ratio",
           "macs", "macs_ratio", "rank_fraction", "wall_s")  # fmt: skip
_ALL = "mean ± deviation"
_COLUMNS = (
    Column("test accuracy", variants.accuracy),
    Column("train loss", variants.train_loss),
    Column("hidden angle", variants.hidden_angle),
    variants.PARAMETERS,
)


def run_seeds(config: Config, seeds: int, data: Data | None = None) -> Row:
    """Trains one configuration at so many seeds, from `config.seed` on; returns the summary.

    Args:
      config: the run; its workdir is the folder of all, and with `resume` the seeds that the
        folder has are kept or gone on with.
      seeds: at least one.
      data: its data set, where the caller has it already.

    Returns:
      Settings, the seeds and how their runs ended, and of each number in `_SPREAD` its mean, its
      sample deviation (None of one value) and n, over the runs that were finite; also in
      summary.json. ``not_finite`` has the seeds whose loss or parameters were not.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: as `run.run`.
      KeyboardInterrupt: after Ctrl-C, and `Terminated` after SIGTERM, with how to go on.
    """
    config.validate()
    check_seeds(config.seed, seeds)
    folder = _open(config, seeds)
    trials = [_trial(config, folder, config.seed + i) for i in range(seeds)]
    check_same(trials)

    @functools.cache
    def load() -> Data:
        return data or inputs.load(config)

    def write() -> None:
        if any(result(trial) for trial in trials):
            _write(config, folder, trials)

    with going_on(f"--workdir={folder} --resume", write):
        for trial in trials:
            if not result(trial):
                run_trial(trial, load)
    return _write(config, folder, trials)


def _open(config: Config, seeds: int) -> Path:
    """The folder of all seeds: a new or empty one, or with `resume` one that has some."""
    path = Path(config.workdir or workdir.default_path(config, f"seeds{seeds}"))
    if config.resume:
        # Also one that was stopped before its first seed had begun.
        if (path / "config.json").exists() or not any(path.glob("seed*")):
            raise WorkdirError(f"{path} holds no seeds to resume; give the --workdir of --seeds")
        return path
    with folders.writing(path, "--workdir"):
        if any(path.iterdir()):
            raise WorkdirError(
                f"{path} is not empty; give another --workdir, or --resume to go on with its seeds"
            )
    return path


def _trial(config: Config, folder: Path, seed: int) -> Trial:
    path = folder / f"seed{seed}"
    one = dataclasses.replace(config, seed=seed, workdir=str(path), resume=False)
    return Trial(path.name, one)


def _write(config: Config, folder: Path, trials: Sequence[Trial]) -> Row:
    """Writes summary.json and table.md of the seeds that are done; returns the summary."""
    done = [row for trial in trials if (row := result(trial))]
    good = variants.finite(done)
    # The first run tells what its network decided, if its summary is one that does.
    first = done[0] if done else {}
    shared = {k: first.get(k, v) for k, v in summary.settings(config).items() if k != "seed"}
    whole = {
        **shared,
        "seeds": [row["seed"] for row in done],
        "statuses": [row["status"] for row in done],
        "not_finite": [row["seed"] for row in done if row["status"] == "not_finite"],
        **{name: _spread([x for r in good if (x := r.get(name)) is not None]) for name in _SPREAD},
        "workdir": str(folder),
    }
    write_json(folder / "summary.json", whole)
    write_text(folder / "table.md", table(done) + "\n")
    return whole


def _spread(values: Sequence[float]) -> Row:
    return {
        "mean": statistics.fmean(values) if values else None,
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
        "n": len(values),
    }


def table(summaries: Sequence[Row]) -> str:
    """A line a seed, and one of mean and sample deviation over those that were finite."""
    labels = {f"seed {row['seed']}": f"seed {row['seed']}" for row in summaries} | {_ALL: _ALL}
    rows = [{**row, "variant": v} for row in summaries for v in (f"seed {row['seed']}", _ALL)]
    return variants.table(labels, _COLUMNS, rows)
