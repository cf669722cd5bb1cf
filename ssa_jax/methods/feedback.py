"""Feedback paths: how the error reaches every unit.

A *path* D_i of shape (outputs, *shape of h_i), outputs being their number for one example, turns
the output error into the teaching signal δ_i = e · D_i. Its *per-channel* form is uniform over
positions, (outputs, 1, 1, channels), for networks whose full paths would not fit.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax import factors
from ssa_jax.methods.base import Through
from ssa_jax.networks.forward import Tape, Visited
from ssa_jax.networks.units import Unit, expect

Array = jax.Array
Tree = Any
Shape = tuple[int, ...]

FORMS = ("auto", "full", "channel")
_FLOAT_BYTES = 4


class Plan(NamedTuple):
    """How the direct paths of a network are stored and built.

    Attributes:
      per_channel: one value a class and channel instead of one a class and entry of the map.
      rows: classes times inputs that may be pushed down the network at a time.
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
        number of classes that go down the network at a time. As many as it allows: what is done
        in turn is a loop, in which a CPU takes many times as long for a convolution.

    Raises:
      ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"feedback_form must be one of {', '.join(FORMS)}, got {form!r}")
    classes, hidden = math.prod(shapes[-1]), shapes[:-1]
    full = _FLOAT_BYTES * classes * sum(math.prod(s) for s in hidden)
    if form == "full" or (form == "auto" and full <= limit):
        return Plan(False, classes, full, full)
    size = _FLOAT_BYTES * classes * sum(s[-1] for s in hidden)
    largest = _FLOAT_BYTES * max((math.prod(s) for s in hidden), default=1)
    return Plan(True, max(1, limit // largest), size, full)


def stored_shapes(shapes: Sequence[Shape], plan: Plan) -> list[Shape]:
    """Of the paths of the hidden units, without the axis of the outputs."""
    if not plan.per_channel:
        return list(shapes[:-1])
    return [(1,) * (len(shape) - 1) + shape[-1:] for shape in shapes[:-1]]


def over_positions(x: Array) -> Array:
    """The mean of x (batch, ..., channels) over all axes between, which stay with size one."""
    positions = tuple(range(1, x.ndim - 1))
    return jnp.mean(x, positions, keepdims=True) if positions else x


def composed_paths(
    units: Sequence[Unit], params: Tree, twins: Tree | None, mstate: Tree, inputs: Tree, plan: Plan
) -> tuple[Array, ...]:
    """D_i for every hidden unit: the mean of ∂outputs/∂h_i over a few inputs.

    Row c of D_i is the mean over the inputs, in training mode, of the derivative of an input's own
    output c by its own h_i, as it goes down through the units' exact derivatives: norms,
    activations, attention and skips as they are, with the twins' maps in place of the weights
    where there are twins. One backward pass of all outputs for each input. The per-channel form
    is the mean of D_i over positions too.

    A batch norm takes from its inputs' gradient the mean over the batch, which of an error is
    about zero and of equal signals is nearly all. So every other input is sent -1, and what comes
    back is multiplied by the same sign: derivatives by other inputs cancel in the mean, but for
    what one pair of them leaves.

    Args:
      units: n units.
      params: their parameters.
      twins: parameter trees whose maps stand in for the weights', or None.
      mstate: model state.
      inputs: of the model, a few.
      plan: how the paths are stored.

    Returns:
      n - 1 arrays (outputs, *shape of h_i), or (outputs, 1, 1, channels) per channel.
    """
    outputs, pullbacks = pullbacks_of(units, params, twins, mstate, inputs)
    classes = math.prod(outputs.shape[1:])

    def push(row: Array) -> tuple[Array, ...]:
        signal = signs(outputs) * row.reshape(1, *outputs.shape[1:])
        found: list[Array] = []
        for pullback in reversed(pullbacks):
            (signal,) = pullback(signal)
            own = signs(signal) * signal
            mean = over_positions(own) if plan.per_channel else own
            found.insert(0, jnp.mean(mean, 0))
        return tuple(found)

    def signs(x: Array) -> Array:
        return jnp.where(jnp.arange(len(x)) % 2, -1, 1).reshape((-1,) + (1,) * (x.ndim - 1))

    # Full paths weigh as much as all their rows at a time; a bound is for per-channel ones.
    rows = max(1, plan.rows // len(outputs)) if plan.per_channel else classes
    identity = jnp.eye(classes, dtype=outputs.dtype)
    if rows >= classes:
        return jax.vmap(push)(identity)
    return lax.map(push, identity, batch_size=rows)


def pullbacks_of(
    units: Sequence[Unit], params: Tree, twins: Tree | None, mstate: Tree, x: Tree
) -> tuple[Array, list[Callable[[Array], tuple[Array]]]]:
    """Outputs in training mode, and the pullbacks of all units but the first by their inputs."""
    pullbacks = []
    expect(units, params)
    for i in range(len(units)):

        def apply(x: Tree, i: int = i) -> Array:
            if twins is None:
                return units[i].apply(params[i], mstate[i], x, train=True)[0]
            return units[i].walk(params[i], twins[i], mstate[i], x)

        if not i:
            x = apply(x)
            continue
        x, pullback = jax.vjp(apply, x)
        pullbacks.append(pullback)
    return x, pullbacks


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
    classes = math.prod(shapes[-1])
    stored = stored_shapes(shapes, plan)
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
      vectors: e (batch, ...), or what else is sent down, of the outputs' shape.
      path: D_i (classes, *shape), or per channel.
      shape: of h_i for one example.

    Returns:
      (batch, *shape).
    """
    flat = vectors.reshape(len(vectors), -1)
    return jnp.broadcast_to(jnp.tensordot(flat, path, 1), (len(vectors), *shape))


def through_twins(units: Sequence[Unit], twins: Tree) -> Through:
    """How a signal walks down through twins and true local derivatives.

    δ_{i-1} = (∂h_i/∂x_i with the twins' maps in place of the weights')ᵀ δ_i. With twins equal
    to the weights this is backpropagation.
    """

    def through(unit: Visited, signal: Array) -> Array:
        here, twin = units[unit.i], twins[unit.i]
        here.expect(unit.params, twin)
        walk_unit = functools.partial(here.walk, unit.params, twin, unit.mstate)
        return jax.vjp(walk_unit, unit.input)[1](signal)[0]

    return through


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
