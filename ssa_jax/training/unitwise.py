"""An optax chain taken a unit at a time, where it treats every unit by itself."""

import functools
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend import core

from ssa_jax.networks.cut import CALLS
from ssa_jax.networks.forward import after
from ssa_jax.transforms import NothingToActOn
from ssa_jax.transforms.selection import STACKED

Array = jax.Array
Tree = Any
Leaves = dict[str, Any]


class Moved(NamedTuple):
    """One unit after its update: its parameters, and by path the optimiser's state of it."""

    params: Tree
    state: Leaves


class Unitwise(NamedTuple):
    """A chain whose update of a unit needs that unit's gradient, parameters and state alone.

    Its `update` of all units and `join` are the chain's update of the whole tree.

    Attributes:
      optimizer: the chain.
      states: of each unit, the shapes of the state that the chain has for it alone.
    """

    optimizer: optax.GradientTransformation
    states: Sequence[Tree]

    def update(
        self, i: int, params: Tree, gradient: Tree, opt_state: optax.OptState
    ) -> tuple[Moved, Tree]:
        """Unit i, of these parameters, after a step from the state of all; and what ends that step.

        New values wait for the whole update of the unit: only then has everything else that reads
        the old ones come first, and the compiler can put the new into their place.
        """
        leaves = _by_path(opt_state)
        paths = _by_path(self.states[i])
        state = jax.tree.unflatten(
            jax.tree.structure(self.states[i]), [leaves[path] for path in paths]
        )
        none = ((),) * len(self.states)
        gradients, alone = ((*none[:i], x, *none[i + 1 :]) for x in (gradient, params))
        updates, state = self.optimizer.update(gradients, state, alone)
        update, state = after((updates[i], state), updates[i])
        params = optax.apply_updates(params, update)
        return Moved(params, _by_path(state)), params

    def join(self, moved: Sequence[Moved], opt_state: optax.OptState) -> tuple[Tree, Any]:
        """Parameters and state of all units; `opt_state` is the one before, for its structure."""
        # What units share, such as counts, each of them has advanced alike.
        new = {path: leaf for unit in moved for path, leaf in unit.state.items()}
        leaves = [new[path] for path in _by_path(opt_state)]
        state = jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
        return tuple(unit.params for unit in moved), state


def split(optimizer: optax.GradientTransformation, params: Tree) -> Unitwise | None:
    """The chain a unit at a time; None where it looks at several units together.

    Read off the chain's own program: in its update of all units nothing that it makes for a unit,
    and nothing that units share, may depend on another unit. So a clip by the global norm, a
    budget of rank for the network and a step that is skipped as a whole are told from links that
    treat every array, or every unit, alone. What units share must be plain numbers, since a random
    key would be split anew for each. Only traces, and costs nothing in a compiled step.

    Args:
      optimizer: the chain.
      params: one parameter tree a unit, or its shapes.
    """
    shapes = jax.eval_shape(lambda p: p, params)
    units = range(len(shapes))
    try:
        with warnings.catch_warnings():
            # Of a unit alone, a transformation may find nothing to act on.
            warnings.simplefilter("ignore", NothingToActOn)
            whole = jax.eval_shape(optimizer.init, shapes)
            states = [jax.eval_shape(optimizer.init, _only(shapes, i)) for i in units]
            shared = jax.eval_shape(optimizer.init, tuple(() for _ in units))
    except ValueError:
        # A mask that labels leaves of several units fits none alone.
        return None
    if any(x.shape or not jnp.issubdtype(x.dtype, jnp.number) for x in jax.tree.leaves(shared)):
        return None
    common = _by_path(shared).keys()
    owner = {p: i for i in units for p in _by_path(states[i]) if p not in common}
    pieces = {p: x for state in (shared, *states) for p, x in _by_path(state).items()}
    if pieces != _by_path(whole):
        return None
    return Unitwise(optimizer, states) if _separate(optimizer, shapes, whole, owner) else None


def _only(params: Tree, i: int) -> Tree:
    """The parameters of unit i in its place, and no others."""
    return tuple(p if j == i else () for j, p in enumerate(params))


def _by_path(tree: Tree) -> Leaves:
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in named}


def _separate(
    optimizer: optax.GradientTransformation, params: Tree, state: Tree, owner: dict[str, int]
) -> bool:
    """Whether no unit, and nothing shared, depends on another unit in the chain's update."""

    def of_params() -> list[int]:
        return [1 << i for i, unit in enumerate(params) for _ in jax.tree.leaves(unit)]

    # A set of units is a number with their bits; what units share belongs to none.
    of_state = [1 << owner[p] if p in owner else 0 for p in _by_path(state)]
    closed = jax.make_jaxpr(optimizer.update)(params, state, params)
    found = _reach(closed.jaxpr, [*of_params(), *of_state, *of_params()])
    allowed = [*of_params(), *of_state]
    return len(found) == len(allowed) and all(
        a & ~b == 0 for a, b in zip(found, allowed, strict=True)
    )


def _reach(jaxpr: Any, inputs: Sequence[int]) -> list[int]:
    """Which units each result of a program depends on, at most; `inputs` of its arguments."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def units_of(atom: Any) -> int:
        return 0 if isinstance(atom, core.Literal) else known.get(atom, 0)

    for eqn in jaxpr.eqns:
        reached = _reach_through(eqn, [units_of(atom) for atom in eqn.invars])
        known |= zip(eqn.outvars, reached, strict=True)
    return [units_of(atom) for atom in jaxpr.outvars]


def _reach_through(eqn: Any, inputs: Sequence[int]) -> list[int]:
    """The same of one equation: of a choice branch by branch, of arrays that are stacked for one
    operation by place, of a call by its body, of all others in one.
    """
    if eqn.primitive.name == "cond":
        index, *operands = inputs
        branches = [_reach(branch.jaxpr, operands) for branch in eqn.params["branches"]]
        return [_union([index, *of_branches]) for of_branches in zip(*branches, strict=True)]
    name = str(eqn.params.get("name", ""))
    if name.startswith(STACKED):
        places = int(name.removeprefix(STACKED))
        # Before the arrays stands what all of them share, such as a rate.
        common = len(inputs) % places
        shared, own = inputs[:common], inputs[common:]
        return [_union([*shared, *own[i % places :: places]]) for i in range(len(eqn.outvars))]
    if eqn.primitive.name in CALLS:
        return _reach(eqn.params["jaxpr"].jaxpr, inputs)
    return [_union(inputs)] * len(eqn.outvars)


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)
