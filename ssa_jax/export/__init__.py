"""Trained models in inference form, on disk and back.

`to_inference` makes a module of ordinary Flax layers, `save` writes it as safetensors with JSON
and as StableHLO, `load` and `load_stablehlo` read it. docs/export.md is the guide.
"""

from ssa_jax.export.convert import FORMS, to_inference
from ssa_jax.export.files import (
    load,
    load_stablehlo,
    read_config,
    save,
    stablehlo,
    weight_bytes,
    weights,
)
from ssa_jax.export.modules import Add, Affine, Attention, ExportError, InferenceModel, MaxPool
from ssa_jax.export.pretrained import load_pretrained

__all__ = [
    "FORMS",
    "Add",
    "Affine",
    "Attention",
    "ExportError",
    "InferenceModel",
    "MaxPool",
    "load",
    "load_pretrained",
    "load_stablehlo",
    "read_config",
    "save",
    "stablehlo",
    "to_inference",
    "weight_bytes",
    "weights",
]
