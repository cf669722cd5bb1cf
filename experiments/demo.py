"""Trains BP, DFA and SSA with shrinking ranks on the scikit-learn digits, side by side.

    python -m experiments.demo

Needs no download and about a minute on two CPU cores. Takes the flags of `experiments.cifar`;
`--workdir` names the folder that holds one workdir a method.
"""

import dataclasses
import datetime
from pathlib import Path

from experiments import flags
from experiments.run import run
from experiments.table import table

DEFAULTS = {
    "dataset": "digits",
    "model": "mlp",
    "epochs": 30,
    "batch_size": 64,
    "rank_schedule": "hybrid",
    "rank_init": 1.0,
}
METHODS = ("bp", "dfa", "ssa")


def main() -> None:
    """Runs the three methods with the settings that the flags give."""
    config = flags.config_from_flags()
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = Path(config.workdir or f"runs/{stamp}-demo")
    summaries = []
    for method in METHODS:
        print(f"{method}:")
        workdir = str(folder / method)
        summaries.append(run(dataclasses.replace(config, method=method, workdir=workdir)))
    print(f"\n{config.model} on {config.dataset}, {config.epochs} epochs, seed {config.seed}\n")
    print(table(summaries))
    print("\nplots:", ", ".join(str(folder / m / "plots") for m in METHODS))


if __name__ == "__main__":
    flags.define(DEFAULTS)
    flags.run_program(main)
