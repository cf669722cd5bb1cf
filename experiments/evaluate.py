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

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from experiments.flags import define_path, run_program
from experiments.latency import latencies
from experiments.table import markdown
from ssa_jax import export
from ssa_jax.data import Images
from ssa_jax.data.streams import STREAMS
from ssa_jax.errors import ConfigError
from ssa_jax.export import ExportError, InferenceModel
from ssa_jax.runs import inputs, network, trained
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.trained import Trained
from ssa_jax.training import costs

Array = jax.Array
Row = dict[str, Any]

BATCHES = (1, 128)
# Largest difference of logits, relative to the largest logit.
TOLERANCE = 1e-5
HEADER = ("form", "test accuracy", "difference", "parameters", "MACs", "bytes",
          *(f"ms at batch {b}" for b in BATCHES), "of dense")  # fmt: skip


class Form(NamedTuple):
    """One form of a network: how to call it, the module that tells its size, bytes on disk."""

    call: Callable[[Array], Array]
    module: nnx.Module
    bytes: int | None


def evaluate_run(workdir: Path, out: Path | None = None, data_dir: str | None = None) -> list[Row]:
    """Exports a run where that is not done yet, and compares all its forms.

    Args:
      workdir: of the run.
      out: folder of the export; None takes ``workdir/export``.
      data_dir: see `trained.restore`, which also names the errors.

    Returns:
      one row a form, the dense network last.

    Raises:
      ExportError: an export of another epoch or run, a damaged one, or forms that differ.
    """
    run = trained.restore(workdir, data_dir)
    folder = out or workdir / "export"
    shape = run.data.image_shape
    names = export.FORMS if run.config.factorized else ("merged",)
    models = {name: export.to_inference(run.model, shape, name) for name in names}
    metadata = _metadata(run)
    if folder.exists():
        _check_belongs(folder, metadata)
    else:
        export.save(folder, models[names[0]], metadata)
    forms = {"trained": Form(run.model, run.model, None)}
    forms |= {name: Form(m, m, export.weight_bytes(m)) for name, m in models.items()}
    forms |= _stored(folder)
    return _compare(forms, run.data, run.config, run.test_accuracy)


def evaluate_export(folder: Path, data_dir: str | None = None) -> list[Row]:
    """Compares the two stored forms of an export, on the data set that it names.

    Raises:
      ExportError: a damaged export, one that names no model and data set, or forms that differ.
      ConfigError, DataError: a model or data set that is not here.
    """
    forms = _stored(folder)
    stored = export.read_config(folder)
    metadata = stored["metadata"]
    if not {"model", "dataset"} <= metadata.keys():
        raise ExportError(f"{folder} names no model and data set to be evaluated on")
    config = Config(model=metadata["model"], dataset=metadata["dataset"])
    if config.dataset in STREAMS:
        config = dataclasses.replace(config, image_size=stored["input_shape"][0])
    config.validate()
    data = inputs.load(dataclasses.replace(config, data_dir=data_dir))
    return _compare(forms, data, config, metadata.get("test_accuracy"))


def _metadata(run: Trained) -> dict[str, Any]:
    moments = inputs.moments(run.data)
    return {
        "model": run.config.model,
        "dataset": run.config.dataset,
        "method": run.config.method,
        "seed": run.config.seed,
        "epoch": run.epoch,
        "test_accuracy": run.test_accuracy,
        # Of pixels in [0, 255]: the network takes (image - mean) / std.
        "normalization": {
            name: found.tolist()
            for name, found in zip(("mean", "std"), moments or (), strict=False)
        },
    }


def _check_belongs(folder: Path, metadata: dict[str, Any]) -> None:
    stored = export.read_config(folder)["metadata"]
    for name in ("model", "dataset", "method", "seed", "epoch"):
        if stored.get(name) != metadata[name]:
            raise ExportError(
                f"{folder} holds an export of {name}={stored.get(name)}, the run is at "
                f"{metadata[name]}; choose another --out or delete the folder"
            )


def _stored(folder: Path) -> dict[str, Form]:
    model = export.load(folder)
    program = export.load_stablehlo(folder)
    size = {
        name: (folder / f"model.{name}").stat().st_size for name in ("safetensors", "stablehlo")
    }
    return {
        "safetensors": Form(model, model, size["safetensors"]),
        "stablehlo": Form(program, model, size["stablehlo"]),
    }


def _compare(
    forms: dict[str, Form], data: Data, config: Config, expected: float | None
) -> list[Row]:
    loader = inputs.make_loader(config, data)
    labels = np.concatenate([np.asarray(batch.labels) for batch in loader.test_batches()])
    # The last batch is padded, and a file that cannot be decoded has no label.
    there = labels >= 0
    labels = labels[there]
    logits = {name: _logits(form.call, loader)[there] for name, form in forms.items()}
    reference = next(iter(logits.values()))
    rows = [
        {
            "form": name,
            "test_accuracy": float(np.mean(np.argmax(y, -1) == labels)),
            "difference": float(np.abs(y - reference).max() / np.abs(reference).max()),
        }
        for name, y in logits.items()
    ]
    _check_agreement(rows, reference, expected)
    dense = _dense(config, data)
    rows.append({"form": "dense", "test_accuracy": None, "difference": None})
    sized = {**forms, "dense": Form(dense, dense, export.weight_bytes(dense))}
    return _with_costs(rows, sized, data.image_shape)


def _logits(call: Callable[[Array], Array], loader: inputs.AnyLoader) -> np.ndarray:
    """Logits (n, classes) of all test batches."""
    program = jax.jit(lambda x: call(x))
    batches = loader.test_batches()
    return np.concatenate([np.asarray(program(batch.images)) for batch in batches])


def _check_agreement(rows: list[Row], reference: np.ndarray, expected: float | None) -> None:
    top = np.sort(reference, axis=-1)[:, -2:]
    ties = np.mean(top[:, 1] - top[:, 0] <= 2 * TOLERANCE * np.abs(reference).max())
    for row in rows:
        # Not "more than": a difference that is NaN is one.
        if not row["difference"] <= TOLERANCE:
            raise ExportError(
                f"the {row['form']} form differs from the {rows[0]['form']} one by "
                f"{row['difference']:.1e} of the largest logit; delete the export and make it anew"
            )
        # Rounding may decide between equal logits, and nothing else.
        if expected is not None and abs(row["test_accuracy"] - expected) > ties + 1e-9:
            raise ExportError(
                f"the {row['form']} form has test accuracy {row['test_accuracy']:.4f}, training "
                f"measured {expected:.4f}; is --data_dir the same data?"
            )


def _dense(config: Config, data: Images) -> InferenceModel:
    """The inference form of the same architecture without factors; its weights are random."""
    model = network.make_model(config, data, factorized=False)
    return export.to_inference(model, data.image_shape)


def _with_costs(rows: list[Row], forms: dict[str, Form], input_shape: tuple[int, ...]) -> list[Row]:
    calls = {name: form.call for name, form in forms.items()}
    times = {batch: latencies(calls, input_shape, batch) for batch in BATCHES}
    image = jax.ShapeDtypeStruct((1, *input_shape), "float32")
    return [
        {
            **row,
            "params": costs.parameters(nnx.state(form.module, nnx.Param)),
            "macs": costs.macs(form.module, image),
            "bytes": form.bytes,
            "ms": [times[b][row["form"]].ms for b in BATCHES],
            "of_dense": [times[b][row["form"]].ms / times[b]["dense"].ms for b in BATCHES],
        }
        for row, form in zip(rows, forms.values(), strict=True)
    ]


def table(rows: list[Row]) -> str:
    """One line a form; difference: of logits, relative to the largest; of dense: latency."""
    return markdown(HEADER, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: Any, form: str) -> str:
        return "-" if value is None else format(value, form)

    accuracy = row["test_accuracy"]
    return (
        row["form"],
        shown(None if accuracy is None else 100 * accuracy, ".2f") + " %" * (accuracy is not None),
        shown(row["difference"], ".1e"),
        f"{row['params']:,}",
        f"{row['macs']:,}",
        shown(row["bytes"], ","),
        *(f"{ms:.3g}" for ms in row["ms"]),
        " ".join(f"{ratio:.2f}" for ratio in row["of_dense"]),
    )


def main() -> None:
    """Evaluates what the flags name."""
    f = flags.FLAGS
    if bool(f.workdir) == bool(f.export):
        raise ConfigError("give either --workdir, a run, or --export, the folder of an export")
    if f.export and f.out:
        raise ConfigError("--out goes with --workdir; --export only reads")
    if f.export:
        rows = evaluate_export(Path(f.export), f.data_dir)
    else:
        rows = evaluate_run(Path(f.workdir), Path(f.out) if f.out else None, f.data_dir)
        print(f"export: {f.out or Path(f.workdir) / 'export'}\n")
    print(table(rows))


if __name__ == "__main__":
    define_path("workdir", "A run, to be exported where that is not done yet.")
    define_path("out", "Folder of its export; default: export/ in the workdir.")
    define_path("export", "An export, to be evaluated without its run.")
    define_path("data_dir", "TFDS directory; else the run's or TFDS's default.")
    run_program(main)
