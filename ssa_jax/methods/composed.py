"""Composed paths: the mean derivative of the outputs by every hidden unit."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax import factors
from ssa_jax.methods.feedback import LowRank, Path, Plan
from ssa_jax.networks.units import Unit, expect

Array = jax.Array
Tree = Any
Pullback = Callable[[Array], tuple[Array]]


def over_positions(x: Array) -> Array:
    """The mean of x (batch, ..., channels) over all axes between, which stay with size one."""
    positions = tuple(range(1, x.ndim - 1))
    return jnp.mean(x, positions, keepdims=True) if positions else x


def composed_paths(
    units: Sequence[Unit], params: Tree, twins: Tree | None, mstate: Tree, inputs: Tree, plan: Plan
) -> tuple[Path, ...]:
    """D_i for every hidden unit: the mean of ∂outputs/∂h_i over a few inputs.

    Row c of D_i is the mean over the inputs, in training mode, of the derivative of an input's own
    output c by its own h_i, as it goes down through the units' exact derivatives: norms,
    activations, attention and skips as they are, with the twins' maps in place of the weights
    where there are twins. One backward pass of all outputs for each input. The per-channel form
    is the mean of D_i over positions too. The one of low rank is Q Qᵀ D_i, with Q of
    `directions`: r sums of the outputs go down, not each by itself, and where the last unit is
    linear in its input and of no higher rank it is D_i itself.

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
      n - 1 arrays (outputs, *shape of h_i), or (outputs, 1, 1, channels) per channel, or `LowRank`.
    """
    outputs, pullbacks = pullbacks_of(units, params, twins, mstate, inputs)
    if plan.rank:
        basis = directions(outputs, pullbacks[-1], plan)
        return tuple(LowRank(basis, m) for m in _pushed(outputs, pullbacks, basis.T, plan, None))
    identity = jnp.eye(math.prod(outputs.shape[1:]), dtype=outputs.dtype)
    # Full paths weigh as much as all their rows at a time; a bound is for per-channel ones.
    return _pushed(outputs, pullbacks, identity, plan, plan.rows if plan.per_channel else None)


def directions(outputs: Array, last: Pullback, plan: Plan) -> Array:
    """Q (outputs, r): the directions of the error of which the last hidden unit sees most.

    The leading left singular vectors of its path, a matrix (outputs, entries of h_{n-1}). Where
    the last unit is linear in its input, all paths below end in that one: of an error that is
    orthogonal to its columns nothing arrives.

    Args:
      outputs: of some inputs, (batch, ...).
      last: the last unit's pullback there, see `pullbacks_of`.
      plan: of low rank.
    """
    identity = jnp.eye(math.prod(outputs.shape[1:]), dtype=outputs.dtype)
    (path,) = _pushed(outputs, [last], identity, plan, plan.rows)
    # Any key does: it draws where the search for the singular vectors starts.
    return factors.from_dense(path.reshape(len(path), -1), plan.rank, jax.random.key(0)).u


def _pushed(
    outputs: Array, pullbacks: Sequence[Pullback], rows: Array, plan: Plan, limit: int | None
) -> tuple[Array, ...]:
    """What sums of the outputs, rows (m, outputs), become of at each pullback: (m, *shape) each.

    At most `limit` rows times inputs go down at a time, or all.
    """

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

    at_a_time = len(rows) if limit is None else max(1, limit // len(outputs))
    if at_a_time >= len(rows):
        return jax.vmap(push)(rows)
    return lax.map(push, rows, batch_size=at_a_time)


def pullbacks_of(
    units: Sequence[Unit], params: Tree, twins: Tree | None, mstate: Tree, x: Tree
) -> tuple[Array, list[Pullback]]:
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
