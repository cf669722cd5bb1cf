"""Pretrained dense models on factors: stock linear layers and convolutions by their SVD."""

import collections
import warnings
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssa_jax.factors import Factors, rank_of
from ssa_jax.layers import SVDConv, SVDDense, kernel_to_matrix
from ssa_jax.layers.lowering import conv_general_dilated

# What a layer on factors takes over from the stock one, has no use for, or is told of by
# `unsupported` itself; all else must be as a new layer has it.
_UNDERSTOOD = {"kernel", "bias", "use_bias", "in_features", "out_features", "kernel_init",
               "bias_init", "kernel_size", "kernel_shape", "strides", "padding", "dtype",
               "kernel_dilation", "input_dilation", "feature_group_count", "mask",
               "param_dtype"}  # fmt: skip


class LeftDense(UserWarning):
    """Some layers were not put on factors."""


def from_dense(
    model: nnx.Module,
    *,
    rank: float | None = None,
    ranks: Mapping[str, int] | None = None,
    energy: float | None = None,
) -> nnx.Module:
    """The model with `SVDDense` and `SVDConv` in place of its `nnx.Linear` and `nnx.Conv`.

    Each kernel is replaced by its best approximation of the chosen rank (Eckart & Young 1936),
    from an exact SVD in float64; biases stay. At full rank the outputs are those of the dense
    model up to rounding. Exactly one of the three says how ranks are chosen:

    Args:
      model: any NNX module that holds the layers; it is left as it is.
      rank: fraction of full rank, in (0, 1], for every layer that can be factorised.
      ranks: rank of each layer to factorise, by its path in the model, such as
        ``{"units/0/map": 8}``; the others stay dense.
      energy: share of Σ s² in (0, 1]: every layer that can be factorised gets the smallest
        rank that keeps it.

    Returns:
      a copy of the model. `rank` and `energy` leave dense, and name in a `LeftDense` warning,
      every other layer with a kernel, and what `unsupported` or several uses speak against: a
      convolution that is grouped, dilated, masked or not two-dimensional, or pads otherwise than
      by SAME, VALID or numbers; a layer that is not float32; a subclass; a stack of layers; an
      argument of its own, such as ``dot_general`` or ``precision``; a kernel or bias that layers
      share.

    Raises:
      ValueError: none or several of the three, a value out of range, or in `ranks` a path
        that is no such layer or one that cannot be factorised, with the reason.
    """
    if sum(x is not None for x in (rank, ranks, energy)) != 1:
        raise ValueError("give exactly one of rank, ranks and energy")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    layers = {
        _name(path): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(getattr(layer, "kernel", None), nnx.Variable)
        and not isinstance(layer, SVDDense | SVDConv)
    }
    uses = _uses(model)
    reasons = {path: _against(layer, uses) for path, layer in layers.items()}
    if ranks is not None:
        _check_named(ranks, layers, reasons)
    chosen = set(layers if ranks is None else ranks)
    dense = [f"{path} ({reasons[path]})" for path in layers if path in chosen and reasons[path]]
    if dense:
        warnings.warn(f"left dense: {'; '.join(dense)}", LeftDense, stacklevel=2)

    def rank_for(path: str, s: np.ndarray) -> int:
        if ranks is not None:
            return ranks[path]
        # The spectrum is as long as full rank.
        return rank_of(rank, s.size, s.size) if rank is not None else energy_rank(s, energy or 1.0)

    def convert(path: Any, node: Any) -> Any:
        name = _name(path)
        if not isinstance(node, nnx.Module) or name not in chosen or reasons[name]:
            return node
        u, s, vt = np.linalg.svd(np.asarray(_matrix(node), np.float64), full_matrices=False)
        r = rank_for(name, s)
        kernel = Factors(*(jnp.asarray(x, jnp.float32) for x in (u[:, :r], s[:r], vt[:r].T)))
        return _factorised(node, kernel)

    return nnx.recursive_map(convert, nnx.clone(model))


def energy_rank(s: np.ndarray, energy: float) -> int:
    """Smallest k >= 1 for which the first k of s (descending) hold `energy` of Σ s²."""
    # What is lost is summed from the small end, where no rounding of a large sum hides it.
    lost = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
    return max(1, int(np.argmax(lost <= (1 - energy) * lost[0])))


def unsupported(layer: Any) -> str | None:
    """Why a layer cannot be factorised, or None where it can."""
    if type(layer) not in (nnx.Linear, nnx.Conv):
        return f"{type(layer).__name__} is neither nnx.Linear nor nnx.Conv"
    if reason := _unlike_new(layer):
        return reason
    if layer.param_dtype != jnp.float32 or layer.dtype not in (None, jnp.float32):
        return "factors are float32, this layer is not"
    if type(layer) is nnx.Linear:
        return None
    if len(layer.kernel_size) != 2:
        return f"kernel_size={layer.kernel_size} is not two-dimensional"
    if layer.feature_group_count != 1:
        return f"feature_group_count={layer.feature_group_count}"
    for name in ("kernel_dilation", "input_dilation"):
        if np.any(np.asarray(getattr(layer, name) or 1) != 1):
            return f"{name}={getattr(layer, name)}"
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
    groups = {"feature_group_count": layer.feature_group_count} if len(sizes) > 2 else {}
    new = nnx.eval_shape(lambda: type(layer)(*sizes, **groups, rngs=nnx.Rngs(0)))
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


def _name(path: Any) -> str:
    return "/".join(map(str, path))


def _check_named(
    ranks: Mapping[str, int], layers: Mapping[str, Any], reasons: Mapping[str, str | None]
) -> None:
    for path, r in ranks.items():
        if path not in layers:
            raise ValueError(f"no nnx.Linear or nnx.Conv at {path!r}, there are {list(layers)}")
        if reasons[path]:
            raise ValueError(f"{path} cannot be factorised: {reasons[path]}")
        full = min(_matrix(layers[path]).shape)
        if not isinstance(r, int) or not 1 <= r <= full:
            raise ValueError(f"the rank of {path} must be a whole number in [1, {full}], got {r}")


def _matrix(layer: Any) -> Any:
    """The matrix (d_out, d_in) that is factorised."""
    kernel = layer.kernel.get_value()
    return kernel.T if isinstance(layer, nnx.Linear) else kernel_to_matrix(kernel)


def _factorised(layer: Any, kernel: Factors) -> nnx.Module:
    """The layer on given factors, with its own bias."""

    def make() -> Any:
        options: dict[str, Any] = {"use_bias": layer.bias is not None, "rngs": nnx.Rngs(0)}
        if isinstance(layer, nnx.Conv):
            options |= {"strides": layer.strides or 1, "padding": layer.padding}
            sizes = (layer.in_features, layer.out_features, layer.kernel_size)
            return SVDConv(*sizes, **options)
        return SVDDense(layer.in_features, layer.out_features, **options)

    # Made of shapes alone: an initialisation would take an SVD only to be replaced.
    new = nnx.eval_shape(make)
    new.kernel.set_value(kernel)
    if layer.bias is not None:
        new.bias.set_value(layer.bias.get_value())
    return new
