"""Trains one network with one method.

    python -m experiments.cifar --method=ssa --rank_schedule=hybrid

`--help` lists every flag. Results go to the workdir: config.json, metrics.jsonl, summary.json,
checkpoints/ and plots/.
"""

from experiments import flags, processes
from experiments.run import run
from experiments.table import table


def main() -> None:
    """Runs the configuration that the flags give."""
    config = flags.config_from_flags()
    processes.join(config)
    summary = run(config)
    print()
    print(table([summary]))
    print(f"\nresults and plots: {summary['workdir']}")


if __name__ == "__main__":
    flags.define({})
    flags.run_program(main)
