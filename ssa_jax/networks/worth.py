"""Layers that factors make dearer: they stay dense, and it is told."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from ssa_jax import factors
from ssa_jax.layers import SVDConv, SVDDense, SVDLinearGeneral
from ssa_jax.networks.nnx_factors import name_of


def dearer(layer: Any, shape: Sequence[int], rank: int) -> str | None:
    """Why a layer is cheaper dense than as the pair of a rank, or None where it is not.

    The pair holds r (d_out + d_in) parameters, s aside, which goes into one of both for inference,
    and the layer d_out d_in. At an output position these are their multiply-accumulates too, but of
    a convolution of g groups and stride s in width, whose V is run for every group and at the
    width of the input: r (d_out + s g d_in). A tie is not dearer, so up to half of full rank
    no layer is but for its groups and strides, and at full rank every one is.

    Args:
      layer: of Flax or on factors; of a convolution its groups and strides matter.
      shape: (d_out, d_in) of the matrix of its kernel.
      rank: of the pair.
    """
    d_out, d_in = shape
    strides = getattr(layer, "strides", None) or 1
    runs = strides if isinstance(strides, int) else strides[-1]
    runs *= getattr(layer, "feature_group_count", 1)
    if rank * (d_out + runs * d_in) <= d_out * d_in:
        return None
    return f"dearer on factors at rank {rank} of {factors.full_rank(d_out, d_in)}"


def dense_where_dearer(
    model: nnx.Module, dense: Callable[[], nnx.Module], share: float
) -> tuple[nnx.Module, dict[str, str]]:
    """The model with dense layers in place of those that factors make dearer, and the reasons.

    Args:
      model: with layers on factors. Those of full rank stay: they are exact, and were asked for.
      dense: makes the same model without factors, where one is needed.
      share: of its rank, to which each layer may fall in training.
    """
    reasons = {}
    for path, layer in nnx.iter_modules(model):
        if isinstance(layer, SVDDense | SVDConv | SVDLinearGeneral):
            f = layer.kernel.get_value()
            sizes = f.u.shape[0], f.v.shape[0]
            why = dearer(layer, sizes, max(1, round(share * f.rank)))
            if why and f.rank < factors.full_rank(*sizes):
                reasons[name_of(path)] = why
    if not reasons:
        return model, {}
    layers = {name_of(path): layer for path, layer in nnx.iter_modules(dense())}

    def replace(path: Any, node: Any) -> Any:
        name = name_of(path)
        return layers[name] if name in reasons else node

    return nnx.recursive_map(replace, model), reasons
