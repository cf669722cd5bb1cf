"""Ranks that fit a budget: how the size of a network depends on them, and what fits.

A size is a number of parameters, or of multiply-accumulates for one image, and affine in the rank
of every layer: fixed + Σ c_l r_l, c_l being the cost of one singular direction of layer l.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ssa_jax.factors import is_factors, named_leaves, path_name
from ssa_jax.training import ranks
from ssa_jax.training.optim import excluded

Tree = Any

KINDS = ("params", "macs")
# Bisections of a fraction; ranks are whole numbers far above a millionth of full rank.
HALVINGS = 20


class BudgetError(ValueError):
    """A budget that no rank of the network can meet."""


class Size(NamedTuple):
    """Size of a network by its ranks.

    Attributes:
      fixed: of all that does not depend on the ranks of the layers in `costs`.
      costs: of one singular direction, by the layer's path.
      ranks: initial ones, of the same layers.
    """

    fixed: float
    costs: dict[str, float]
    ranks: dict[str, int]

    def at(self, rank_of: Callable[[int], int]) -> float:
        """The size with rank_of(r₀) in place of every initial rank r₀."""
        return self.fixed + sum(c * rank_of(self.ranks[name]) for name, c in self.costs.items())


def size_by_rank(size: Callable[[Tree], int], params: Tree, exclude: tuple[str, ...] = ()) -> Size:
    """The size of a network as a function of the ranks of the layers that may change.

    Args:
      size: of a parameter tree, whose leaves may be shapes.
      params: at the initial ranks.
      exclude: patterns of the paths of layers that keep their rank.

    Raises:
      BudgetError: a pattern that fits no factorised layer.
    """
    layers = named_leaves(params)
    for pattern in exclude:
        if not any(excluded((pattern,), name) for name in layers):
            raise BudgetError(
                f"--rank_exclude: {pattern!r} fits no factorised layer; they are "
                + ", ".join(layers)
            )
    total = size(params)
    costs = {
        name: float(size(_widened(params, name)) - total)
        for name in layers
        if not excluded(exclude, name)
    }
    initial = {name: layers[name].rank for name in costs}
    return Size(total - sum(c * initial[name] for name, c in costs.items()), costs, initial)


def _widened(params: Tree, layer: str) -> Tree:
    """Shapes of a parameter tree with one direction more in one layer."""

    def widen(path: tuple[Any, ...], node: Any) -> Any:
        name = path_name(path)
        more = int(is_factors(node) and name == layer)
        return jax.tree.map(
            lambda x: (
                jax.ShapeDtypeStruct((*x.shape[:-1], x.shape[-1] + more), x.dtype)
                if more
                else jax.ShapeDtypeStruct(x.shape, x.dtype)
            ),
            node,
        )

    return jax.tree_util.tree_map_with_path(widen, params, is_leaf=is_factors)


def fitting_floor(size: Size, budget: float, dense: float) -> float:
    """The largest fraction φ of the initial ranks, `ranks.lowest` of which fits the budget.

    Args:
      size: of the network.
      budget: over the size of the dense network.
      dense: size of the dense network.

    Raises:
      BudgetError: not even the lowest ranks fit.
    """
    check_reachable(size, budget, dense)
    return _largest(lambda x: size.at(lambda r: ranks.lowest(x, r)) <= budget * dense)


def check_reachable(size: Size, budget: float, dense: float) -> None:
    """Raises BudgetError unless the lowest ranks that truncation leaves fit the budget."""
    least = size.at(lambda r: ranks.lowest(0.0, r)) / dense
    if budget < least:
        raise BudgetError(
            f"--rank_budget must be at least {least:.3f}, the size of this network at its lowest "
            f"ranks over the dense one's, got {budget}"
        )


def fitting_fraction(size_at: Callable[[float], float], budget: float, dense: float) -> float:
    """The largest fraction of full rank at which the network fits the budget.

    Args:
      size_at: size of the network that is built at a fraction.
      budget: over the size of the dense network.
      dense: size of the dense network.

    Raises:
      BudgetError: not even rank one fits.
    """
    least = size_at(2.0**-HALVINGS) / dense
    if budget < least:
        raise BudgetError(
            f"--rank_budget must be at least {least:.3f}, the size of this network at rank one "
            f"over the dense one's, got {budget}"
        )
    return max(_largest(lambda x: size_at(x) <= budget * dense), 2.0**-HALVINGS)


def _largest(fits: Callable[[float], bool]) -> float:
    """The largest fraction that fits, of a predicate that holds from 0 up to it."""
    low, high = 0.0, 1.0
    if fits(high):
        return high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
