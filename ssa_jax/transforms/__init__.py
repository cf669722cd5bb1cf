"""Optax transformations for orthonormal and factored weights, usable alone in any optax chain."""

from ssa_jax.transforms.adaptive import AdaptState, adapt_rank
from ssa_jax.transforms.aliases import ssa, stiefel_adam, stiefel_muon, stiefel_sgd
from ssa_jax.transforms.clipping import clip_by_rms
from ssa_jax.transforms.entries import keep_largest, restore_dropped
from ssa_jax.transforms.manifold import RetractState, project_to_tangent, retract
from ssa_jax.transforms.monitor import DriftState, orthogonality_drift
from ssa_jax.transforms.optimizers import StiefelMuonState, TraceState, scale_by_stiefel_muon, trace
from ssa_jax.transforms.penalties import (
    AlignmentState,
    HoyerState,
    OrthogonalityPenaltyState,
    add_alignment,
    add_hoyer,
    add_orthogonality_penalty,
)
from ssa_jax.transforms.riemannian_adam import RiemannianAdamState, scale_by_riemannian_adam
from ssa_jax.transforms.selection import NothingToActOn, label_paths
from ssa_jax.transforms.spectrum import TruncateState, truncate_rank
from ssa_jax.transforms.stable_rank import StableRankState, truncate_stable_rank

__all__ = [
    "AdaptState",
    "AlignmentState",
    "DriftState",
    "HoyerState",
    "NothingToActOn",
    "OrthogonalityPenaltyState",
    "RetractState",
    "RiemannianAdamState",
    "StableRankState",
    "StiefelMuonState",
    "TraceState",
    "TruncateState",
    "adapt_rank",
    "add_alignment",
    "add_hoyer",
    "add_orthogonality_penalty",
    "clip_by_rms",
    "keep_largest",
    "label_paths",
    "orthogonality_drift",
    "project_to_tangent",
    "restore_dropped",
    "retract",
    "scale_by_riemannian_adam",
    "scale_by_stiefel_muon",
    "ssa",
    "stiefel_adam",
    "stiefel_muon",
    "stiefel_sgd",
    "trace",
    "truncate_rank",
    "truncate_stable_rank",
]
