"""Trains BP, DFA and SSA with falling ranks on the scikit-learn digits, side by side.

    python -m experiments.demo

Needs no download and less than a minute on two CPU cores. Takes the flags of `experiments.cifar`;
`--workdir` names the folder of the runs, their picture and their page.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from experiments import flags, folders
from experiments.show import comparison, runs
from experiments.show.runs import Row
from ssa_jax.runs.run import run

DEFAULTS = {
    "dataset": "digits",
    "model": "mlp",
    "epochs": 30,
    "batch_size": 64,
    "rank_schedule": "hybrid",
}
METHODS = ("bp", "dfa", "ssa")


def seen(summaries: Sequence[Row]) -> list[str]:
    """One plain sentence a method on what its run showed."""
    bp, dfa, ssa = summaries

    def percent(summary: Row) -> str:
        return f"{100 * summary['test_accuracy']:.1f} %"

    gap = 100 * (ssa["test_accuracy"] - bp["test_accuracy"])
    side = f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}"
    if abs(gap) < 0.05:
        side = "level with"
    return [
        f"Backpropagation, the reference, reaches {percent(bp)} in {bp['wall_s']:.0f} s, and every "
        "layer waits for the one above it.",
        f"DFA sends the output error straight to each layer through fixed random matrices and "
        f"reaches {percent(dfa)}.",
        f"SSA learns from local losses too and ends {side} backpropagation, "
        f"at {percent(ssa)}, on {100 * ssa['params_ratio']:.0f} % of its parameters, in "
        f"{ssa['wall_s']:.0f} s.",
    ]


def main() -> None:
    """Runs the three methods with the settings that the flags give."""
    config = flags.config_from_flags()
    folder = Path(config.workdir or folders.new("demo"))
    summaries = []
    for method in METHODS:
        print(f"{method}:")
        workdir = str(folder / method)
        summaries.append(run(dataclasses.replace(config, method=method, workdir=workdir)))
    print(f"\n{config.model} on {config.dataset}, {config.epochs} epochs, seed {config.seed}\n")
    print(runs.table(summaries))
    print("\n" + "\n".join(seen(summaries)))
    compared = comparison.read([str(folder / method) for method in METHODS])
    page = comparison.write(compared, folder / "report")
    if (picture := folder / "report" / "curves.png").exists():
        print(f"\npicture: {picture}")
    print(f"page: {page}")


if __name__ == "__main__":
    flags.define(DEFAULTS)
    flags.run_program(main)
