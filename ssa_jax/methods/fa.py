"""Feedback alignment: the error walks down through twins that are not the weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.methods import feedback as fb
from ssa_jax.methods import twins as tw
from ssa_jax.methods.base import FeedbackOptions, Method, Network, Through, walking
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any


def fa(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i with B_i for W_i)ᵀ δ_i, B_i fixed and random (Lillicrap et al. 2016).

    B_i has the shape, rank and norm of the weights: Gaussian for a dense kernel, the truncated
    SVD of a Gaussian for a factorised one (see `twins.init_twins`).
    """
    del options

    def update(twins: Tree, before: Tree, after: Tree, tape: Tape, batch: Any) -> Tree:
        del before, tape, batch
        return tw.follow_ranks(twins, after)

    return _walking(network, tw.init_twins, lambda twins, params: twins, update)


def kp(network: Network, options: FeedbackOptions) -> Method:
    """Feedback alignment whose twins learn (Kolen & Pollack 1994; Akrout et al. 2019).

    In every step B takes the weights' own update, and the difference decays:
    B' - W' = (1 - `options.rate`) (B - W); see `twins.accompany`.
    """

    def update(twins: Tree, before: Tree, after: Tree, tape: Tape, batch: Any) -> Tree:
        del tape, batch
        return tw.follow_ranks(tw.accompany(twins, before, after, options.rate), after)

    return _walking(network, tw.init_twins, lambda twins, params: twins, update)


def usf(network: Network, options: FeedbackOptions) -> Method:
    """Uniform sign-concordant feedback: B = sign(W), scaled to W's norm (Moskovitz et al. 2018).

    On factors U, s and V are taken as maps of their own; see `twins.sign_concordant`. Xiao et
    al. (2019) train ImageNet with it.
    """
    del options

    def of_weights(state: Tree, params: Tree) -> Tree:
        del state
        return tw.sign_concordant(params, jax.tree.map(jnp.ones_like, params))

    return _walking(network, lambda key, params: (), of_weights)


def frsf(network: Network, options: FeedbackOptions) -> Method:
    """Fixed random magnitudes, the weights' signs: B = |M| ⊙ sign(W) (Moskovitz et al. 2018).

    M is Gaussian and drawn once; B is scaled to W's norm.
    """
    del options
    return _walking(
        network,
        tw.random_magnitudes,
        lambda magnitudes, params: tw.sign_concordant(params, magnitudes),
    )


def brsf(network: Network, options: FeedbackOptions) -> Method:
    """`frsf` with magnitudes drawn anew for every batch (Moskovitz et al. 2018)."""
    del options

    def drawn(key: Array, params: Tree) -> Tree:
        return tw.sign_concordant(params, tw.random_magnitudes(key, params))

    def update(key: Array, *_: Any) -> Array:
        return jax.random.split(key, 1)[0]

    return _walking(network, lambda key, params: key, drawn, update)


def _walking(
    network: Network,
    init: Callable[[Array, Tree], Tree],
    twins_of: Callable[[Tree, Tree], Tree],
    update: Callable[..., Tree] | None = None,
) -> Method:
    """The method whose error walks down through twins_of(state, params)."""

    def down(state: Tree, params: Tree) -> Through:
        return fb.through_twins(network.units, twins_of(state, params))

    method = walking(lambda key, params, mstate: init(key, params), down)
    return method if update is None else method._replace(update=update)
