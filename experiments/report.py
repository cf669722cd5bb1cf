"""Compares runs: what they reached and cost, their curves, and the settings in which they differ.

    python -m experiments.report WORKDIR [WORKDIR ...] [--out=FOLDER]

The folder gets report.md, curves.png and index.html, which is one file with the picture in it.
Runs may be finished or not; what a run does not tell yet is a dash.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags as absl_flags

from experiments import flags, folders
from experiments.show import comparison, markdown


def main(workdirs: Sequence[str]) -> None:
    """Writes the report that the command line asks for and says where it is."""
    compared = comparison.read(workdirs)
    page = comparison.write(compared, Path(absl_flags.FLAGS.out or folders.new("report")))
    print(markdown.table(*comparison.reached(compared)))
    print(f"\nreport: {page}")


if __name__ == "__main__":
    flags.define_path("out", "Where the report goes; default: a new folder in runs/.")
    flags.run_program(main, arguments=True)
