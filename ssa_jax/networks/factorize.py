"""Dense models on factors: linear layers, convolutions, attention's projections by their SVD."""

import collections
import dataclasses
import fnmatch
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ssa_jax import factors
from ssa_jax.factors import Factors, rank_of
from ssa_jax.layers import SVDConv, SVDDense, SVDLinearGeneral, kernel_to_matrix
from ssa_jax.layers.lowering import conv_general_dilated
from ssa_jax.networks import linen_factors
from ssa_jax.networks.models import LinenModel

# What a layer on factors takes over from the stock one, has no use for, or is told of by
# `unsupported` itself; all else must be as a new layer has it.
_UNDERSTOOD = {"kernel", "bias", "use_bias", "in_features", "out_features", "kernel_init",
               "bias_init", "kernel_size", "kernel_shape", "strides", "padding", "dtype",
               "kernel_dilation", "input_dilation", "feature_group_count", "mask",
               "param_dtype", "axis"}  # fmt: skip
# Layers of a lower full rank stay dense: they have few directions to lose, and few parameters.
LEAST_FULL_RANK = 16
_ON_FACTORS = SVDDense | SVDConv | SVDLinearGeneral


class LeftDense(UserWarning):
    """Some layers were not put on factors."""


def factorize(
    model: Any,
    *,
    rank: float = 0.5,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | Mapping[str, str] = (),
) -> Any:
    """The model with its linear layers, convolutions and attention projections on factors.

    Each kernel is replaced by its best approximation of the rank (Eckart & Young 1936). Layers of
    full rank below 16, such as a classifier of ten classes or a convolution on colours, stay
    dense, and so do depthwise convolutions, where factors would save nothing.

    Args:
      model: an NNX module with `nnx.Linear`, `nnx.Conv` and `nnx.LinearGeneral`, which attention
        is made of; or a `LinenModel` with Dense, Conv and DenseGeneral. It is left as it is.
      rank: fraction of full rank, in (0, 1].
      include: patterns, as a shell matches file names, of the paths of layers to put on factors.
      exclude: of layers to leave dense. A mapping from such patterns to reasons has these told.

    Returns:
      a copy of the model. A `LeftDense` warning names the layers that cannot be on factors, and
      those that are excluded for a reason, with their reasons.

    Raises:
      ValueError: a rank out of range, a pattern that fits no layer, or no layer is left.
    """
    if not 0 < rank <= 1:
        raise ValueError(f"rank must lie in (0, 1], got {rank}")
    if isinstance(model, LinenModel):
        return _factorize_linen(model, rank, include, exclude)
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"factorize takes an nnx.Module or a LinenModel, got {type(model).__name__}; a plain "
            "function gets `Factors` by factors.from_dense"
        )
    layers = _dense_layers(model)
    uses = _uses(model)
    reasons = {path: _against(layer, uses) for path, layer in layers.items()}
    ranks = {path: min(_matrix(x).shape) for path, x in layers.items() if not reasons[path]}
    chosen = _chosen(list(layers), ranks, rank, include, exclude)
    _tell_left(reasons, exclude)
    return from_dense(model, ranks=chosen)


def has_factors(model: Any) -> bool:
    """Whether a model has a layer on factors."""
    if isinstance(model, nnx.Module):
        return bool(factors.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    params = model.variables if isinstance(model, LinenModel) else model.params
    return bool(factors.leaves(params))


def _chosen(
    layers: Sequence[str], full: Mapping[str, int], rank: float, include: Iterable[str],
    exclude: Iterable[str],
) -> dict[str, int]:  # fmt: skip
    """Ranks of the layers that fit the patterns and are worth it."""
    for pattern in (*include, *exclude):
        if not fnmatch.filter(layers, pattern):
            raise ValueError(f"no layer fits {pattern!r}, there are {', '.join(layers)}")

    found = {
        path: rank_of(rank, n, n)
        for path, n in full.items()
        if n >= LEAST_FULL_RANK and _fits(path, include) and not _fits(path, exclude)
    }
    if not found:
        raise ValueError(f"no layer is left to put on factors of {', '.join(layers)}")
    return found


def _fits(path: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that a path fits."""
    return next((p for p in patterns if fnmatch.fnmatchcase(path, p)), None)


def _tell_left(
    reasons: Mapping[str, str | None], exclude: Sequence[str] | Mapping[str, str]
) -> None:
    told = exclude if isinstance(exclude, Mapping) else {}
    left = {path: reason or told.get(_fits(path, told) or "") for path, reason in reasons.items()}
    if text := _by_reason(left):
        warnings.warn(text, LeftDense, stacklevel=4)


def _by_reason(reasons: Mapping[str, str | None]) -> str:
    """Which layers stay dense for which reason, those that differ by numbers as one; or nothing."""
    alike: dict[tuple[str, str], list[str]] = {}
    for path, reason in reasons.items():
        if reason:
            alike.setdefault((re.sub(r"\d+", "*", path), reason), []).append(path)
    found = [
        f"{paths[0] if len(paths) == 1 else f'{len(paths)} of {name}'} ({reason})"
        for (name, reason), paths in alike.items()
    ]
    return f"left dense: {'; '.join(found)}" if found else ""


def _factorize_linen(
    model: LinenModel,
    rank: float,
    include: Sequence[str],
    exclude: Sequence[str] | Mapping[str, str],
) -> LinenModel:
    layers = model.layers()
    reasons = {path: linen_factors.against(layer) for path, layer in layers.items()}
    params = model.variables["params"]
    matrices = {
        path: linen_factors.matrix(layer, _at(params, path)["kernel"])
        for path, layer in layers.items()
        if not reasons[path]
    }
    full = {path: min(m.shape) for path, m in matrices.items()}
    chosen = _chosen(list(layers), full, rank, include, exclude)
    _tell_left(reasons, exclude)
    for path, r in chosen.items():
        kernel = _best(matrices[path], r)
        params = _replaced(params, f"{path}/kernel".split("/"), kernel)
    return dataclasses.replace(model, variables={**model.variables, "params": params})


def _at(tree: Any, path: str) -> Any:
    for name in path.split("/") if path else ():
        tree = tree[name]
    return tree


def _replaced(tree: Any, path: Sequence[str], value: Any) -> Any:
    if not path:
        return value
    name, *rest = [p for p in path if p]
    return {**tree, name: _replaced(tree[name], rest, value)}


def _best(matrix: Any, rank_for: int | Callable[[np.ndarray], int]) -> Factors:
    """The best approximation of a matrix, from an exact SVD in float64.

    Of a traced matrix, which only the shapes are wanted of (`jax.eval_shape`), in its own type.
    """
    if isinstance(matrix, jax.core.Tracer):
        svd: Any = jnp.linalg.svd
    else:
        svd, matrix = np.linalg.svd, np.asarray(matrix, np.float64)
    u, s, vt = svd(matrix, full_matrices=False)
    r = rank_for if isinstance(rank_for, int) else rank_for(s)
    return Factors(*(jnp.asarray(x, jnp.float32) for x in (u[:, :r], s[:r], vt[:r].T)))


def from_dense(
    model: nnx.Module,
    *,
    rank: float | None = None,
    ranks: Mapping[str, int] | None = None,
    energy: float | None = None,
) -> nnx.Module:
    """The model with layers on factors in place of its linear layers and convolutions.

    Those are `SVDDense`, `SVDConv` and `SVDLinearGeneral` for `nnx.Linear`, `nnx.Conv` and
    `nnx.LinearGeneral`.

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
      convolution that is depthwise, masked, not two-dimensional, dilated at its input, or pads
      otherwise than by SAME, VALID or numbers; a layer that is not float32; a subclass; a stack
      of layers; an argument of its own, such as ``dot_general`` or ``precision``; a kernel or
      bias that layers share.

    Raises:
      ValueError: none or several of the three, a value out of range, or in `ranks` a path
        that is no such layer or one that cannot be factorised, with the reason.
    """
    if sum(x is not None for x in (rank, ranks, energy)) != 1:
        raise ValueError("give exactly one of rank, ranks and energy")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    layers = _dense_layers(model)
    uses = _uses(model)
    reasons = {path: _against(layer, uses) for path, layer in layers.items()}
    if ranks is not None:
        _check_named(ranks, layers, reasons)
    chosen = set(layers if ranks is None else ranks)
    if text := _by_reason({path: reasons[path] for path in layers if path in chosen}):
        warnings.warn(text, LeftDense, stacklevel=2)

    def rank_for(path: str, s: np.ndarray) -> int:
        if ranks is not None:
            return ranks[path]
        # The spectrum is as long as full rank.
        return rank_of(rank, s.size, s.size) if rank is not None else energy_rank(s, energy or 1.0)

    def convert(path: Any, node: Any) -> Any:
        name = _name(path)
        if not isinstance(node, nnx.Module) or name not in chosen or reasons[name]:
            return node
        return _factorised(node, _best(_matrix(node), lambda s: rank_for(name, s)))

    return nnx.recursive_map(convert, nnx.clone(model))


def _dense_layers(model: nnx.Module) -> dict[str, Any]:
    """Layers with a kernel that are not on factors, by path."""
    return {
        _name(path): layer
        for path, layer in nnx.iter_modules(model)
        if isinstance(getattr(layer, "kernel", None), nnx.Variable)
        and not isinstance(layer, _ON_FACTORS)
    }


def energy_rank(s: np.ndarray, energy: float) -> int:
    """Smallest k >= 1 for which the first k of s (descending) hold `energy` of Σ s²."""
    # What is lost is summed from the small end, where no rounding of a large sum hides it.
    lost = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
    return max(1, int(np.argmax(lost <= (1 - energy) * lost[0])))


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
    new = nnx.eval_shape(lambda: type(layer)(*sizes, **options, rngs=nnx.Rngs(0)))
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
            raise ValueError(f"no layer with a kernel at {path!r}, there are {list(layers)}")
        if reasons[path]:
            raise ValueError(f"{path} cannot be factorised: {reasons[path]}")
        full = min(_matrix(layers[path]).shape)
        if not isinstance(r, int) or not 1 <= r <= full:
            raise ValueError(f"the rank of {path} must be a whole number in [1, {full}], got {r}")


def _matrix(layer: Any) -> Any:
    """The matrix (d_out, d_in) that is factorised."""
    kernel = layer.kernel.get_value()
    if isinstance(layer, nnx.Conv):
        return kernel_to_matrix(kernel)
    inputs = math.prod(layer.in_features) if isinstance(layer, nnx.LinearGeneral) else len(kernel)
    return kernel.reshape(inputs, -1).T


def _factorised(layer: Any, kernel: Factors) -> nnx.Module:
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

    # Made of shapes alone: an initialisation would take an SVD only to be replaced.
    new = nnx.eval_shape(make)
    new.kernel.set_value(kernel)
    if layer.bias is not None:
        new.bias.set_value(layer.bias.get_value())
    return new
