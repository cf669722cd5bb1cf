"""Backpropagation, as the chain of the units' own pullbacks."""

from collections.abc import Callable
from typing import Any

import jax

from ssa_jax import factors
from ssa_jax.methods.base import FeedbackOptions, Method, Network, all_down, walking
from ssa_jax.networks.forward import Pullback, Tape, Visited

Array = jax.Array
Tree = Any


def through(unit: Visited, signal: Array) -> Array:
    """δ_{i-1} = (∂h_i/∂x_i)ᵀ δ_i by the unit's own pullback."""
    return unit.pullback(signal)[1]


def chain(tape: Tape, error: Array) -> list[Array]:
    """The true ∂loss/∂h_i of every unit: δ_{i-1} = (∂h_i/∂x_i)ᵀ δ_i from δ_n = e."""

    def step(pullback: Pullback) -> Callable[[Array], Array]:
        return lambda signal: pullback(signal)[1]

    return all_down([step(pullback) for pullback in tape.pullbacks[1:]], error)


def bp(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i)ᵀ δ_i from δ_n = e: the exact gradient (Rumelhart et al. 1986)."""
    del network, options
    return walking(lambda key, params, mstate: (), lambda feedback, params: through)


def svd_bp(network: Network, options: FeedbackOptions) -> Method:
    """Backpropagation on factors: `bp` on a model whose layers hold U diag(s) Vᵀ.

    `init` raises ValueError for a model without factors, on which it would be `bp` by another
    name.
    """
    method = bp(network, options)

    def init(key: Array, params: Tree, mstate: Tree) -> Tree:
        if not factors.leaves(params):
            raise ValueError("svd_bp is backpropagation on factors, and this model has none")
        return method.init(key, params, mstate)

    return method._replace(init=init)
