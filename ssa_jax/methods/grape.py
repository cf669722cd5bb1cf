"""GrAPE: direct paths that are turned towards forward-mode estimates of the Jacobians."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax.methods import composed
from ssa_jax.methods import feedback as fb
from ssa_jax.methods.base import FeedbackOptions, Method, Network
from ssa_jax.methods.dfa import dfa
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any


class Aligned(NamedTuple):
    """Paths, and the key of the directions of the next step.

    Attributes:
      key: PRNG key.
      paths: the direct paths B_i.
    """

    key: Array
    paths: Sequence[fb.Path]


def grape(network: Network, options: FeedbackOptions) -> Method:
    """δ_i = e · B_i, with a B_i that follows the mean Jacobian (GrAPE, Caillon et al. 2026).

    B_i begins as the R_i of `dfa.dfa`. Beside every step goes one pass in forward mode: the output
    of every hidden unit moves by a Gaussian u_i, drawn anew for every example, and the outputs of
    the network by y = Σ_i J_i u_i. As E[y u_iᵀ] = J_i, the mean over a batch, D_i = mean y u_iᵀ, is
    an estimate of the mean Jacobian without bias, in which the motions of the other units are
    noise. B_i takes one step of `options.rate` on 1 - cos(B_i, D_i) and keeps its length:

        B_i <- |B_i| unit(b + rate (d - cos(b, d) b)),  b = B_i / |B_i|,  d = D_i / |D_i|.

    The published method has exact steps now and then besides, which this one has not.

    Raises:
      ValueError: an unknown form.
    """
    start, plan = dfa(network, options), fb.plan(network.shapes, options.form, options.limit)

    def init(key: Array, params: Tree, mstate: Tree) -> Aligned:
        key, key_paths = jax.random.split(key)
        return Aligned(key, start.init(key_paths, params, mstate))

    def signals(
        feedback: Aligned, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        return start.signals(feedback.paths, params, tape, error, batch)

    def update(feedback: Aligned, before: Tree, after: Tree, tape: Tape, batch: Any) -> Aligned:
        del before, after, batch
        key, *keys = jax.random.split(feedback.key, len(network.shapes))
        moved = [
            jax.random.normal(k, h.shape, h.dtype)
            for k, h in zip(keys, tape.outputs[:-1], strict=True)
        ]
        y = pushed(tape, moved)
        paths = tuple(
            _turned(path, u, y, options.rate, plan)
            for path, u in zip(feedback.paths, moved, strict=True)
        )
        return Aligned(key, paths)

    # Without `Method.direct`, which is for methods whose update leaves the tape unread.
    return Method(init=init, signals=signals, update=update, note=start.note)


def pushed(tape: Tape, moved: Sequence[Array]) -> Array:
    """How the outputs move with the hidden units: Σ_i J_i u_i at the tape's examples.

    Forward mode by the transposes of the units' pullbacks, with what the tape holds.

    Args:
      tape: of n units.
      moved: u_i for the n - 1 hidden ones, of the shapes of h_i.

    Returns:
      (batch, ...), of the shape of the outputs.
    """
    motion = jnp.zeros_like(tape.outputs[0])
    for u, pullback, h in zip(moved, tape.pullbacks[1:], tape.outputs[1:], strict=True):
        push = jax.linear_transpose(lambda s, pullback=pullback: pullback(s)[1], h)
        (motion,) = push(motion + u)
    return motion


def _turned(path: fb.Path, u: Array, y: Array, rate: float, plan: fb.Plan) -> fb.Path:
    rows, seen = y.reshape(len(y), -1), composed.over_positions(u) if plan.per_channel else u
    if isinstance(path, fb.LowRank):
        estimate = jnp.tensordot((rows @ path.basis).T, seen, 1)
        return path._replace(core=_nearer(path.core, estimate, rate))
    return _nearer(path, jnp.tensordot(rows.T, seen, 1), rate)


def _nearer(path: Array, estimate: Array, rate: float) -> Array:
    length = jnp.linalg.norm(path)
    b, d = _unit(path), _unit(estimate)
    return length * _unit(b + rate * (d - jnp.vdot(b, d) * b))


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x), jnp.finfo(x.dtype).tiny)
