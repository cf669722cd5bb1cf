"""A Markdown table of runs, from their summary.json, and config.json where labels coincide.

python -m experiments.table WORKDIR [WORKDIR ...]
"""

from collections.abc import Sequence
from pathlib import Path

from experiments import flags
from experiments.show import runs
from ssa_jax.errors import ConfigError
from ssa_jax.runs.workdir import WorkdirError, read_json, runs_in


def main(workdirs: Sequence[str]) -> None:
    """Prints the table of the given workdirs, or of folders of seeds.

    Raises:
      ConfigError: no workdir.
      WorkdirError: one without a summary.
    """
    if not workdirs:
        raise ConfigError("give the workdirs to show: python -m experiments.table WORKDIR ...")
    folders = [path for name in workdirs for path in runs_in(Path(name))]
    summaries = [read_json(folder / "summary.json") for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if not summary:
            raise WorkdirError(f"{folder} holds no summary.json of a run")
    configs = [read_json(folder / "config.json").get("config", {}) for folder in folders]
    print(runs.table(summaries, runs.names(folders), configs))


if __name__ == "__main__":
    flags.run_program(main, arguments=True)
