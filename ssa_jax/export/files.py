"""An export as a folder: weights (safetensors), their network (JSON), and a StableHLO program.

- model.json: the network layer by layer, input shape, checksums, whatever else is known.
- model.safetensors: its weights by name, float32.
- model.stablehlo: the same network as a program of `jax.export`, for any batch size.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax import export as jax_export

from ssa_jax.export.descriptions import describe, rebuild
from ssa_jax.export.modules import ExportError, InferenceModel

Array = jax.Array

FORMAT = "ssa_jax.export"
VERSION = 1
CONFIG, WEIGHTS, PROGRAM = "model.json", "model.safetensors", "model.stablehlo"
PLATFORMS = ("cpu", "cuda", "tpu")


def weights(model: InferenceModel) -> dict[str, np.ndarray]:
    """The arrays of a model by name, such as ``"layers/0/kernel"``."""
    return {
        "/".join(map(str, path)): np.ascontiguousarray(variable.get_value())
        for path, variable in nnx.to_flat_state(nnx.state(model))
    }


def weight_bytes(model: InferenceModel) -> int:
    """Size of the model's safetensors file."""
    return len(safetensors.numpy.save(weights(model)))


def stablehlo(model: InferenceModel) -> jax_export.Exported:
    """The model as a StableHLO program with its weights inside and a free batch size."""
    batch, *_ = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *model.input_shape), jnp.float32)
    return jax_export.export(jax.jit(lambda x: model(x)), platforms=PLATFORMS)(images)


def save(
    folder: str | Path, model: InferenceModel, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes an export, whole or not at all.

    Args:
      folder: created; may exist when it is empty.
      model: of `to_inference`, or any other `InferenceModel`.
      metadata: more for model.json, such as the normalisation of the images; JSON values.

    Raises:
      ExportError: the folder holds something, or a layer of a kind that exports do not have.
      OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExportError(f"{folder} exists already; nothing was written, choose another folder")
    layers = [describe(layer) for layer in model.layers]
    contents = {
        WEIGHTS: safetensors.numpy.save(weights(model)),
        PROGRAM: bytes(stablehlo(model).serialize()),
    }
    config = {
        "format": FORMAT,
        "version": VERSION,
        "input_shape": list(model.input_shape),
        "layers": layers,
        "sha256": {name: hashlib.sha256(x).hexdigest() for name, x in contents.items()},
        "metadata": dict(metadata or {}),
    }
    contents[CONFIG] = (json.dumps(config, indent=1) + "\n").encode()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_config(folder: str | Path) -> dict[str, Any]:
    """The contents of an export's model.json.

    Raises:
      ExportError: missing, damaged, or of another format or version.
    """
    file = Path(folder) / CONFIG
    try:
        config = json.loads(_read(file))
    except ValueError as e:
        if isinstance(e, ExportError):
            raise
        raise ExportError(f"{file} is damaged: {e}; export the model again") from e
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ExportError(f"{file} was not written by {FORMAT}")
    if config.get("version") != VERSION:
        raise ExportError(
            f"{file} has format version {config.get('version')}, this code reads {VERSION}"
        )
    return config


def load(folder: str | Path) -> InferenceModel:
    """The model of an export, from its JSON and its weights.

    Raises:
      ExportError: a file is missing, damaged, or of something else.
    """
    config = read_config(folder)
    file = Path(folder) / WEIGHTS
    content = _checked(config, file)
    try:
        model = InferenceModel(config["input_shape"], [rebuild(d) for d in config["layers"]])
        arrays = safetensors.numpy.load(content)
        wanted = {k: x.shape for k, x in _variables(model).items()}
    except Exception as e:
        raise ExportError(f"{folder} holds no network that can be rebuilt: {e!r}") from e
    if wanted != {k: x.shape for k, x in arrays.items()}:
        raise ExportError(f"{file} does not hold the weights that {CONFIG} describes")
    for name, variable in _variables(model).items():
        variable.set_value(jnp.asarray(arrays[name], jnp.float32))
    return model


def load_stablehlo(folder: str | Path) -> Callable[[Array], Array]:
    """The program of an export: (batch, H, W, C) float32 -> logits, jitted.

    Raises:
      ExportError: a file is missing, damaged, or of something else; or, when it is called,
        images of another shape or type.
    """
    config = read_config(folder)
    content = _checked(config, Path(folder) / PROGRAM)
    try:
        program = jax_export.deserialize(bytearray(content))
    except Exception as e:
        raise ExportError(f"{folder} holds no program of jax.export: {e!r}") from e
    call = jax.jit(program.call)

    def checked(x: Array) -> Array:
        try:
            return call(x)
        except ValueError as e:
            raise ExportError(f"the program takes other images: {e}") from e

    return checked


def _variables(model: InferenceModel) -> dict[str, Any]:
    return {"/".join(map(str, path)): v for path, v in nnx.iter_graph(model) if _is_param(v)}


def _is_param(node: Any) -> bool:
    return isinstance(node, nnx.Param)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as e:
        raise ExportError(f"{file} cannot be read: {e.strerror}") from e


def _checked(config: dict[str, Any], file: Path) -> bytes:
    """A file's contents, if they are what the JSON says."""
    content = _read(file)
    if hashlib.sha256(content).hexdigest() != config.get("sha256", {}).get(file.name):
        raise ExportError(
            f"{file} is damaged or of another export: its checksum is not the one in {CONFIG}; "
            "export the model again"
        )
    return content
