"""Trains one network with one method, with one seed or several.

    python -m experiments.cifar --method=ssa --rank_schedule=hybrid
    python -m experiments.cifar --recipe=cifar10_smallconv_ssa --seeds=5

`--help` lists every flag; `--plan=h100` tells what the run would be on a GPU, and trains nothing.
Results go to the workdir: config.json, metrics.jsonl, summary.json, checkpoints/ and plots/; of
several seeds each has a folder with these, beside a summary.json and a table.md of their mean and
deviation.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags as absl_flags

from experiments import flags, seeds
from experiments.show import runs
from ssa_jax.errors import ConfigError, NotFiniteError
from ssa_jax.parallel import processes
from ssa_jax.runs import inputs, plan
from ssa_jax.runs.config import Config
from ssa_jax.runs.run import run


def main() -> None:
    """Runs the configuration that the flags give, or tells what the run would be elsewhere."""
    config, values = flags.config_from_flags(), absl_flags.FLAGS
    if values.plan:
        for line in plan.lines(config, inputs.load(config), values.plan):
            print(line, flush=True)
        return
    processes.join(config)
    if values.seeds != 1:
        if processes.several():
            raise ConfigError("--seeds is for one process; start a run a seed, with --seed")
        run_seeds(config, values.seeds)
        return
    summary = run(config)
    print(f"\n{runs.table([summary])}\n\nresults and plots: {summary['workdir']}")


def run_seeds(config: Config, number: int) -> None:
    """Runs the configuration at several seeds and shows the table.

    Raises:
      NotFiniteError: at the end, if a seed was not finite.
    """
    summary = seeds.run_seeds(config, number)
    folder = Path(summary["workdir"])
    print(f"\n{(folder / 'table.md').read_text()}\nresults and plots: {folder}")
    if failed := summary["not_finite"]:
        raise NotFiniteError(
            f"loss or parameters were not finite at seed {', '.join(map(str, failed))}; the means "
            f"leave that out; try a lower --learning_rate than {config.learning_rate}"
        )


def program(defaults: Mapping[str, Any]) -> None:
    """Defines the flags, parses them and runs."""
    flags.define(defaults)
    absl_flags.DEFINE_integer(
        "seeds", 1, "Runs at --seed, --seed + 1, ...; more than one: mean and deviation."
    )
    absl_flags.DEFINE_string(
        "plan",
        "",
        "Trains nothing and prints what the run would be on h100, h100xN, v5e:AxB or v5p:AxBxC: "
        "memory, kernels, collectives, seconds to compile.",
    )
    flags.run_program(main)


if __name__ == "__main__":
    program({})
