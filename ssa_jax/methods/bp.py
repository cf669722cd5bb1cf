"""Backpropagation, as the chain of the units' own pullbacks."""

from typing import Any

import jax

from ssa_jax.forward import Tape
from ssa_jax.methods.base import FeedbackOptions, Method, Network

Array = jax.Array


def bp(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i)ᵀ δ_i from δ_n = e: the exact gradient (Rumelhart et al. 1986).

    On a factorised model this is backpropagation on the factors (SVD-BP).
    """
    del network, options

    def signals(feedback: Any, params: Any, tape: Tape, error: Array, batch: Any) -> list[Array]:
        del feedback, params, batch
        deltas = [error]
        for pullback in tape.pullbacks[:0:-1]:
            deltas.insert(0, pullback(deltas[0])[1])
        return deltas

    return Method(init=lambda key, params, mstate: (), signals=signals)
