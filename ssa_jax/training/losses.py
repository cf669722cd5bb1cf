"""The local loss of a unit, term by term; losses of the outputs are `tasks`.

The local loss of unit i with output h, teaching signal δ (constant), parameters W = {U, s, V}
and feedback twin B is (arXiv 2510.25594, section 3; coefficients as in docs/design.md)

    L = α ⟨h, δ⟩ + κ mean_b cos(h_b, δ_b)
      + β (‖U-B_U‖² + ‖s-B_s‖² + ‖V-B_V‖²) + γ (‖UᵀU-I‖² + ‖VᵀV-I‖²) + η ‖s‖₁/‖s‖₂

The first two terms see the parameters through h alone: their gradient is the unit's pullback at
`cotangent`. The next two are `regulariser`. The Hoyer term enters through the optimiser's chain,
whose schedule it follows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import linalg, spectra
from ssa_jax.training.tasks import CROSS_ENTROPY, Task

Array = jax.Array
Tree = Any


class LossWeights(NamedTuple):
    """The loss of the outputs, and coefficients of the local loss.

    Attributes:
      alpha: α, of the task term.
      beta: β, of the alignment with the twins.
      gamma: γ, of the orthogonality term.
      kappa: κ, of the cosine term; the last unit, whose signal is exact, has none.
      task: the loss of the outputs, whose gradient by them is the error.
    """

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0
    kappa: float = 0.0
    task: Task = CROSS_ENTROPY


def task_term(h: Array, signal: Array) -> Array:
    """⟨h, δ⟩ of a unit's output and its teaching signal, of one shape (batch, ...)."""
    return jnp.vdot(h, signal)


def cosine_term(h: Array, signal: Array) -> Array:
    """Mean over the batch of cos(h_b, δ_b), each example flattened; 0 where either is zero.

    Its descent turns h against its signal, as the task term's does, whatever their lengths.
    """
    h, signal = (linalg.unit_peak(x.reshape(len(x), -1), 1)[0] for x in (h, signal))
    norms = jnp.sum(jnp.square(h), 1) * jnp.sum(jnp.square(signal), 1)
    # Selected before the root, whose derivative at zero is infinite.
    safe = jnp.where(norms > 0, norms, 1)
    return jnp.mean(jnp.where(norms > 0, jnp.sum(h * signal, 1) * jax.lax.rsqrt(safe), 0))


def cotangent(h: Array, signal: Array, weights: LossWeights, *, last: bool) -> Array:
    """∂/∂h of the terms that see the parameters through h: α δ + κ ∂/∂h mean cos(h, δ).

    Args:
      h: the unit's output (batch, ...).
      signal: δ, of its shape.
      weights: α and κ.
      last: whether this is the last unit.
    """
    task = weights.alpha * signal
    if not weights.kappa or last:
        return task
    return task + weights.kappa * jax.grad(cosine_term)(h, signal)


def alignment_term(params: Tree, twins: Tree) -> Array:
    """Σ ‖U-B_U‖² + ‖s-B_s‖² + ‖V-B_V‖² over the `Factors` of a unit and those of its twin."""
    pairs = zip(factors.leaves(params), factors.leaves(twins), strict=True)
    return _total(jnp.sum(jnp.square(a - b)) for w, t in pairs for a, b in zip(w, t, strict=True))


def orthogonality_term(params: Tree) -> Array:
    """Σ ‖UᵀU-I‖² + ‖VᵀV-I‖² over the `Factors` of a unit."""
    return _total(
        jnp.sum(jnp.square(linalg.gram(x) - jnp.eye(x.shape[1], dtype=x.dtype)))
        for f in factors.leaves(params)
        for x in (f.u, f.v)
    )


def hoyer_term(params: Tree) -> Array:
    """Σ ‖s‖₁/‖s‖₂ over the `Factors` of a unit."""
    return _total(spectra.hoyer(f.s) for f in factors.leaves(params))


def regulariser(params: Tree, twins: Tree | None, weights: LossWeights) -> Array:
    """β alignment + γ orthogonality of one unit; no alignment for a method without twins."""
    loss = jnp.float32(0)
    # A product with a zero coefficient would still be computed.
    if weights.gamma:
        loss = loss + weights.gamma * orthogonality_term(params)
    if weights.beta and twins is not None:
        loss = loss + weights.beta * alignment_term(params, twins)
    return loss


def local_terms(params: Tree, twins: Tree | None, h: Array, signal: Array) -> dict[str, Array]:
    """Every term of one unit's local loss by name, without its coefficient."""
    terms = {
        "task": task_term(h, signal),
        "cosine": cosine_term(h, signal),
        "orthogonality": orthogonality_term(params),
        "hoyer": hoyer_term(params),
    }
    if twins is not None:
        terms["alignment"] = alignment_term(params, twins)
    return terms


def _total(terms: Any) -> Array:
    return sum(terms, start=jnp.float32(0))
