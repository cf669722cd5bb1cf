"""From a trained model to its inference form: layers merged or factored, batch norms folded."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssa_jax.export import modules
from ssa_jax.export.descriptions import describe
from ssa_jax.export.modules import (
    FUNCTIONS,
    Add,
    Affine,
    Attention,
    ExportError,
    InferenceModel,
    MaxPool,
)
from ssa_jax.layers import SVDConv, SVDDense, SVDLinearGeneral, matrix_to_kernel, split_padding
from ssa_jax.models.blocks import Gate, Plain, Residual
from ssa_jax.training import costs

Array = jax.Array
FORMS = ("auto", "factored", "merged")


class _Step(NamedTuple):
    """One layer of the trained model, or a sum of branches, and where it stands."""

    path: str
    layer: Any


class _Branches(NamedTuple):
    """Steps of each branch of a sum."""

    steps: tuple[list[_Step], ...]


def to_inference(
    model: nnx.Module, input_shape: Sequence[int], form: str = "auto"
) -> InferenceModel:
    """The inference form of a trained model: ordinary layers, no batch norm after a linear map.

    A factorised layer becomes two layers in a row (factored: V diag(s), then Uᵀ) or one
    (merged: W = U diag(s) Vᵀ). A batch norm with running mean μ and variance σ² is the affine
    map x ⊙ a + c with a = γ/√(σ² + ε), c = β − μ ⊙ a. Right behind a linear map it is folded
    in: W ← diag(a) W, or U ← diag(a) U in factored form, and b ← a ⊙ b + c. Elsewhere it stays
    as an `Affine`. Products are taken in float64 and rounded once to float32.

    Args:
      model: a model of `MODELS`, an `InferenceModel`, or any nesting of `units`,
        `nnx.Sequential`, unit modules, stock or factorised linear layers and convolutions, batch
        and layer norms, self-attention, dropout, and the functions that `modules.FUNCTIONS`
        lists. It is left as it is.
      input_shape: (H, W, C) of an image.
      form: ``"factored"``, ``"merged"``, or ``"auto"``: for each layer the one with fewer
        multiply-accumulates, merged where they are equal.

    Returns:
      a model with the same logits up to rounding.

    Raises:
      ExportError: another form, or a layer that has no inference form, named by its path.
      ValueError: images that do not fit the model.
    """
    if form not in FORMS:
        raise ExportError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    return InferenceModel(input_shape, _compile(_steps("model", model), image, form))


def _steps(path: str, node: Any) -> list[_Step]:
    """The layers of a module in the order they run."""
    if isinstance(node, Plain):
        before = [f for on, f in ((node.average, "average"), (node.flatten, "flatten")) if on]
        steps = [_Step(path, FUNCTIONS[f]) for f in before] + _steps(f"{path}/map", node.map)
        steps += [_Step(f"{path}/norm", node.norm)] if node.norm is not None else []
        steps += _activation(path, node.activation)
        return steps + ([_Step(path, MaxPool(node.pool))] if node.pool else [])
    if isinstance(node, Residual):
        body = _sequence(f"{path}/body", node.body)
        shortcut = [] if node.shortcut is None else _steps(f"{path}/shortcut", node.shortcut)
        joined = [_Step(path, _Branches((body, shortcut)))] if node.skip else body
        return joined + _activation(path, node.activation)
    for name in ("units", "layers"):
        if hasattr(node, name):
            return _sequence(f"{path}/{name}", getattr(node, name))
    return [] if isinstance(node, nnx.Dropout) else [_Step(path, node)]


def _sequence(path: str, nodes: Iterable[Any]) -> list[_Step]:
    return [step for i, node in enumerate(nodes) for step in _steps(f"{path}/{i}", node)]


def _activation(path: str, activation: Any) -> list[_Step]:
    return [] if activation is None else [_Step(path, activation)]


def _compile(steps: Sequence[_Step], x: Any, form: str) -> list[Any]:
    """Layers of the inference form, for inputs of the shape of x."""
    layers: list[Any] = []
    for path, step in steps:
        if isinstance(step, nnx.BatchNorm):
            _absorb(path, step, layers)
            continue
        new = _converted(path, step, x, form)
        x = jax.eval_shape(nnx.Sequential(*new), x)
        layers += new
    return layers


def _converted(path: str, step: Any, x: Any, form: str) -> list[Any]:
    """The ordinary layers that one step becomes."""
    if isinstance(step, _Branches):
        return [Add([nnx.Sequential(*_compile(branch, x, form)) for branch in step.steps])]
    if isinstance(step, Gate):
        return [Gate(_compile(_sequence(f"{path}/gate", step.gate.layers), x, form))]
    if isinstance(step, nnx.MultiHeadAttention):
        return [_attention(path, step, x, form)]
    if isinstance(step, SVDConv) and not step.is_plain:
        raise ExportError(f"{path}: a grouped or dilated SVDConv has no inference form")
    if isinstance(step, SVDDense | SVDConv | SVDLinearGeneral):
        return _chosen(step, x, form)
    if type(step) in (nnx.Linear, nnx.Conv):
        return [_copied(path, step)]
    try:
        describe(step)
    except ExportError as e:
        raise ExportError(f"{path}: {e}") from e
    return [nnx.clone(step) if isinstance(step, nnx.Module) else step]


def _attention(path: str, layer: nnx.MultiHeadAttention, x: Any, form: str) -> Attention:
    """Attention of maps on rows: heads are made of a row, and one of them."""
    if layer.normalize_qk or layer.attention_fn is not nnx.dot_product_attention:
        raise ExportError(f"{path}: attention of its own kind has no inference form")
    inner = jax.ShapeDtypeStruct((*x.shape[:-1], layer.qkv_features), x.dtype)

    def row(name: str, x: Any) -> nnx.Sequential:
        part = getattr(layer, name)
        if type(part) is nnx.LinearGeneral:
            kernel, bias = part.kernel.get_value(), _bias(part)
            return nnx.Sequential(modules.linear(kernel.reshape(x.shape[-1], -1), bias))
        return nnx.Sequential(*_converted(f"{path}/{name}", part, x, form))

    maps = [row(name, x) for name in ("query", "key", "value")]
    return Attention(layer.num_heads, [*maps, row("out", inner)])


_Factored = SVDDense | SVDConv | SVDLinearGeneral


def _chosen(layer: _Factored, x: Any, form: str) -> list[Any]:
    pair, single = _factored(layer), [_merged(layer)]
    if form != "auto":
        return pair if form == "factored" else single
    return pair if _macs(pair, x) < _macs(single, x) else single


def _macs(layers: Sequence[Any], x: Any) -> int:
    return costs.macs(nnx.Sequential(*layers), x)


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _narrow(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)


def _bias(layer: Any) -> Array | None:
    return None if layer.bias is None else layer.bias.get_value().reshape(-1)


def _factored(layer: _Factored) -> list[Any]:
    """Two layers: by V diag(s), without bias, then by Uᵀ."""
    u, s, v = layer.kernel.get_value()
    down = _narrow(_wide(v) * _wide(s)[None, :])
    if not isinstance(layer, SVDConv):
        return [modules.linear(down, None), modules.linear(u.T, _bias(layer))]
    (kh, kw), (sh, sw), r = layer.kernel_size, layer.strides, s.shape[0]
    pad_h, pad_w = split_padding(layer.padding)
    across = u.reshape(1, kw, -1, r).swapaxes(2, 3)
    return [
        modules.conv(down.reshape(kh, 1, -1, r), None, strides=(sh, 1), padding=pad_h),
        modules.conv(across, _bias(layer), strides=(1, sw), padding=pad_w),
    ]


def _merged(layer: _Factored) -> Any:
    """One layer, of W = U diag(s) Vᵀ."""
    u, s, v = map(_wide, layer.kernel.get_value())
    w = _narrow((u * s[None, :]) @ v.T)
    if not isinstance(layer, SVDConv):
        return modules.linear(w.T, _bias(layer))
    kernel = matrix_to_kernel(w, layer.kernel_size)
    padding = layer.padding.upper() if isinstance(layer.padding, str) else layer.padding
    return modules.conv(kernel, _bias(layer), strides=layer.strides, padding=padding)


def _affine(norm: nnx.BatchNorm) -> tuple[np.ndarray, np.ndarray]:
    """Scale a and shift c of a batch norm in evaluation mode, float64."""
    mean, var = _wide(norm.mean.get_value()), _wide(norm.var.get_value())
    scale = 1 / np.sqrt(var + norm.epsilon)
    if norm.scale is not None:
        scale = scale * _wide(norm.scale.get_value())
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + _wide(norm.bias.get_value())


def _absorb(path: str, norm: nnx.BatchNorm, layers: list[Any]) -> None:
    """Folds a batch norm into the linear map that ends `layers`, or appends it as an `Affine`."""
    if norm.axis != -1:
        raise ExportError(f"{path}: a batch norm over axis {norm.axis} has no inference form")
    scale, shift = _affine(norm)
    if not layers or type(layers[-1]) not in (nnx.Linear, nnx.Conv):
        layers.append(Affine(_narrow(scale), _narrow(shift)))
        return
    # Made above as a copy: the trained model keeps its own.
    kernel = layers[-1].kernel.get_value()
    bias = _bias(layers[-1])
    scaled = _wide(kernel) * scale.reshape((1,) * (kernel.ndim - 1) + (-1,))
    shifted = shift if bias is None else shift + scale * _wide(bias)
    layers[-1] = _like(layers[-1], _narrow(scaled), _narrow(shifted))


def _copied(path: str, layer: Any) -> Any:
    """A stock layer of the same weights and options."""
    if layer.param_dtype != jnp.float32 or layer.dtype not in (None, jnp.float32):
        raise ExportError(f"{path}: exports are float32, this layer is not")
    if getattr(layer, "mask", None) is not None:
        raise ExportError(f"{path}: a convolution with a mask has no inference form")
    return _like(layer, layer.kernel.get_value(), _bias(layer))


def _like(layer: Any, kernel: Array, bias: Array | None) -> Any:
    if isinstance(layer, nnx.Linear):
        return modules.linear(kernel, bias)
    return modules.conv(kernel, bias, **modules.conv_options(layer))
