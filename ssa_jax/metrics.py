"""What is measured beside the loss: how the local learning of every unit is doing."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors, linalg, losses
from ssa_jax.forward import forward
from ssa_jax.losses import LossWeights
from ssa_jax.methods import Method
from ssa_jax.train import Batch, TrainState, local_gradients, true_gradients
from ssa_jax.units import Unit

Array = jax.Array
Tree = Any


def flatten(tree: Tree) -> Array:
    """All leaves of a tree as one vector."""
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


class Probe(NamedTuple):
    """One look at the local learning of every unit.

    Attributes:
      angles: (units,) degrees between the local and the true gradient.
      terms: each term of the local loss by name, (units,), without its coefficient.
      drift: largest |XᵀX - I| over all U and V.
    """

    angles: Array
    terms: dict[str, Array]
    drift: Array


def make_probe(
    units: Sequence[Unit], method: Method, weights: LossWeights
) -> Callable[[TrainState, Batch], Probe]:
    """The jitted probe of a state on one batch.

    Both gradients are taken at the same parameters, in training mode, over all parameters of
    the unit as one vector; for a factorised unit that is factor space (U, s, V and what
    follows them). The local gradient is that of the local loss without the Hoyer term, before
    the optimiser.
    """

    def probe(state: TrainState, batch: Batch) -> Probe:
        logits, _, tape = forward(units, state.params, state.mstate, batch.images)
        _, error = losses.output_error(logits, batch.labels)
        signals = method.signals(state.feedback, state.params, tape, error, batch)
        twins = method.twins(state.feedback)
        local = local_gradients(state.params, twins, tape, signals, weights)
        true = true_gradients(units, state.params, state.mstate, batch)
        pairs = zip(local, true, strict=True)
        terms = [
            losses.local_terms(p, None if twins is None else twins[i], h, signal)
            for i, (p, h, signal) in enumerate(
                zip(state.params, tape.outputs, signals, strict=True)
            )
        ]
        return Probe(
            angles=jnp.stack([linalg.angle(flatten(a), flatten(b)) for a, b in pairs]),
            terms={name: jnp.stack([t[name] for t in terms]) for name in terms[0]},
            drift=factors.orthogonality_error(state.params),
        )

    return jax.jit(probe)
