"""Dense models on factors: linear layers, convolutions, attention's projections by their SVD."""

import dataclasses
import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from ssa_jax import factors
from ssa_jax.factors import Factors, rank_of
from ssa_jax.networks import linen_factors, nnx_factors, worth
from ssa_jax.networks.models import LinenModel

# Layers of a lower full rank stay dense: they have few directions to lose, and few parameters.
LEAST_FULL_RANK = 16
_TOO_FEW = f"a full rank of at least {LEAST_FULL_RANK} is needed; factorize='off' trains them dense"


class LeftDense(UserWarning):
    """Some layers were not put on factors."""


def factorize(
    model: Any,
    *,
    rank: float = 0.5,
    lowest: float | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] | Mapping[str, str] = (),
) -> Any:
    """The model with its linear layers, convolutions and attention projections on factors.

    Each kernel is replaced by its best approximation of the rank (Eckart & Young 1936). Layers of
    full rank below 16, such as a classifier of ten classes or a convolution on colours, stay
    dense, and so do depthwise convolutions, where factors would save nothing, and those that the
    pair of factors would make dearer, in parameters or multiply-accumulates (`worth.dearer`).

    Args:
      model: an NNX module with `nnx.Linear`, `nnx.Conv` and `nnx.LinearGeneral`, which attention
        is made of; or a `LinenModel` with Dense, Conv and DenseGeneral. It is left as it is.
      rank: fraction of full rank, in (0, 1].
      lowest: the fraction to which ranks may fall in training, in [0, rank], at which what is
        dearer is judged; 0 judges nothing. None is `rank`, and 0 at full rank, which is exact
        and which nobody asks for to save anything.
      include: patterns, as a shell matches file names, of the paths of layers to put on factors.
      exclude: of layers to leave dense. A mapping from such patterns to reasons has these told.

    Returns:
      a copy of the model. A `LeftDense` warning names the layers that cannot be on factors, and
      those that are excluded for a reason, with their reasons.

    Raises:
      ValueError: a fraction out of range, a pattern that fits no layer, or no layer is left.
    """
    if not 0 < rank <= 1:
        raise ValueError(f"rank must lie in (0, 1], got {rank}")
    lowest = (rank if rank < 1 else 0.0) if lowest is None else lowest
    if not 0 <= lowest <= rank:
        raise ValueError(f"lowest must lie in [0, rank], got {lowest} at rank {rank}")
    if isinstance(model, LinenModel):
        return _factorize_linen(model, rank, lowest, include, exclude)
    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"factorize takes an nnx.Module or a LinenModel, got {type(model).__name__}; a plain "
            "function gets `Factors` by factors.from_dense"
        )
    layers, reasons = nnx_factors.examined(model)
    shapes = {p: nnx_factors.matrix(x).shape for p, x in layers.items() if not reasons[p]}
    chosen = _chosen(layers, reasons, shapes, (rank, lowest), include, exclude)
    return from_dense(model, ranks=chosen)


def has_factors(model: Any) -> bool:
    """Whether a model has a layer on factors."""
    if isinstance(model, nnx.Module):
        return bool(factors.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    params = model.variables if isinstance(model, LinenModel) else model.params
    return bool(factors.leaves(params))


def _chosen(
    layers: Mapping[str, Any], reasons: Mapping[str, str | None],
    shapes: Mapping[str, Sequence[int]], fractions: tuple[float, float], include: Iterable[str],
    exclude: Iterable[str],
) -> dict[str, int]:  # fmt: skip
    """Ranks of the layers that fit the patterns and are worth it; tells why others are not."""
    for pattern in (*include, *exclude):
        if not fnmatch.filter(layers, pattern):
            raise ValueError(f"no layer fits {pattern!r}, there are {', '.join(layers)}")

    rank, lowest = fractions
    ranks, left = {}, dict(reasons)
    for path, shape in shapes.items():
        full = min(shape)
        if full < LEAST_FULL_RANK or not _fits(path, include) or _fits(path, exclude):
            continue
        if lowest and (why := worth.dearer(layers[path], shape, rank_of(lowest, full, full))):
            left[path] = why
        else:
            ranks[path] = rank_of(rank, full, full)
    if not ranks:
        dearer = f"at {lowest:g} of full rank they would be dearer; lowest=0 (in a run "
        why = dearer + "factorize='all') puts them there" if left != reasons else _TOO_FEW
        raise ValueError(f"no layer is left to put on factors of {', '.join(layers)}: {why}")
    tell_left(left, exclude)
    return ranks


def _fits(path: str, patterns: Iterable[str]) -> str | None:
    """The first of the patterns that a path fits."""
    return next((p for p in patterns if fnmatch.fnmatchcase(path, p)), None)


def tell_left(reasons: Mapping[str, str | None], exclude: Iterable[str] = ()) -> None:
    """Warns of the layers that stay dense for a reason, those of `exclude` among them."""
    told = exclude if isinstance(exclude, Mapping) else {}
    left = {path: reason or told.get(_fits(path, told) or "") for path, reason in reasons.items()}
    if text := _by_reason(left):
        warnings.warn(text, LeftDense, stacklevel=5)


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
    lowest: float,
    include: Iterable[str],
    exclude: Iterable[str],
) -> LinenModel:
    layers = model.layers()
    reasons = {path: linen_factors.against(layer) for path, layer in layers.items()}
    params = traverse_util.flatten_dict(model.variables["params"], sep="/", keep_empty_nodes=True)
    kernels = {path: f"{path}/kernel".lstrip("/") for path in layers}
    matrices = {
        path: linen_factors.matrix(layer, params[kernels[path]])
        for path, layer in layers.items()
        if not reasons[path]
    }
    shapes = {path: m.shape for path, m in matrices.items()}
    chosen = _chosen(layers, reasons, shapes, (rank, lowest), include, exclude)
    for path, r in chosen.items():
        params[kernels[path]] = _best(matrices[path], r)
    nested = traverse_util.unflatten_dict(params, sep="/")
    return dataclasses.replace(model, variables={**model.variables, "params": nested})


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
      every other layer with a kernel, and what `nnx_factors` finds against: a convolution that is
      depthwise, masked, not two-dimensional, dilated at its input, or pads otherwise than by SAME,
      VALID or numbers; a layer that is not float32; a subclass; a stack of layers; an argument of
      its own, such as ``dot_general`` or ``precision``; a kernel or bias that layers share.

    Raises:
      ValueError: none or several of the three, a value out of range, or in `ranks` a path
        that is no such layer or one that cannot be factorised, with the reason.
    """
    if sum(x is not None for x in (rank, ranks, energy)) != 1:
        raise ValueError("give exactly one of rank, ranks and energy")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy must lie in (0, 1], got {energy}")
    layers, reasons = nnx_factors.examined(model)
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
        name = nnx_factors.name_of(path)
        if not isinstance(node, nnx.Module) or name not in chosen or reasons[name]:
            return node
        return nnx_factors.on_factors(
            node, _best(nnx_factors.matrix(node), lambda s: rank_for(name, s))
        )

    return nnx.recursive_map(convert, nnx.clone(model))


def energy_rank(s: np.ndarray, energy: float) -> int:
    """Smallest k >= 1 for which the first k of s (descending) hold `energy` of Σ s²."""
    # What is lost is summed from the small end, where no rounding of a large sum hides it.
    lost = np.append(np.cumsum(s[::-1] ** 2)[::-1], 0.0)
    return max(1, int(np.argmax(lost <= (1 - energy) * lost[0])))


def _check_named(
    ranks: Mapping[str, int], layers: Mapping[str, Any], reasons: Mapping[str, str | None]
) -> None:
    for path, r in ranks.items():
        if path not in layers:
            raise ValueError(f"no layer with a kernel at {path!r}, there are {list(layers)}")
        if reasons[path]:
            raise ValueError(f"{path} cannot be factorised: {reasons[path]}")
        full = min(nnx_factors.matrix(layers[path]).shape)
        if not isinstance(r, int) or not 1 <= r <= full:
            raise ValueError(f"the rank of {path} must be a whole number in [1, {full}], got {r}")
