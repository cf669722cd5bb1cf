"""What is measured beside the loss: how the local learning of every unit is doing."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import linalg, retractions
from ssa_jax.methods import Method, chain
from ssa_jax.networks.forward import forward
from ssa_jax.networks.units import Unit
from ssa_jax.training import losses, tasks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.passes import local_gradients
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]
Tree = Any


class Probe(NamedTuple):
    """One look at the local learning of every unit.

    Angles are in degrees, and 90 where one of the two vectors is zero. Ratios are of the local
    length over the true one, and 0 where the true one is zero.

    Attributes:
      angles: (units,) between the local and the true gradient, in factor space: over all
        parameters of the unit as one vector, (U, s, V) of a factorised layer among them.
      weight_angles: (units,) between the first-order changes of the reconstructed weights that
        the two gradients stand for (see `weight_change`).
      signal_angles: (units,) between the teaching signal and the true ∂loss/∂h.
      gradient_ratios: (units,) of the gradients of `angles`.
      signal_ratios: (units,) of the signals of `signal_angles`.
      subspace_angles: one a unit, the mean principal angle between the spans of U and of its
        twin and of V and of its twin; None for a unit without factors or without twins.
      terms: each term of the local loss by name, (units,), without its coefficient.
      drift: largest |XᵀX - I| over all U and V.
      gradient_norm: length of the true gradient on the manifold (see `tangent`), all units
        together.
    """

    angles: Array
    weight_angles: Array
    signal_angles: Array
    gradient_ratios: Array
    signal_ratios: Array
    subspace_angles: tuple[Array | None, ...]
    terms: dict[str, Array]
    drift: Array
    gradient_norm: Array


def make_probe(
    units: Sequence[Unit], method: Method, weights: LossWeights
) -> Callable[[TrainState, Batch], Probe]:
    """The jitted probe of a state on one batch.

    Both gradients are taken at the same parameters, in training mode. The local gradient is
    that of the local loss without the Hoyer term, before the optimiser.
    """

    def probe(state: TrainState, batch: Batch) -> Probe:
        logits, _, tape = forward(units, state.params, state.mstate, batch.images)
        _, error = tasks.output_error(weights.task, logits, batch.labels)
        signals = method.signals(state.feedback, state.params, tape, error, batch)
        twins = method.twins(state.feedback)
        local = local_gradients(state.params, twins, tape, signals, weights)
        true_signals = chain(tape, error)
        true = local_gradients(state.params, None, tape, true_signals, LossWeights())
        local_w, true_w = (
            tuple(map(weight_change, state.params, gradients)) for gradients in (local, true)
        )
        twin_of = [None] * len(units) if twins is None else list(twins)
        terms = [
            losses.local_terms(p, twin, h, signal)
            for p, twin, h, signal in zip(state.params, twin_of, tape.outputs, signals, strict=True)
        ]
        return Probe(
            angles=_each(angle, local, true),
            weight_angles=_each(angle, local_w, true_w),
            signal_angles=_each(angle, signals, true_signals),
            gradient_ratios=_each(ratio, local, true),
            signal_ratios=_each(ratio, signals, true_signals),
            subspace_angles=tuple(map(subspace_angle, state.params, twin_of)),
            terms={name: jnp.stack([t[name] for t in terms]) for name in terms[0]},
            drift=factors.orthogonality_error(state.params),
            gradient_norm=linalg.norm(flatten(tangent(state.params, true))),
        )

    return jax.jit(probe)


def weight_change(params: Tree, direction: Tree) -> Tree:
    """A direction in factor space as the first-order change of the weights.

    dU diag(s) Vᵀ + U diag(ds) Vᵀ + U diag(s) dVᵀ, (d_out, d_in), for every `Factors` node; the
    other arrays as they are.

    Args:
      params: parameter tree of a unit.
      direction: a tree of the same structure.
    """

    def change(f: Any, d: Any) -> Array:
        if not factors.is_factors(f):
            return d
        return (d.u * f.s[None, :] + f.u * d.s[None, :]) @ f.v.T + (f.u * f.s[None, :]) @ d.v.T

    return jax.tree.map(change, params, direction, is_leaf=factors.is_factors)


def tangent(params: Tree, gradient: Tree) -> Tree:
    """The gradient on the product of Stiefel manifolds and Euclidean spaces.

    G - X sym(XᵀG) of U and V, the orthogonal projection onto the tangent space in the embedded
    metric; s and arrays outside `Factors` as they are. Zero where the loss is stationary under
    the constraint, which the gradient itself is not.

    Args:
      params: parameter trees of units, with orthonormal U and V.
      gradient: a tree of the same structure.
    """

    def project(f: Any, g: Any) -> Any:
        if not factors.is_factors(f):
            return g
        u, v = retractions.project_stiefel(f.u, g.u), retractions.project_stiefel(f.v, g.v)
        return g._replace(u=u, v=v)

    return jax.tree.map(project, params, gradient, is_leaf=factors.is_factors)


def subspace_angle(params: Tree, twins: Tree | None) -> Array | None:
    """Mean principal angle in degrees between span(U), span(B_U) and between span(V), span(B_V).

    Over all `Factors` of a unit and those of its twin; None for a unit without factors or without
    a twin. Every stored column counts, also one whose singular value was truncated to zero.
    """
    if twins is None:
        return None
    pairs = zip(factors.leaves(params), factors.leaves(twins), strict=True)
    # Twins that move freely, and weights without retraction, are not orthonormal.
    angles = [
        jnp.mean(linalg.principal_angles(jnp.linalg.qr(x)[0], jnp.linalg.qr(y)[0]))
        for f, twin in pairs
        for x, y in ((f.u, twin.u), (f.v, twin.v))
    ]
    return jnp.mean(jnp.stack(angles)) if angles else None


def angle(a: Tree, b: Tree) -> Array:
    """Angle in degrees between two trees as flat vectors; 90 if one is zero, 0 of empty ones."""
    x, y = flatten(a), flatten(b)
    if not x.size:
        return jnp.zeros(())
    zero = ~(jnp.any(x != 0) & jnp.any(y != 0))
    return jnp.where(zero, 90.0, linalg.angle(x, y))


def ratio(a: Tree, b: Tree) -> Array:
    """‖a‖/‖b‖ of two trees as flat vectors; 0 if b is zero or empty."""
    if not jax.tree.leaves(b):
        return jnp.zeros(())
    over, under = linalg.norm(flatten(a)), linalg.norm(flatten(b))
    return jnp.where(under == 0, 0.0, over / jnp.where(under == 0, 1.0, under))


def flatten(tree: Tree) -> Array:
    """All leaves of a tree as one vector."""
    leaves = [x.ravel() for x in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros(0)


def _each(measure: Callable[[Tree, Tree], Array], a: Sequence[Tree], b: Sequence[Tree]) -> Array:
    return jnp.stack([measure(x, y) for x, y in zip(a, b, strict=True)])


def probe_row(probe: Probe) -> Row:
    """The part of an epoch's row that a probe measured."""
    return {
        "angles": _degrees(probe.angles),
        "weight_angles": _degrees(probe.weight_angles),
        "signal_angles": _degrees(probe.signal_angles),
        "subspace_angles": _degrees(probe.subspace_angles),
        "gradient_ratios": [float(r) for r in probe.gradient_ratios],
        "signal_ratios": [float(r) for r in probe.signal_ratios],
        "drift": float(probe.drift),
        "gradient_norm": float(probe.gradient_norm),
        **{f"local_{k}": [float(x) for x in v] for k, v in probe.terms.items()},
    }


def before(change: str, evaluated: Row) -> Row:
    """What a test measured before the state was changed, under names of its own."""
    names = [name for name in ("test_accuracy", "test_loss") if name in evaluated]
    return {f"{name}_before_{change}": evaluated[name] for name in names}


def _degrees(angles: Iterable[Array | None]) -> list[float | None]:
    return [None if a is None else round(float(a), 3) for a in angles]
