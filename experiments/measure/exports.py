"""Every form of a trained network beside what was trained: its accuracy, its size, its speed."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from experiments.measure.timing import latencies
from experiments.show import markdown
from experiments.show.runs import Row, text
from ssa_jax import export
from ssa_jax.data import DATASETS
from ssa_jax.data.streams import STREAMS
from ssa_jax.export import ExportError
from ssa_jax.runs import inputs, network, trained
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.trained import Trained
from ssa_jax.training import costs

Array = jax.Array
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
    metadata = metadata_of(run)
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
    if config.dataset in (*STREAMS, *DATASETS):
        config = dataclasses.replace(config, image_size=stored["input_shape"][0])
    config.validate()
    data = inputs.load(dataclasses.replace(config, data_dir=data_dir))
    return _compare(forms, data, config, metadata.get("test_accuracy"))


def metadata_of(run: Trained) -> dict[str, Any]:
    """What the export of a run says of it."""
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
            name: moment.tolist()
            for name, moment in zip(("mean", "std"), moments or (), strict=False)
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
    labelled = labels >= 0
    labels = labels[labelled]
    logits = {name: _logits(form.call, loader)[labelled] for name, form in forms.items()}
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
    # The same architecture without factors; its weights are random.
    dense = export.to_inference(
        network.make_model(config, data, factorized=False), data.image_shape
    )
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
    lines = [
        (
            row["form"],
            text(row, "test_accuracy", "{:.2f} %", 100),
            text(row, "difference", "{:.1e}"),
            text(row, "params", "{:,}"),
            text(row, "macs", "{:,}"),
            text(row, "bytes", "{:,}"),
            *(f"{ms:.3g}" for ms in row["ms"]),
            " ".join(f"{ratio:.2f}" for ratio in row["of_dense"]),
        )
        for row in rows
    ]
    return markdown.table(HEADER, lines)
