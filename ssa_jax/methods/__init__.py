"""Learning methods by name: (network, options) -> Method."""

from collections.abc import Callable

from ssa_jax.methods.base import FeedbackOptions, Method, Network
from ssa_jax.methods.bp import bp
from ssa_jax.methods.dfa import dfa
from ssa_jax.methods.ssa import ssa

METHODS: dict[str, Callable[[Network, FeedbackOptions], Method]] = {
    "bp": bp,
    "dfa": dfa,
    "ssa": ssa,
}

__all__ = ["METHODS", "FeedbackOptions", "Method", "Network"]
