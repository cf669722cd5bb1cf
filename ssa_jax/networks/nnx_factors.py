"""Which layers of an NNX module can be put on factors, and what each becomes."""

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssa_jax.factors import Factors, to_dense
from ssa_jax.layers import (
    SVDConv,
    SVDDense,
    SVDLinearGeneral,
    kernel_to_matrix,
    matrix_to_kernel,
)
from ssa_jax.layers.lowering import conv_general_dilated

# What a layer on factors takes over from the stock one, has no use for, or is told of by
# `unsupported` itself; all else must be as a new layer has it.
_UNDERSTOOD = {"kernel", "bias", "use_bias", "in_features", "out_features", "kernel_init",
               "bias_init", "kernel_size", "kernel_shape", "strides", "padding", "dtype",
               "kernel_dilation", "input_dilation", "feature_group_count", "mask",
               "param_dtype", "axis"}  # fmt: skip
_ON_FACTORS = SVDDense | SVDConv | SVDLinearGeneral


def examined(model: nnx.Module) -> tuple[dict[str, Any], dict[str, str | None]]:
    """Layers with a kernel that are not on factors, by path, and why they cannot be, if so."""
    layers = {
        name_of(path): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(getattr(layer, "kernel", None), nnx.Variable)
        and not isinstance(layer, _ON_FACTORS)
    }
    uses = _uses(model)
    return layers, {path: _against(layer, uses) for path, layer in layers.items()}


def unsupported(layer: Any) -> str | None:
    """Why a layer cannot be factorised, or None where it can."""
    if type(layer) not in (nnx.Linear, nnx.Conv, nnx.LinearGeneral):
        return f"{type(layer).__name__} is neither nnx.Linear, nnx.Conv nor nnx.LinearGeneral"
    if reason := _unlike_new(layer):
        return reason
    if layer.param_dtype != jnp.float32 or layer.dtype not in (None, jnp.float32):
        return "factors are float32, this layer is not"
    if type(layer) is nnx.LinearGeneral:
        return "it has batch axes" if layer.batch_axis else None
    if type(layer) is nnx.Linear:
        return None
    if len(layer.kernel_size) != 2:
        return f"kernel_size={layer.kernel_size} is not two-dimensional"
    if layer.in_features > 1 and layer.feature_group_count == layer.in_features:
        return "depthwise: its factors would hold more than its kernel"
    if np.any(np.asarray(layer.input_dilation or 1) != 1):
        return f"input_dilation={layer.input_dilation}"
    if layer.mask is not None:
        return "it has a mask"
    if isinstance(layer.padding, str) and layer.padding.upper() not in ("SAME", "VALID"):
        return f"padding={layer.padding}"
    return None


def _unlike_new(layer: Any) -> str | None:
    """What a stock layer has that a new one of its size has not, or None."""
    sizes = [layer.in_features, layer.out_features]
    if isinstance(layer, nnx.Conv):
        sizes.append(layer.kernel_size)
    options: dict[str, Any] = {}
    if isinstance(layer, nnx.Conv):
        options = {"feature_group_count": layer.feature_group_count}
    elif isinstance(layer, nnx.LinearGeneral):
        options = {"axis": layer.axis, "batch_axis": layer.batch_axis}
    new = _shapes_of(lambda: type(layer)(*sizes, **options, rngs=nnx.Rngs(0)))
    for name, value in vars(layer).items():
        known = name in _UNDERSTOOD or name.startswith("_")
        known |= value is conv_general_dilated
        if not known and (not hasattr(new, name) or getattr(new, name) != value):
            return f"its {name} is not that of a new layer"
    for name in ("kernel", "bias"):
        variable, fresh = getattr(layer, name), getattr(new, name)
        if variable is None:
            continue
        if type(variable) is not nnx.Param:
            return f"its {name} is a {type(variable).__name__}"
        if variable.shape != fresh.shape:
            return f"its {name} has shape {variable.shape}, not {fresh.shape}: a stack of layers"
        if variable.get_metadata() != fresh.get_metadata():
            return f"its {name} has metadata"
    return None


def _uses(model: nnx.Module) -> collections.Counter[int]:
    """How many nodes of a model hold each of its variables, by identity."""
    held: list[Any] = []
    for _, node in nnx.iter_graph(model):
        if isinstance(node, dict | list | tuple):
            held += node.values() if isinstance(node, dict) else node
        elif isinstance(node, nnx.Pytree):
            held += vars(node).values()
    return collections.Counter(id(x) for x in held if isinstance(x, nnx.Variable))


def _against(layer: Any, uses: Mapping[int, int]) -> str | None:
    """Why a layer of a model is not put on factors, or None."""
    shared = [name for name in ("kernel", "bias") if uses[id(getattr(layer, name, None))] > 1]
    return f"its {shared[0]} is another layer's too" if shared else unsupported(layer)


def _shapes_of(make: Callable[[], Any]) -> Any:
    """A module with shapes in place of arrays, also where a mesh is set.

    There Flax (0.12.8) gives a variable without a partition a sharding without one, which fails.
    """
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        return nnx.eval_shape(make)


def name_of(path: Any) -> str:
    """The path of a layer in its model, such as ``"units/0/map"``."""
    return "/".join(map(str, path))


def matrix(layer: Any) -> Any:
    """The matrix (d_out, d_in) that is factorised."""
    kernel = layer.kernel.get_value()
    if isinstance(layer, nnx.Conv):
        return kernel_to_matrix(kernel)
    inputs = math.prod(layer.in_features) if isinstance(layer, nnx.LinearGeneral) else len(kernel)
    return kernel.reshape(inputs, -1).T


def on_factors(layer: Any, kernel: Factors) -> nnx.Module:
    """The layer on given factors, with its own bias."""

    def make() -> Any:
        options: dict[str, Any] = {"use_bias": layer.bias is not None, "rngs": nnx.Rngs(0)}
        if isinstance(layer, nnx.LinearGeneral):
            options["axis"] = layer.axis
            return SVDLinearGeneral(layer.in_features, layer.out_features, **options)
        if isinstance(layer, nnx.Linear):
            return SVDDense(layer.in_features, layer.out_features, **options)
        options |= {"strides": layer.strides or 1, "padding": layer.padding}
        options |= {
            "kernel_dilation": layer.kernel_dilation or 1,
            "feature_group_count": layer.feature_group_count,
        }
        return SVDConv(layer.in_features, layer.out_features, layer.kernel_size, **options)

    return _filled(make, kernel, layer)


def off_factors(layer: Any) -> nnx.Module:
    """The stock layer of a layer's matrix U diag(s) Vᵀ, with its own bias: undoes `on_factors`."""
    matrix = to_dense(layer.kernel.get_value())

    def make() -> Any:
        options: dict[str, Any] = {"use_bias": layer.bias is not None, "rngs": nnx.Rngs(0)}
        if isinstance(layer, SVDDense):
            return nnx.Linear(layer.in_features, layer.out_features, **options)
        if isinstance(layer, SVDLinearGeneral):
            return nnx.LinearGeneral(layer.in_shape, layer.out_shape, axis=layer.axis, **options)
        for name in ("strides", "padding", "kernel_dilation", "feature_group_count"):
            options[name] = getattr(layer, name)
        return nnx.Conv(layer.in_features, layer.out_features, layer.kernel_size, **options)

    if isinstance(layer, SVDConv):
        return _filled(make, matrix_to_kernel(matrix, layer.kernel_size), layer)
    general = isinstance(layer, SVDLinearGeneral)
    shape = (*layer.in_shape, *layer.out_shape) if general else matrix.T.shape
    return _filled(make, matrix.T.reshape(shape), layer)


def _filled(make: Callable[[], Any], kernel: Any, layer: Any) -> nnx.Module:
    """A new layer with a kernel and the bias of another."""
    # Made of shapes alone: an initialisation would take an SVD only to be replaced.
    new = _shapes_of(make)
    new.kernel.set_value(kernel)
    if layer.bias is not None:
        new.bias.set_value(layer.bias.get_value())
    return new


def merged(model: nnx.Module) -> nnx.Module:
    """A copy of a model whose layers on factors are the stock ones of the same matrices."""

    def convert(path: Any, node: Any) -> Any:
        del path
        return off_factors(node) if isinstance(node, _ON_FACTORS) else node

    return nnx.recursive_map(convert, nnx.clone(model))
