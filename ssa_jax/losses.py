"""Output losses, and the local loss of a unit, term by term.

The local loss of unit i with output h, teaching signal δ (constant), parameters W = {U, s, V}
and feedback twin B is (arXiv 2510.25594, section 3; coefficients as in docs/design.md)

    L = α ⟨h, δ⟩ + β (‖U-B_U‖² + ‖s-B_s‖² + ‖V-B_V‖²) + γ (‖UᵀU-I‖² + ‖VᵀV-I‖²) + η ‖s‖₁/‖s‖₂

The task term's gradient is the unit's pullback at δ and the Hoyer term enters through the
optimiser's chain, whose schedule it follows; `regulariser` holds what is differentiated here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssa_jax import factors, linalg

Array = jax.Array
Tree = Any


class LossWeights(NamedTuple):
    """Coefficients of the local loss: task α, alignment β, orthogonality γ."""

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean softmax cross-entropy of logits (batch, classes) and int labels (batch,)."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def output_error(logits: Array, labels: Array) -> tuple[Array, Array]:
    """The loss and its gradient e = (softmax(logits) - onehot)/batch, (batch, classes)."""
    return jax.value_and_grad(cross_entropy)(logits, labels)


def task_term(h: Array, signal: Array) -> Array:
    """⟨h, δ⟩ of a unit's output and its teaching signal, of one shape (batch, ...)."""
    return jnp.vdot(h, signal)


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
    return _total(linalg.hoyer(f.s) for f in factors.leaves(params))


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
        "orthogonality": orthogonality_term(params),
        "hoyer": hoyer_term(params),
    }
    if twins is not None:
        terms["alignment"] = alignment_term(params, twins)
    return terms


def _total(terms: Any) -> Array:
    return sum(terms, start=jnp.float32(0))
