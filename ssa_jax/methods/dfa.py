"""Direct feedback alignment."""

from collections.abc import Sequence
from typing import Any

import jax

from ssa_jax import feedback as fb
from ssa_jax.forward import Tape
from ssa_jax.methods.base import FeedbackOptions, Method, Network

Array = jax.Array


def dfa(network: Network, options: FeedbackOptions) -> Method:
    """δ_i = e · R_i with R_i (classes, *shape of h_i) fixed and Gaussian (Nøkland 2016)."""
    del options

    def init(key: Array, params: Any, mstate: Any) -> Sequence[Array]:
        del params, mstate
        return fb.random_paths(key, network.shapes, [None] * len(network.shapes))

    def signals(paths: Any, params: Any, tape: Tape, error: Array, batch: Any) -> Sequence[Array]:
        del params, tape, batch
        return fb.send(error, paths)

    return Method(init=init, signals=signals)
