"""Is an export what was trained, and what does it save?

    python -m experiments.evaluate --workdir=WORKDIR [--out=FOLDER]
    python -m experiments.evaluate --export=FOLDER

The first form restores a run, writes its export to WORKDIR/export (or --out) where there is
none yet, and compares every form of the network on the whole test set: the trained model, its
inference forms in memory, the reloaded weights and the reloaded StableHLO program. The second
does so for an export alone. Both print parameters, multiply-accumulates, bytes on disk and the
latency at batch 1 and 128 beside the dense network of the same architecture. Forms that do not
give the same logits are an error.
"""

from pathlib import Path

from absl import flags as absl_flags

from experiments import flags
from experiments.measure import exports
from ssa_jax.errors import ConfigError


def main() -> None:
    """Evaluates what the flags name."""
    values = absl_flags.FLAGS
    if bool(values.workdir) == bool(values.export):
        raise ConfigError("give either --workdir, a run, or --export, the folder of an export")
    if values.export and values.out:
        raise ConfigError("--out goes with --workdir; --export only reads")
    if values.export:
        rows = exports.evaluate_export(Path(values.export), values.data_dir)
    else:
        out = Path(values.out or Path(values.workdir) / "export")
        rows = exports.evaluate_run(Path(values.workdir), out, values.data_dir)
        print(f"export: {out}\n")
    print(exports.table(rows))


if __name__ == "__main__":
    flags.define_path("workdir", "A run, to be exported where that is not done yet.")
    flags.define_path("out", "Folder of its export; default: export/ in the workdir.")
    flags.define_path("export", "An export, to be evaluated without its run.")
    flags.define_path("data_dir", "TFDS directory; else the run's or TFDS's default.")
    flags.run_program(main)
