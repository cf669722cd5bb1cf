"""Direct paths by regression: the linear map of the output error that is nearest to the signals."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.methods import composed
from ssa_jax.methods import feedback as fb
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any

# How much of the sums the next refresh keeps, and the ridge as a share of the mean square of an
# output's error.
KEEP = 0.8
RIDGE = 1e-3


def empty(shapes: Sequence[fb.Shape], plan: fb.Plan) -> tuple[tuple[fb.Path, ...], Array]:
    """Paths and Gram matrix before any example was seen: zeros."""
    outputs = math.prod(shapes[-1])
    rows = plan.rank or outputs
    cores = [jnp.zeros((rows, *s)) for s in fb.stored_shapes(shapes, plan)]
    paths: Sequence[fb.Path] = cores
    if plan.rank:
        paths = [fb.LowRank(jnp.eye(outputs, rows), core) for core in cores]
    return tuple(paths), jnp.zeros((rows, rows))


def regress(
    paths: Sequence[fb.Path],
    gram: Array,
    units: Sequence[Unit],
    params: Tree,
    twins: Tree | None,
    mstate: Tree,
    inputs: Tree,
    error: Callable[[Array], Array],
    plan: fb.Plan,
) -> tuple[tuple[fb.Path, ...], Array]:
    """Paths D_i = (G + λ I)⁻¹ S_i after one exact pass more.

    S_i = Σ e δ_iᵀ and G = Σ e eᵀ are running sums over examples, of which a refresh keeps the share
    KEEP; λ = RIDGE · tr(G) / outputs. δ_i = (∂outputs/∂h_i)ᵀ e is the true signal of an example:
    its error, and those of the others through batch norms, on their way down through all units in
    training mode, with the twins' maps in place of the weights' where there are twins. e · D_i is
    then the linear map of e that is nearest to δ_i in the mean square; the mean Jacobian of
    `composed.composed_paths` is not, where Jacobian and error depend on each other. A refresh costs
    one forward pass and the signals of one backward pass of these inputs, whatever the outputs.

    Paths of low rank, D_i = Q M_i with Q of `composed.directions`, regress on Qᵀe, with
    λ = RIDGE · tr(QᵀGQ) / r. Sums that were taken along another Q are turned into this one, and
    keep what the two have in common. For Q every output goes through the last unit alone.

    Args:
      paths: D_i so far, (outputs, *shape of h_i), or (outputs, 1, 1, channels): then of the mean
        of δ_i over positions; or `feedback.LowRank`.
      gram: G so far, (outputs, outputs), or (r, r). Together they say what S_i was.
      units: n units.
      params: their parameters.
      twins: parameter trees whose maps stand in for the weights', or None.
      mstate: model state.
      inputs: of the model.
      error: outputs (batch, ...) -> e of the same shape.
      plan: how the paths are stored.
    """
    outputs, pullbacks = composed.pullbacks_of(units, params, twins, mstate, inputs)
    signal = error(outputs)
    e = signal.reshape(len(signal), -1)
    was, basis = _ridged(gram), None
    if plan.rank:
        # All paths have the basis of their last refresh.
        before = paths[0]
        assert isinstance(before, fb.LowRank)
        basis = composed.directions(outputs, pullbacks[-1], plan)
        turn = basis.T @ before.basis
        e, was, gram = e @ basis, turn @ was, turn @ gram @ turn.T
    now = KEEP * gram + e.T @ e
    inverse = jnp.linalg.inv(_ridged(now))
    found: list[fb.Path] = []
    for pullback, path in zip(reversed(pullbacks), reversed(paths), strict=True):
        (signal,) = pullback(signal)
        core = path.core if isinstance(path, fb.LowRank) else path
        seen = composed.over_positions(signal) if plan.per_channel else signal
        moments = KEEP * jnp.tensordot(was, core, 1) + jnp.tensordot(e.T, seen, 1)
        core = jnp.tensordot(inverse, moments, 1)
        found.insert(0, core if basis is None else fb.LowRank(basis, core))
    return tuple(found), now


def _ridged(gram: Array) -> Array:
    # Errors that are all zero leave a matrix that can still be inverted.
    ridge = RIDGE * jnp.trace(gram) / len(gram) + jnp.finfo(gram.dtype).tiny
    return gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)
