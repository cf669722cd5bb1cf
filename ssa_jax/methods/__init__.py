"""Learning methods by name: (network, options) -> Method."""

from collections.abc import Callable

from ssa_jax.methods.auglocal import auglocal
from ssa_jax.methods.base import FeedbackOptions, Method, Network
from ssa_jax.methods.bp import bp, chain, svd_bp
from ssa_jax.methods.dfa import dfa, drtp
from ssa_jax.methods.fa import brsf, fa, frsf, kp, usf
from ssa_jax.methods.grape import grape
from ssa_jax.methods.local import local
from ssa_jax.methods.pair import blend, relay
from ssa_jax.methods.ssa import ssa

METHODS: dict[str, Callable[[Network, FeedbackOptions], Method]] = {
    "bp": bp,
    "svd_bp": svd_bp,
    "fa": fa,
    "dfa": dfa,
    "usf": usf,
    "frsf": frsf,
    "brsf": brsf,
    "kp": kp,
    "drtp": drtp,
    "grape": grape,
    "local": local,
    "auglocal": auglocal,
    "ssa": ssa,
}
# Methods that are about factors; the others take a dense model unless asked otherwise.
ON_FACTORS = ("svd_bp", "ssa")

__all__ = [
    "METHODS",
    "ON_FACTORS",
    "FeedbackOptions",
    "Method",
    "Network",
    "blend",
    "chain",
    "relay",
]
