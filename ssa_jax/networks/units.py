"""Units of locality as pure functions; neighbours joined, and units in another precision."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Tree = Any
Entries = dict[str, Any]


def _ignore(params: Tree, twins: Tree | None = None) -> None:
    del params, twins


@dataclasses.dataclass(frozen=True)
class Unit:
    """One unit of locality as pure functions of its parameters and its model state.

    Attributes:
      apply: (params, mstate, x, *, train) -> (y, mstate), the unit and its new statistics.
      walk: (params, twins, mstate, x) -> y, equal to `apply` in training mode, but its derivative
        with respect to x passes through the twins' maps instead of those of the parameters. The
        twin of `Factors` may be what passes it, see `factors.WithFeedback`.
      expect: (params, twins=None) -> None, tells shapes that are about to come. Units of one
        network that know them all before the first `apply`, or `walk`, are traced together, and
        not one by one.
      shared: paths of parameters of which other units have copies.
    """

    apply: Callable[..., tuple[Array, Tree]]
    walk: Callable[[Tree, Tree, Tree, Array], Array]
    expect: Callable[..., None] = _ignore
    shared: frozenset[str] = frozenset()


def expect(units: Sequence[Unit], params: Tree, twins: Tree | None = None) -> None:
    """Tells each unit the shapes of its parameters, and twins, so that all are traced together."""
    for unit, p, t in zip(units, params, twins or params, strict=True):
        unit.expect(p, t)


def group_units(
    units: Sequence[Unit], params: Tree, mstate: Tree, size: int
) -> tuple[tuple[Unit, ...], Tree, Tree]:
    """Joins `size` neighbours at a time into one unit; the last unit stays alone.

    Inside the joined unit the gradient is exact. Its parameters and its state are those of its
    members in one dict. Where the hidden units do not divide evenly, the last group of them is
    smaller: as a rule, the nearer to the output one ends the better is its direct signal.

    Raises:
      ValueError: size below one.
    """
    if size < 1:
        raise ValueError(f"unit_size must be at least 1, got {size}")
    hidden = len(units) - 1
    if size == 1 or not hidden:
        return tuple(units), params, mstate
    bounds = [*range(0, hidden, size), hidden, hidden + 1]
    groups = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    return (
        tuple(_join(units[g], params[g], mstate[g]) for g in groups),
        tuple(_united(params[g]) for g in groups),
        tuple(_united(mstate[g]) for g in groups),
    )


def _united(dicts: Sequence[Entries]) -> Entries:
    return {name: value for entries in dicts for name, value in entries.items()}


def _join(units: Sequence[Unit], params: Sequence[Entries], mstate: Sequence[Entries]) -> Unit:
    names = [(tuple(p), tuple(m)) for p, m in zip(params, mstate, strict=True)]

    def members(params: Entries, mstate: Entries) -> list[tuple[Unit, Entries, Entries]]:
        return [
            (unit, {n: params[n] for n in p}, {n: mstate[n] for n in m})
            for unit, (p, m) in zip(units, names, strict=True)
        ]

    def apply(params: Entries, mstate: Entries, x: Array, *, train: bool) -> tuple[Array, Entries]:
        states = []
        for unit, p, m in members(params, mstate):
            x, m = unit.apply(p, m, x, train=train)
            states.append(m)
        return x, _united(states)

    def walk(params: Entries, twins: Entries, mstate: Entries, x: Array) -> Array:
        for unit, p, m in members(params, mstate):
            x = unit.walk(p, {n: twins[n] for n in p}, m, x)
        return x

    def expect_all(params: Entries, twins: Entries | None = None) -> None:
        twins = twins or params
        for unit, (p, _) in zip(units, names, strict=True):
            unit.expect({n: params[n] for n in p}, {n: twins[n] for n in p})

    return Unit(apply, walk, expect_all, frozenset().union(*(u.shared for u in units)))


def sum_shared(units: Sequence[Unit], gradients: Sequence[Entries]) -> Sequence[Entries]:
    """The gradients, those of parameters that units share summed over their copies."""
    add = functools.partial(jax.tree.map, jnp.add)
    return _of_copies(units, gradients, lambda copies: functools.reduce(add, copies))


def first_copies(units: Sequence[Unit], params: Sequence[Entries]) -> Sequence[Entries]:
    """The parameters, of those that units share everywhere the copy of the first.

    Copies get one gradient, but a rate that differs by unit, or rounding, would take them apart.
    """
    return _of_copies(units, params, lambda copies: copies[0])


def _of_copies(
    units: Sequence[Unit], trees: Sequence[Entries], one_of: Callable[[Sequence[Any]], Any]
) -> Sequence[Entries]:
    shared = sorted(frozenset().union(*(unit.shared for unit in units)))
    ones = {name: one_of([tree[name] for tree in trees if name in tree]) for name in shared}
    if not ones:
        return trees
    return tuple({name: ones.get(name, x) for name, x in tree.items()} for tree in trees)


def in_precision(units: Sequence[Unit], dtype: Any) -> tuple[Unit, ...]:
    """The units with `apply` and `walk` of the hidden ones computed in another precision.

    Parameters, twins and input are cast on entry, inside of what is differentiated, and the
    output is cast back: every array that leaves a unit stays float32, its gradients among them,
    and so do the model state, whose statistics `nnx.BatchNorm` takes in float32 whatever its
    input is, the signals and the losses. A cast up that meets a cast down costs nothing in a
    compiled program. The last unit, which makes the logits, stays as it is.

    Args:
      units: the network, grouped as it is trained.
      dtype: such as `jnp.bfloat16`; `jnp.float32` changes nothing.
    """
    if dtype == jnp.float32:
        return tuple(units)
    return (*(_cast_unit(unit, dtype) for unit in units[:-1]), units[-1])


def _cast_unit(unit: Unit, dtype: Any) -> Unit:
    def cast(tree: Tree) -> Tree:
        def one(x: Array) -> Array:
            return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return jax.tree.map(one, tree)

    def apply(params: Tree, mstate: Tree, x: Array, *, train: bool) -> tuple[Array, Tree]:
        y, new = unit.apply(cast(params), mstate, cast(x), train=train)
        return y.astype(jnp.float32), new

    def walk(params: Tree, twins: Tree, mstate: Tree, x: Array) -> Array:
        return unit.walk(cast(params), cast(twins), mstate, cast(x)).astype(jnp.float32)

    return Unit(apply, walk, lambda *trees: unit.expect(*map(cast, trees)), unit.shared)
