"""Feedback paths: how the error reaches every unit.

A *path* D_i of shape (outputs, *shape of h_i), outputs being their number for one example, turns
the output error into the teaching signal δ_i = e · D_i. For networks whose full paths would not fit
it has two smaller forms: of *low rank*, D_i = Q M_i with an orthonormal Q (outputs, r) and M_i (r,
*shape of h_i), and *per channel*, uniform over positions, (outputs, 1, 1, channels).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.methods.base import Through, require_choice
from ssa_jax.networks.forward import Tape, Visited
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any
Shape = tuple[int, ...]

FORMS = ("auto", "full", "low_rank", "channel")
_FLOAT_BYTES = 4


class LowRank(NamedTuple):
    """A path D = Q M that knows r directions of the error alone.

    Attributes:
      basis: Q (outputs, r), orthonormal columns.
      core: M (r, *shape of h).
    """

    basis: Array
    core: Array


Path = Array | LowRank


class Plan(NamedTuple):
    """How the direct paths of a network are stored and built.

    Attributes:
      per_channel: one value a class and channel instead of one a class and entry of the map.
      rows: classes times inputs that may be pushed down at a time: per channel through the
        network, of low rank through the last unit.
      size: bytes of all paths.
      full_size: bytes that they would take in full form.
      rank: directions of the error that paths of low rank know; 0 for the other forms.
    """

    per_channel: bool
    rows: int
    size: int
    full_size: int
    rank: int = 0

    def __str__(self) -> str:
        size, full = f"{self.size / 2**20:.2f} MiB", f"{self.full_size / 2**20:.0f} MiB"
        if self.per_channel:
            return f"per-channel paths of {size} (full: {full})"
        if self.rank:
            return f"low-rank ({self.rank} directions) paths of {size} (full: {full})"
        return f"full paths of {size}"


def plan(shapes: Sequence[Shape], form: str, limit: int) -> Plan:
    """Chooses the form of the paths.

    Args:
      shapes: output shape of each unit for one example, the last one (classes,).
      form: ``"full"``, ``"low_rank"``: of as many directions as take at most `limit`, full where
        that is no more, ``"channel"``, or ``"auto"``: full if the paths take at most `limit`, else
        per channel.
      limit: bytes. In per-channel form it also bounds what building the paths takes, by the
        number of classes that go down the network at a time, and in low rank through the last
        unit, whose whole path is then held once. As many as it allows: what is done in turn is a
        loop, in which a CPU takes many times as long for a convolution.

    Raises:
      ValueError: an unknown form, or a limit below what one direction takes.
    """
    require_choice("feedback_form", form, FORMS)
    classes, hidden = math.prod(shapes[-1]), shapes[:-1]
    full = _FLOAT_BYTES * classes * sum(math.prod(s) for s in hidden)
    if form == "full" or (form == "auto" and full <= limit) or not hidden:
        return Plan(False, classes, full, full)
    if form == "low_rank":
        # The last hidden unit's path has no more directions than that unit has entries.
        direction = full // classes + _FLOAT_BYTES * classes * len(hidden)
        rank = min(limit // direction, classes, math.prod(hidden[-1]))
        if rank * direction >= full:
            return Plan(False, classes, full, full)
        if not rank:
            raise ValueError(
                f"a direction of low-rank paths takes {direction / 2**20:.2g} MiB, and "
                f"feedback_limit_mib allows {limit / 2**20:g}; raise it, or give "
                "feedback_form=channel"
            )
        rows = max(1, limit // (_FLOAT_BYTES * math.prod(hidden[-1])))
        return Plan(False, rows, rank * direction, full, rank)
    rows = max(1, limit // (_FLOAT_BYTES * max(math.prod(s) for s in hidden)))
    return Plan(True, rows, _FLOAT_BYTES * classes * sum(s[-1] for s in hidden), full)


def stored_shapes(shapes: Sequence[Shape], plan: Plan) -> list[Shape]:
    """Of the paths of the hidden units, without the axis of the outputs."""
    if not plan.per_channel:
        return list(shapes[:-1])
    return [(1,) * (len(shape) - 1) + shape[-1:] for shape in shapes[:-1]]


def random_paths(
    key: Array, shapes: Sequence[Shape], ranks: Sequence[int | None], plan: Plan
) -> tuple[Path, ...]:
    """Fixed random R_i for every hidden unit, Gaussian with variance 1/classes.

    Of low rank it is Q M with a random orthonormal Q and a Gaussian M, to the same variance.

    Args:
      key: PRNG key.
      shapes: output shape of each unit, the last one (classes,).
      ranks: rank of R_i as a (classes, size) matrix in SVD form, or None for a full one.
      plan: how they are stored; per channel, every position gets the same feedback.

    Returns:
      n - 1 arrays (classes, *shapes[i]), or (classes, 1, 1, channels) per channel, or `LowRank`.
    """
    classes = math.prod(shapes[-1])
    rows = plan.rank or classes
    stored = stored_shapes(shapes, plan)
    paths: list[Path] = []
    for k, shape, rank in zip(jax.random.split(key, len(shapes)), stored, ranks, strict=False):
        k, k_svd = jax.random.split(k)
        path = jax.random.normal(k, (rows, math.prod(shape))) / jnp.sqrt(rows)
        if rank is not None and rank < min(path.shape):
            path = factors.to_dense(factors.from_dense(path, rank, k_svd))
        core = path.reshape(rows, *shape)
        if plan.rank:
            # Drawn apart, so that paths of the other forms are what they were.
            basis = jnp.linalg.qr(jax.random.normal(jax.random.fold_in(k, 0), (classes, rows)))[0]
            paths.append(LowRank(basis, core))
        else:
            paths.append(core)
    return tuple(paths)


def send(vectors: Array, path: Path, shape: Shape) -> Array:
    """The teaching signal δ_i = e · D_i of one hidden unit.

    Args:
      vectors: e (batch, ...), or what else is sent down, of the outputs' shape.
      path: D_i (classes, *shape), or per channel, or of low rank.
      shape: of h_i for one example.

    Returns:
      (batch, *shape).
    """
    flat = vectors.reshape(len(vectors), -1)
    if isinstance(path, LowRank):
        flat, path = flat @ path.basis, path.core
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
