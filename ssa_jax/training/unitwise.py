"""An optax chain taken a unit at a time, where it treats every unit by itself."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from ssa_jax.networks.forward import after
from ssa_jax.transforms import NothingToActOn

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
        leaves = by_path(opt_state)
        paths = by_path(self.states[i])
        state = jax.tree.unflatten(
            jax.tree.structure(self.states[i]), [leaves[path] for path in paths]
        )
        none = ((),) * len(self.states)
        gradients, alone = ((*none[:i], x, *none[i + 1 :]) for x in (gradient, params))
        updates, state = self.optimizer.update(gradients, state, alone)
        update, state = after((updates[i], state), updates[i])
        params = optax.apply_updates(params, update)
        return Moved(params, by_path(state)), params

    def join(self, moved: Sequence[Moved], opt_state: optax.OptState) -> tuple[Tree, Any]:
        """Parameters and state of all units; `opt_state` is the one before, for its structure."""
        # What units share, such as counts, each of them has advanced alike.
        new = {path: leaf for unit in moved for path, leaf in unit.state.items()}
        leaves = [new[path] for path in by_path(opt_state)]
        state = jax.tree.unflatten(jax.tree.structure(opt_state), leaves)
        return tuple(unit.params for unit in moved), state


class Alone(optax.GradientTransformationExtraArgs):
    """A chain that says of itself that it treats units alone, whatever the parameters.

    In its update of all units nothing that it makes for a unit may depend on another unit, and what
    units share must be numbers, such as counts, that go the same way whatever the units are.
    """


def split(optimizer: optax.GradientTransformation, params: Tree) -> Unitwise | None:
    """The chain a unit at a time; None where it does not say that it treats units `Alone`.

    Args:
      optimizer: the chain.
      params: one parameter tree a unit, or its shapes.
    """
    if not isinstance(optimizer, Alone):
        return None
    return Unitwise(optimizer, states(optimizer, params, [[i] for i in range(len(params))]))


def states(
    optimizer: optax.GradientTransformation, params: Tree, groups: Sequence[Sequence[int]]
) -> list[Tree]:
    """The shapes of the state that a chain has for each group of units alone.

    Args:
      optimizer: one that treats units `Alone`.
      params: one parameter tree a unit, or its shapes.
      groups: numbers of units.
    """
    shapes = jax.eval_shape(lambda p: p, params)
    with warnings.catch_warnings():
        # Of a few units alone, a transformation may find nothing to act on.
        warnings.simplefilter("ignore", NothingToActOn)
        return [jax.eval_shape(optimizer.init, only(shapes, group)) for group in groups]


def only(trees: Sequence[Tree], group: Sequence[int]) -> Tree:
    """The trees of a group of units in their places, and no others."""
    return tuple(tree if i in group else () for i, tree in enumerate(trees))


def by_path(tree: Tree) -> Leaves:
    """The leaves of a tree by their path."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in named}
