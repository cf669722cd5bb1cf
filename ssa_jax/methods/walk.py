"""Sequential feedback of low rank: the error walks down through a few singular directions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import Factors, is_factors
from ssa_jax.methods import feedback as fb
from ssa_jax.methods.base import (
    FeedbackOptions,
    Method,
    Network,
    Through,
    newest,
    require_choice,
    walking,
)
from ssa_jax.networks.units import Unit, expect

Array = jax.Array
Tree = Any

BASES = ("spectrum", "error")
# Whose error is measured, at most.
_EXAMPLES = 16


class WalkFeedback(NamedTuple):
    """What a walk through few directions keeps.

    Attributes:
      places: of every unit, by layer, the triplets (q,) that the error walks through.
      examples: inputs and targets of the last batch on whose error they are chosen; else none.
    """

    places: Tree
    examples: Tree = ()


def directions(rank: int, share: float) -> int:
    """How many of a layer's singular directions a share of them is: rounded up, at least one."""
    return math.ceil(share * rank - 1e-9)


def low_rank_walk(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i with W_q for W)ᵀ δ_i, W_q some q singular triplets of W.

    W = U diag(s) Vᵀ passes to its input V_q diag(s_q) U_qᵀ δ. U_qᵀ δ is part of Uᵀ δ, which the
    gradient of V takes in any case, so what the signal costs is the product with V_q (d_in, q)
    alone. (A convolution that is run as one kernel has no Uᵀ δ, and takes both thin products.) q is
    `options.rank` of the layer's stored rank, rounded up. Which triplets, by `options.basis`, is
    chosen every `options.every` steps and after a compaction:

    ``spectrum``: those of largest |s|. W_qᵀ is then the best approximation of Wᵀ of that rank.
    ``error``: those through which most of the error passes, of largest Σ (s_k u_kᵀ δ)² in an exact
    backward pass of a few examples of the last batch (see `energies`). As V is orthonormal,
    V_q diag(s_q) U_qᵀ δ is then nearest to Wᵀ δ in the mean square, of all choices of q triplets.

    Their values are always those of the present weights. Everything else on the way, dense layers
    among it, passes the error exactly. All triplets are backpropagation.

    Raises:
      ValueError: an unknown basis, a share outside (0, 1], a choice by the error of a network
        without targets; at init, a model without factors.
    """
    share, by_error = options.rank, options.basis == "error"
    require_choice("feedback_basis", options.basis, BASES)
    if not 0 < share <= 1:
        raise ValueError(f"feedback_rank must lie in (0, 1], got {share}")
    if by_error and network.targets is None:
        raise ValueError("feedback_basis=error needs targets, and this network was given none")

    def places(params: Tree, mstate: Tree, examples: Tree) -> Tree:
        weights = of_factors(lambda f: jnp.abs(f.s), params)
        if by_error:
            inputs, targets = examples
            weights = energies(
                network.units, params, mstate, inputs, lambda y: network.error(y, targets)
            )
        return jax.tree.map(lambda w: jax.lax.top_k(w, directions(len(w), share))[1], weights)

    def init(key: Array, params: Tree, mstate: Tree) -> WalkFeedback:
        del key
        if not factors.leaves(params):
            raise ValueError("feedback_rank is a share of factors' rank, and this model has none")
        seen = (network.inputs, network.targets) if by_error else ()
        examples = jax.tree.map(lambda x: jnp.asarray(x[:_EXAMPLES]), seen)
        return WalkFeedback(places(params, mstate, examples), examples)

    def down(feedback: WalkFeedback, params: Tree) -> Through:
        # All of them in their own order are the weights, to the last bit.
        twins = tuple(
            unit | {n: at for n, at in chosen.items() if len(at) < unit[n].rank}
            for unit, chosen in zip(params, feedback.places, strict=True)
        )
        return fb.through_twins(network.units, twins)

    def update(
        feedback: WalkFeedback, before: Tree, after: Tree, tape: Any, batch: Any
    ) -> WalkFeedback:
        del before, after, tape
        return feedback._replace(examples=newest(feedback.examples, batch))

    def refresh(feedback: WalkFeedback, params: Tree, mstate: Tree) -> WalkFeedback:
        return feedback._replace(places=places(params, mstate, feedback.examples))

    return walking(init, down)._replace(
        update=update,
        refresh=refresh,
        refresh_every=options.every,
        note=f"walking through {share:g} of each layer's singular directions",
    )


def of_factors(fn: Callable[[Factors], Any], params: Tree) -> Tree:
    """What a function makes of the factors of every unit, by layer."""
    return tuple({n: fn(f) for n, f in unit.items() if is_factors(f)} for unit in params)


def energies(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Tree, error: Callable[[Array], Array]
) -> Tree:
    """How much of the true signals passes each singular direction of every layer.

    Args:
      units: n units.
      params: their parameters.
      mstate: model state.
      x: inputs of the model.
      error: outputs (batch, ...) -> e of the same shape.

    Returns:
      Of every unit, by layer, (r,): Σ (s_k u_kᵀ δ)² over examples and positions, up to a factor of
      the layer, with δ what a backward pass in training mode brings to the layer's output.
    """
    weighing = of_factors(lambda f: jnp.zeros(f.rank, f.s.dtype), params)
    twins = tuple(unit | zeros for unit, zeros in zip(params, weighing, strict=True))
    expect(units, params, twins)
    pullbacks = []
    for i, unit in enumerate(units):

        def apply(zeros: Tree, x: Tree, i: int = i, unit: Unit = unit) -> Array:
            return unit.walk(params[i], params[i] | zeros, mstate[i], x)

        x, pullback = jax.vjp(apply, weighing[i], x)
        pullbacks.append(pullback)
    found: list[Tree] = []
    signal = error(x)
    for pullback in reversed(pullbacks):
        energy, signal = pullback(signal)
        found.insert(0, energy)
    return tuple(found)
