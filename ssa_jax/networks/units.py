"""The one place that knows Flax's split and merge: an NNX model as units of pure functions."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


def group_units(
    units: Sequence[Unit], params: Tree, mstate: Tree, size: int
) -> tuple[tuple[Unit, ...], Tree, Tree]:
    """Joins `size` neighbours at a time into one unit; the last unit stays alone.

    Inside the joined unit the gradient is exact. Its parameters and its state are the tuples
    of its members'. Where the hidden units do not divide evenly, the first group is smaller.

    Raises:
      ValueError: size below one.
    """
    if size < 1:
        raise ValueError(f"unit_size must be at least 1, got {size}")
    hidden = len(units) - 1
    if size == 1 or not hidden:
        return tuple(units), params, mstate
    bounds = [0, *range(hidden % size or min(size, hidden), hidden + 1, size)]
    groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def join(tree: Tree) -> Tree:
        return (*(tuple(tree[g]) for g in groups), tree[-1])

    joined = tuple(_join(units[g]) for g in groups)
    return (*joined, units[-1]), join(params), join(mstate)


def ungroup_units(tree: Tree) -> Tree:
    """The parameters or the state of the single units from those of `group_units`."""
    return tuple(x for group in tree for x in (group if isinstance(group, tuple) else (group,)))


def _join(units: Sequence[Unit]) -> Unit:
    def apply(params: Tree, mstate: Tree, x: Array, *, train: bool) -> tuple[Array, Tree]:
        states = []
        for unit, p, m in zip(units, params, mstate, strict=True):
            x, m = unit.apply(p, m, x, train=train)
            states.append(m)
        return x, tuple(states)

    def linear(params: Tree, mstate: Tree, x: Array) -> Array:
        for unit, p, m in zip(units, params, mstate, strict=True):
            x = unit.linear(p, m, x)
        return x

    def walk(params: Tree, twins: Tree, mstate: Tree, x: Array) -> Array:
        for unit, p, t, m in zip(units, params, twins, mstate, strict=True):
            x = unit.walk(p, t, m, x)
        return x

    return Unit(apply, linear, walk)


def in_precision(units: Sequence[Unit], dtype: Any) -> tuple[Unit, ...]:
    """The units with `apply` and `walk` of the hidden ones computed in another precision.

    Parameters, twins and input are cast on entry, inside of what is differentiated, and the
    output is cast back: every array that leaves a unit stays float32, its gradients among them,
    and so do the model state, whose statistics `nnx.BatchNorm` takes in float32 whatever its
    input is, the signals and the losses. A cast up that meets a cast down costs nothing in a
    compiled program. The last unit, which makes the logits, and every `linear` path stay as
    they are.

    Args:
      units: the network, grouped as it is trained.
      dtype: such as `jnp.bfloat16`; `jnp.float32` changes nothing.
    """
    if dtype == jnp.float32:
        return tuple(units)
    return (*(_cast_unit(unit, dtype) for unit in units[:-1]), units[-1])


def _cast_unit(unit: Unit, dtype: Any) -> Unit:
    def cast(tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def apply(params: Tree, mstate: Tree, x: Array, *, train: bool) -> tuple[Array, Tree]:
        y, new = unit.apply(cast(params), mstate, cast(x), train=train)
        return y.astype(jnp.float32), new

    def walk(params: Tree, twins: Tree, mstate: Tree, x: Array) -> Array:
        return unit.walk(cast(params), cast(twins), mstate, cast(x)).astype(jnp.float32)

    return Unit(apply, unit.linear, walk)


def merge_units(model: Any, params: Tree, mstate: Tree) -> nnx.Module:
    """The model in evaluation mode with the given parameters and state, as an NNX module."""
    merged = nnx.clone(model)
    merged.units = nnx.List(
        nnx.merge(nnx.graphdef(m), p, s)
        for m, p, s in zip(model.units, params, mstate, strict=True)
    )
    merged.eval()
    return merged
