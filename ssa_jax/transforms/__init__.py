"""Optax transformations for factored weights, usable alone in any optax chain."""

from ssa_jax.transforms.manifold import RetractState, project_to_tangent, retract
from ssa_jax.transforms.spectrum import (
    HoyerState,
    TruncateState,
    add_hoyer,
    keep_largest,
    truncate_rank,
)

__all__ = [
    "HoyerState",
    "RetractState",
    "TruncateState",
    "add_hoyer",
    "keep_largest",
    "project_to_tangent",
    "retract",
    "truncate_rank",
]
