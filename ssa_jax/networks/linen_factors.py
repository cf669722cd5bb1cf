"""Linen layers on factors: a kernel in the parameters that is `Factors` is run as such."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from ssa_jax.factors import Factors, WithFeedback, is_factors
from ssa_jax.layers import products
from ssa_jax.layers.products import kernel_to_matrix

Array = jax.Array
Tree = Any


def understood() -> contextlib.AbstractContextManager[Any]:
    """A context in which Linen's Dense, DenseGeneral and Conv take `Factors` for their kernels."""
    return linen.intercept_methods(_run)


def _run(following: Any, args: Any, kwargs: Any, context: linen.module.InterceptorContext) -> Any:
    module = context.module
    apply = _LAYERS.get(type(module))
    if apply and context.method_name == "__call__" and module.has_variable("params", "kernel"):
        kernel: Any = module.get_variable("params", "kernel")
        if is_factors(kernel) or isinstance(kernel, WithFeedback):
            return apply(module, kernel, *args, **kwargs)
    return following(*args, **kwargs)


def _bias(module: Any, y: Array) -> Array:
    return y + module.get_variable("params", "bias") if module.use_bias else y


def _dense(module: linen.Dense, kernel: Factors, inputs: Array) -> Array:
    return _bias(module, products.dense(kernel, inputs))


def _dense_general(module: linen.DenseGeneral, kernel: Factors, inputs: Array) -> Array:
    axis, features = (_tuple(x) for x in (module.axis, module.features))
    return _bias(module, products.dense_general(kernel, inputs, axis, features))


def _conv(module: linen.Conv, kernel: Factors, inputs: Array) -> Array:
    *batch, height, width, channels = inputs.shape
    y = products.convolution(
        kernel,
        inputs.reshape(math.prod(batch), height, width, channels),
        _pair(module.kernel_size),
        _pair(module.strides),
        module.padding,
        _pair(module.kernel_dilation),
        module.feature_group_count,
    )
    return _bias(module, y.reshape(*batch, *y.shape[1:]))


def _tuple(x: Any) -> tuple[int, ...]:
    return (x,) if isinstance(x, int) else tuple(x)


def _pair(x: Any) -> tuple[int, int]:
    height, width = (x or 1, x or 1) if x is None or isinstance(x, int) else x
    return height, width


_LAYERS: dict[type, Callable[..., Array]] = {
    linen.Dense: _dense,
    linen.DenseGeneral: _dense_general,
    linen.Conv: _conv,
}


def layers_of(model: Any, variables: Tree, x: Any, **mode: bool) -> dict[str, linen.Module]:
    """The layers with a kernel that a model calls, by their path in its parameters."""
    layers: dict[str, linen.Module] = {}

    def note(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            layers["/".join(module.path)] = module.copy(parent=None)
        return following(*args, **kwargs)

    def run(variables: Tree, x: Any) -> Any:
        keys = {"dropout": jax.random.key(0)}
        return model.apply(variables, x, **mode, mutable=list(variables), rngs=keys)

    with linen.intercept_methods(note):
        jax.eval_shape(run, variables, x)
    return layers


def against(layer: linen.Module) -> str | None:
    """Why a layer cannot be put on factors, or None."""
    if type(layer) not in _LAYERS:
        return f"{type(layer).__name__} is neither Dense, DenseGeneral nor Conv"
    if layer.dtype not in (None, jnp.float32) or layer.param_dtype != jnp.float32:
        return "factors are float32, this layer is not"
    if isinstance(layer, linen.DenseGeneral) and _tuple(layer.batch_dims):
        return "it has batch_dims"
    if isinstance(layer, linen.Conv):
        if len(_tuple(layer.kernel_size)) != 2:
            return f"kernel_size={layer.kernel_size} is not two-dimensional"
        if layer.mask is not None:
            return "it has a mask"
        if _pair(layer.input_dilation) != (1, 1):
            return f"input_dilation={layer.input_dilation}"
        if isinstance(layer.padding, str) and layer.padding.upper() not in ("SAME", "VALID"):
            return f"padding={layer.padding}"
    return None


def matrix(layer: linen.Module, kernel: Array) -> Array:
    """The matrix (d_out, d_in) of a layer's kernel."""
    if isinstance(layer, linen.Conv):
        return kernel_to_matrix(kernel)
    inputs = len(_tuple(layer.axis)) if isinstance(layer, linen.DenseGeneral) else 1
    return kernel.reshape(math.prod(kernel.shape[:inputs]), -1).T
