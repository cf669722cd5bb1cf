"""How far down does a direct signal reach in a trained network?

    python -m experiments.reach --workdir=WORKDIR [--examples=N] [--out=FILE.json]

Takes the weights of a run, of whatever method, and measures what direct SSA would learn from on
them: the angles between its gradients and the true ones, and between its signals and the true ones.
Forms are each layer a unit, the same looking one ahead, units of two, four and eight, and the
default of such a network, if it is none of these; and two maps that are nearest to the true signals
in the mean square over 2048 training examples or as many as there are beside those that are probed:
the linear map of the error, which says what better paths could gain, and that with gates from a
unit's own output, which says what gates could (left out where it would take too much memory).
Nothing is trained and the run's folder stays as it is.
"""

import json
import sys
from pathlib import Path

from absl import flags as absl_flags

from experiments import flags, folders
from experiments.measure import reach
from ssa_jax.reporting.environment import environment
from ssa_jax.runs import trained


def main() -> None:
    """Measures the run that the flags name."""
    values = absl_flags.FLAGS
    out = Path(values.out) if values.out else None
    if out:
        # What cannot be kept is told before it is measured.
        _write(out, "a", "")
        if not out.stat().st_size:
            out.unlink()
    run = trained.restore(Path(values.workdir), values.data_dir)
    rows = []
    for row in reach.measure(run, values.examples):
        print(f"{row['form']}: {' '.join(f'{a:.0f}°' for a in row['angles'])}", flush=True)
        rows.append(row)
    if all(row["form"] != reach.GATED.label for row in rows):
        print(f"{reach.GATED.label}: left out, it would take more than {reach.LARGEST >> 20} MiB")
    print(f"\n{reach.table(rows)}\n\n{reach.advice(rows)}")
    if out:
        told = {"model": run.config.model, "method": run.config.method, "epochs": run.epoch}
        made = {
            "command": " ".join(["python -m experiments.reach", *sys.argv[1:]]),
            **environment(),
        }
        _write(out, "w", json.dumps({**made, **told, "rows": rows}, indent=1) + "\n")


def _write(out: Path, mode: str, text: str) -> None:
    with folders.writing(out.parent, "--out"), out.open(mode) as file:
        file.write(text)


if __name__ == "__main__":
    flags.define_path("workdir", "The run whose weights are looked at.")
    flags.define_path("data_dir", "TFDS directory; else the run's or TFDS's default.")
    flags.define_path("out", "A JSON file for the figures, with command, hardware and commit.")
    absl_flags.DEFINE_integer(
        "examples",
        None,
        "Training examples of the regression; 2048 or what there is.",
        lower_bound=1,
    )
    absl_flags.mark_flag_as_required("workdir")
    flags.run_program(main)
