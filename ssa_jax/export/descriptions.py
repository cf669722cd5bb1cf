"""The layers of an export as JSON, and back."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.export.modules import (
    FUNCTIONS,
    Add,
    Affine,
    Attention,
    ExportError,
    MaxPool,
    conv,
    conv_options,
    linear,
)
from ssa_jax.layers import Pool
from ssa_jax.models.blocks import Gate
from ssa_jax.models.vit import Tokens

Description = dict[str, Any]


def describe(layer: Any) -> Description:
    """What `rebuild` needs to make a layer again, its arrays apart.

    Raises:
      ExportError: a layer of a kind that exports do not have.
    """
    if type(layer) is nnx.Linear:
        return {"kind": "linear", "shape": list(layer.kernel.shape), "bias": layer.use_bias}
    if type(layer) is nnx.Conv:
        shape = list(layer.kernel.shape)
        return {"kind": "conv", "shape": shape, "bias": layer.use_bias, **conv_options(layer)}
    if isinstance(layer, Affine):
        return {"kind": "affine", "features": layer.features}
    if isinstance(layer, MaxPool):
        return {"kind": "max_pool", **layer.pool._asdict()}
    if isinstance(layer, Add):
        return {"kind": "add", "branches": [_row(branch) for branch in layer.branches]}
    if isinstance(layer, Gate):
        return {"kind": "gate", "layers": _row(layer.gate)}
    if isinstance(layer, Attention):
        return {"kind": "attention", "heads": layer.heads, "maps": [_row(f) for f in layer.maps]}
    if isinstance(layer, Tokens):
        token = layer.token is not None
        return {"kind": "tokens", "shape": list(layer.positions.shape), "token": token}
    if _is_layer_norm(layer):
        features = layer.num_features
        return {"kind": "layer_norm", "features": features, "epsilon": layer.epsilon}
    for name, function in FUNCTIONS.items():
        if layer is function:
            return {"kind": name}
    name = getattr(layer, "__name__", type(layer).__name__)
    raise ExportError(f"exports have no layer {name}; they have {', '.join(FUNCTIONS)}")


def _row(layers: nnx.Sequential) -> list[Description]:
    return [describe(layer) for layer in layers.layers]


def _is_layer_norm(layer: Any) -> bool:
    """Whether it is a layer norm over the last axis, with scale and bias."""
    if type(layer) is not nnx.LayerNorm or None in (layer.scale, layer.bias):
        return False
    return layer.reduction_axes == layer.feature_axes == -1


def rebuild(description: Description) -> Any:
    """The layer of a description, its arrays being shapes alone.

    Raises:
      KeyError, TypeError, ValueError: no description of a layer.
    """
    options = dict(description)
    kind = options.pop("kind")
    if kind == "add":
        return Add([_rebuilt(branch) for branch in options["branches"]])
    if kind == "gate":
        return Gate(_rebuilt(options["layers"]).layers)
    if kind == "attention":
        return Attention(options["heads"], [_rebuilt(f) for f in options["maps"]])
    if kind == "max_pool":
        # Exports of earlier versions have the size alone, which was the stride too.
        return MaxPool(Pool(**{"stride": options["size"], **options}))
    if kind == "affine":
        return Affine(*[jax.ShapeDtypeStruct((options["features"],), jnp.float32)] * 2)  # type: ignore[arg-type]
    if kind in ("tokens", "layer_norm"):
        return nnx.eval_shape(lambda: _of_shapes(kind, options))
    if kind in ("linear", "conv"):
        kernel = jax.ShapeDtypeStruct(tuple(options.pop("shape")), jnp.float32)
        bias = jax.ShapeDtypeStruct(kernel.shape[-1:], jnp.float32) if options.pop("bias") else None
        return (linear if kind == "linear" else conv)(kernel, bias, **options)  # type: ignore[arg-type]
    return FUNCTIONS[kind]


def _rebuilt(layers: list[Description]) -> nnx.Sequential:
    return nnx.Sequential(*(rebuild(d) for d in layers))


def _of_shapes(kind: str, options: Description) -> nnx.Module:
    if kind == "layer_norm":
        epsilon = options["epsilon"]
        return nnx.LayerNorm(options["features"], epsilon=epsilon, rngs=nnx.Rngs(0))
    (count, width), token = options["shape"], options["token"]
    return Tokens(count - token, width, token=token, rngs=nnx.Rngs(0))
