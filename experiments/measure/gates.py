"""The nearest gated map: what a unit's own activation adds to a signal that is linear in the error.

A gate is what a unit could learn to lay over its direct signal, by channel and example, from its
own output alone. In place of any one of them the whole family is fitted at once.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.methods import chain
from ssa_jax.methods.base import Method
from ssa_jax.methods.composed import over_positions
from ssa_jax.networks.forward import Tape, forward
from ssa_jax.runs.build import Built
from ssa_jax.training.tasks import output_error
from ssa_jax.types import Batch

Array = jax.Array
Tree = Any

# The ridges, as a share of the mean square of a gate's features over all entries: of the error by
# itself, and of the gates, to which falls what that leaves. Where a gate is hardly ever shut, the
# two are hardly to be told apart.
RIDGE, RIDGE_OF_GATES = 1e-5, 1e-3
# The gates of an entry: none, whether it is above zero, itself, and the mean of its channel.
GATES = 4
_FLOAT_BYTES = 4


def features(error: Array, h: Array) -> Array:
    """The error, and the error times each gate of an entry: (batch, GATES · outputs, entries)."""
    e = error.reshape(len(error), -1)
    means = jnp.broadcast_to(over_positions(h), h.shape)
    gates = jnp.stack([jnp.ones_like(h), (h > 0).astype(h.dtype), h, means], 1)
    gates = gates.reshape(len(h), GATES, -1)
    both = jnp.einsum("bk,bgj->bgkj", e, gates)
    return both.reshape(len(h), GATES * e.shape[1], -1)


def nearest(built: Built, batches: Iterable[Batch]) -> Method:
    """The method of a network with, for its signals, the gated maps nearest to the true ones.

    δ_ij = Σ_g g(h_i)_j (e · D_g)_ij for the entries j of unit i, the D_g by ridge regression of
    the true signals over all examples, every entry by itself: in the mean square over those no
    signal is nearer that is linear in the error and in these gates.

    Args:
      built: the network, its weights in its state.
      batches: of training examples; batch norms take each batch's own statistics.
    """
    state, task = built.state, built.weights.task

    @jax.jit
    def sums(batch: Batch) -> list[tuple[Array, Array]]:
        outputs, _, tape = forward(built.units, state.params, state.mstate, batch.images)
        _, error = output_error(task, outputs, batch.labels)
        true = chain(tape, error)
        found = []
        for h, signal in zip(tape.outputs[:-1], true[:-1], strict=True):
            f = features(error, h)
            moments = jnp.einsum("bfj,bj->jf", f, signal.reshape(len(signal), -1))
            found.append((jnp.einsum("bfj,bgj->jfg", f, f), moments))
        return found

    total = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), map(sums, batches))
    maps = [_solved(*of_unit) for of_unit in total]

    def signals(
        feedback: Tree, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        del feedback, params, batch
        sent = [
            jnp.einsum("bfj,jf->bj", features(error, h), m).reshape(h.shape)
            for h, m in zip(tape.outputs[:-1], maps, strict=True)
        ]
        return (*sent, error)

    return built.method._replace(signals=signals)


def size(built: Built, batch: Batch) -> int:
    """Bytes of the sums of the largest hidden unit."""

    def outputs(batch: Batch) -> tuple[Array, ...]:
        state = built.state
        return forward(built.units, state.params, state.mstate, batch.images)[2].outputs

    *hidden, last = (math.prod(h.shape[1:]) for h in jax.eval_shape(outputs, batch))
    return _FLOAT_BYTES * (GATES * last) ** 2 * max(hidden)


def _solved(squares: Array, moments: Array) -> Array:
    # By gate, brought to a mean square of one over all entries: what is seldom open in an entry
    # falls below the ridge there, and float32 loses nothing.
    sizes = jnp.diagonal(squares, axis1=1, axis2=2)
    of_gates = jnp.mean(sizes.reshape(len(sizes), GATES, -1), (0, 2))
    scale = jax.lax.rsqrt(jnp.maximum(of_gates, jnp.finfo(sizes.dtype).tiny))
    outputs = sizes.shape[1] // GATES
    scale = jnp.repeat(scale, outputs)
    ridges = jnp.full_like(scale, RIDGE_OF_GATES).at[:outputs].set(RIDGE)
    scaled = squares * jnp.outer(scale, scale)[None] + jnp.diag(ridges)[None]
    return scale[None] * jnp.linalg.solve(scaled, (scale[None] * moments)[..., None])[..., 0]
