"""The one place that knows Flax's split and merge: an NNX model as units of pure functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Array = jax.Array
Tree = Any


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of locality as pure functions of its parameters and its model state.

    Attributes:
      apply: (params, mstate, x, *, train) -> (y, mstate), the unit and its new statistics.
      linear: (params, mstate, x) -> y, its linear path (see `models.blocks`).
      walk: (params, twins, mstate, x) -> y, equal to `apply` in training mode, but its
        derivative with respect to x passes through the twins instead of the parameters.
    """

    apply: Callable[..., tuple[Array, Tree]]
    linear: Callable[[Tree, Tree, Array], Array]
    walk: Callable[[Tree, Tree, Tree, Array], Array]


def _split(module: nnx.Module) -> tuple[Any, Tree, Tree]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _make_unit(module: nnx.Module) -> tuple[Unit, Tree, Tree]:
    module.train()
    train_graph, params, mstate = _split(module)
    module.eval()
    eval_graph, _, _ = _split(module)

    def merge(graph: Any, params: Tree, mstate: Tree) -> Any:
        # Without the copy, statistics would be written to variables of an outer trace.
        return nnx.merge(graph, params, mstate, copy=True)

    def apply(params: Tree, mstate: Tree, x: Array, *, train: bool) -> tuple[Array, Tree]:
        unit = merge(train_graph if train else eval_graph, params, mstate)
        y = unit(x)
        return y, _split(unit)[2]

    def linear(params: Tree, mstate: Tree, x: Array) -> Array:
        return merge(eval_graph, params, mstate).linear(x)

    def walk(params: Tree, twins: Tree, mstate: Tree, x: Array) -> Array:
        unit, twin = (merge(train_graph, p, mstate) for p in (params, twins))
        return unit(x, twin)

    return Unit(apply, linear, walk), params, mstate


def split_units(model: nnx.Module) -> tuple[tuple[Unit, ...], Tree, Tree]:
    """Splits a model into units, their parameters and their state.

    Args:
      model: an NNX module with an attribute `units`, a list of unit modules.

    Returns:
      units, and two tuples of one nested dict a unit: parameters (with `Factors` nodes) and
      the rest of the state (batch statistics, counters, keys).

    Raises:
      ValueError: the model lists no units.
    """
    modules = list(getattr(model, "units", ()))
    if not modules:
        raise ValueError(f"{type(model).__name__} lists no units; give it a non-empty `units`")
    split = [_make_unit(m) for m in modules]
    return (
        tuple(u for u, _, _ in split),
        tuple(p for _, p, _ in split),
        tuple(s for _, _, s in split),
    )


def merge_units(model: Any, params: Tree, mstate: Tree) -> nnx.Module:
    """The model in evaluation mode with the given parameters and state, as an NNX module."""
    merged = nnx.clone(model)
    merged.units = nnx.List(
        nnx.merge(nnx.graphdef(m), p, s)
        for m, p, s in zip(model.units, params, mstate, strict=True)
    )
    merged.eval()
    return merged
