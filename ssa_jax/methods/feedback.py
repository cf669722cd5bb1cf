"""Feedback paths: how the error reaches every unit.

A *path* D_i of shape (classes, *shape of h_i) turns the output error into the teaching signal
δ_i = e · D_i. Its *per-channel* form is uniform over positions, (classes, 1, 1, channels), for
networks whose full paths would not fit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax import factors
from ssa_jax.networks.forward import Tape
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any
Shape = tuple[int, ...]

FORMS = ("auto", "full", "channel")
_FLOAT_BYTES = 4


class Plan(NamedTuple):
    """How the direct paths of a network are stored and built.

    Attributes:
      per_channel: one value a class and channel instead of one a class and entry of the map.
      rows: classes that are pushed down the network at a time.
      size: bytes of all paths.
      full_size: bytes that they would take in full form.
    """

    per_channel: bool
    rows: int
    size: int
    full_size: int

    def __str__(self) -> str:
        form = "per-channel" if self.per_channel else "full"
        text = f"{form} paths of {self.size / 2**20:.2f} MiB"
        return text + f" (full: {self.full_size / 2**20:.0f} MiB)" * self.per_channel


def plan(shapes: Sequence[Shape], form: str, limit: int) -> Plan:
    """Chooses the form of the paths.

    Args:
      shapes: output shape of each unit for one example, the last one (classes,).
      form: ``"full"``, ``"channel"``, or ``"auto"``: full if the paths take at most `limit`.
      limit: bytes. In per-channel form it also bounds what building the paths takes, by the
        number of classes that go down the network at a time.

    Raises:
      ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"feedback_form must be one of {', '.join(FORMS)}, got {form!r}")
    classes, hidden = shapes[-1][0], shapes[:-1]
    full = _FLOAT_BYTES * classes * sum(math.prod(s) for s in hidden)
    if form == "full" or (form == "auto" and full <= limit):
        return Plan(False, classes, full, full)
    size = _FLOAT_BYTES * classes * sum(s[-1] for s in hidden)
    largest = _FLOAT_BYTES * max((math.prod(s) for s in hidden), default=1)
    return Plan(True, min(classes, max(1, limit // largest)), size, full)


def _channel_shape(shape: Shape) -> Shape:
    return (1,) * (len(shape) - 1) + shape[-1:]


def composed_paths(
    units: Sequence[Unit], twins: Tree, mstate: Tree, shapes: Sequence[Shape], plan: Plan
) -> tuple[Array, ...]:
    """D_i for every hidden unit: the identity pushed down the twins' linear network.

    D_{n-1} = I (classes, classes) at the logits, and D_i is the vjp of unit i+1's linear path
    at D_{i+1}: one batch of `classes` rows goes down the network once a refresh. The per-channel
    form is the mean of D_i over positions.

    Args:
      units: n units.
      twins: parameter trees in place of the weights.
      mstate: model state; norms enter by scale over their running deviation.
      shapes: output shape of each unit for one example, the last one (classes,).
      plan: how they are stored.

    Returns:
      n - 1 arrays (classes, *shapes[i]), or (classes, 1, 1, channels) per channel, of the dtype
      that twins and state promote to, at least float32.
    """
    classes = shapes[-1][0]
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves((twins, mstate)))

    def push(path: Array) -> tuple[Array, ...]:
        paths: list[Array] = []
        for i in range(len(units) - 1, 0, -1):

            def linear(x: Array, i: int = i) -> Array:
                return units[i].linear(twins[i], mstate[i], x)

            y, pullback = jax.vjp(linear, jnp.zeros((len(path), *shapes[i - 1]), dtype))
            (path,) = pullback(path.astype(y.dtype))
            positions = tuple(range(1, path.ndim - 1)) if plan.per_channel else ()
            paths.insert(0, jnp.mean(path, positions, keepdims=True) if positions else path)
        return tuple(paths)

    if plan.rows >= classes:
        return push(jnp.eye(classes, dtype=dtype))
    # Rows of zeros fill the last chunk.
    chunks = -(-classes // plan.rows)
    rows = jnp.eye(chunks * plan.rows, classes, dtype=dtype)
    found = lax.map(push, rows.reshape(chunks, plan.rows, classes))
    return tuple(x.reshape(-1, *x.shape[2:])[:classes] for x in found)


def random_paths(
    key: Array, shapes: Sequence[Shape], ranks: Sequence[int | None], plan: Plan
) -> tuple[Array, ...]:
    """Fixed random R_i for every hidden unit, Gaussian with variance 1/classes.

    Args:
      key: PRNG key.
      shapes: output shape of each unit, the last one (classes,).
      ranks: rank of R_i as a (classes, size) matrix in SVD form, or None for a full one.
      plan: how they are stored; per channel, every position gets the same feedback.

    Returns:
      n - 1 arrays (classes, *shapes[i]), or (classes, 1, 1, channels) per channel.
    """
    classes = shapes[-1][0]
    stored = [_channel_shape(s) if plan.per_channel else s for s in shapes[:-1]]
    paths = []
    for k, shape, rank in zip(jax.random.split(key, len(shapes)), stored, ranks, strict=False):
        k, k_svd = jax.random.split(k)
        path = jax.random.normal(k, (classes, math.prod(shape))) / jnp.sqrt(classes)
        if rank is not None and rank < min(path.shape):
            path = factors.to_dense(factors.from_dense(path, rank, k_svd))
        paths.append(path.reshape(classes, *shape))
    return tuple(paths)


def send(vectors: Array, path: Array, shape: Shape) -> Array:
    """The teaching signal δ_i = e · D_i of one hidden unit.

    Args:
      vectors: e (batch, classes), or what else is sent down.
      path: D_i (classes, *shape), or per channel.
      shape: of h_i for one example.

    Returns:
      (batch, *shape).
    """
    return jnp.broadcast_to(jnp.tensordot(vectors, path, 1), (len(vectors), *shape))


def walk(
    units: Sequence[Unit], params: Tree, twins: Tree, tape: Tape, error: Array
) -> tuple[Array, ...]:
    """Sequential feedback: the error walks down through twins and true local derivatives.

    δ_{i-1} = (∂h_i/∂x_i with the twins' maps in place of the weights')ᵀ δ_i. With twins equal
    to the weights this is backpropagation.
    """
    signals = [error]
    for i in range(len(units) - 1, 0, -1):

        def walk_unit(x: Array, i: int = i) -> Array:
            return units[i].walk(params[i], twins[i], tape.mstate[i], x)

        _, pullback = jax.vjp(walk_unit, tape.inputs[i])
        signals.insert(0, pullback(signals[0])[0])
    return tuple(signals)


def look_ahead(tape: Tape, signals: Sequence[Array], units: int) -> tuple[Array, ...]:
    """Moves every signal through the exact derivative of the units after its own.

    δ_i becomes (∂h_{i+k}/∂h_i)ᵀ δ_{i+k}: the signal that unit i+k receives, pulled back through
    k units at the current example (fewer near the output). All units move at once, so nothing
    waits for more than k others; with k of the network's depth this is backpropagation.

    Args:
      tape: of the forward pass.
      signals: n arrays, the last one the output error.
      units: k.
    """
    for _ in range(min(units, len(signals) - 1)):
        pulled = (p(s)[1] for p, s in zip(tape.pullbacks[1:], signals[1:], strict=True))
        signals = (*pulled, signals[-1])
    return tuple(signals)
