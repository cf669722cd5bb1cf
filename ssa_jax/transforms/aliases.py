"""Whole chains under short names."""

from typing import Any

import optax

from ssa_jax.transforms.clipping import clip_by_rms
from ssa_jax.transforms.manifold import project_to_tangent, retract
from ssa_jax.transforms.optimizers import scale_by_stiefel_muon, trace
from ssa_jax.transforms.penalties import ScalarOrSchedule, add_hoyer
from ssa_jax.transforms.riemannian_adam import scale_by_riemannian_adam
from ssa_jax.transforms.selection import Mask
from ssa_jax.transforms.spectrum import Target, truncate_rank


def stiefel_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    nesterov: bool = False,
    *,
    metric: str = "stiefel",
    retraction: str = "series",
    every: int = 1,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian gradient descent: x <- R_x(-η P_x(g)), with tangent momentum if asked for.

    `project_to_tangent` or `trace`, then the learning rate, then `retract`; plain SGD on the
    leaves that are not orthonormal.

    Args:
      learning_rate: η, a number or a schedule.
      momentum: decay of `trace`; None for none.
      nesterov: whether `trace` looks ahead.
      metric: a name in `retractions.PROJECTIONS`.
      retraction: a name in `retractions.RETRACTIONS`.
      every: retract in every k-th step only.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown name or a value out of range; a leaf that does not fit its label.

    References:
      Absil, Mahony & Sepulchre, Optimization algorithms on matrix manifolds, 2008.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> a, x = jnp.diag(jnp.array([3.0, 2.0, 1.0])), jnp.full((3, 1), 3**-0.5)
    >>> sgd = stiefel_sgd(0.2, mask=True)
    >>> state, update = sgd.init(x), jax.jit(sgd.update)
    >>> for _ in range(60):
    ...     u, state = update(-2 * a @ x, state, x)  # the gradient of -tr(xᵀ a x)
    ...     x = optax.apply_updates(x, u)
    >>> print(jnp.abs(x[:, 0]).round(3))
    [1. 0. 0.]
    """
    direction = (
        project_to_tangent(metric, mask=mask)
        if momentum is None
        else trace(momentum, nesterov, metric, mask=mask)
    )
    return optax.chain(
        direction,
        optax.scale_by_learning_rate(learning_rate),
        retract(retraction, every, mask=mask),
    )


def stiefel_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    second_moment: str = "elementwise",
    *,
    metric: str = "stiefel",
    retraction: str = "series",
    every: int = 1,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Riemannian Adam: x <- R_x(-η P_x(μ̂ / (√ν̂ + ε))), plain Adam on the other leaves.

    `scale_by_riemannian_adam`, then the learning rate, then `retract`.

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: ε.
      second_moment: ``elementwise``, ``column`` or ``matrix``.
      metric: a name in `retractions.PROJECTIONS`.
      retraction: a name in `retractions.RETRACTIONS`.
      every: retract in every k-th step only.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown name or a value out of range; a leaf that does not fit its label.

    References:
      Bécigneul & Ganea, Riemannian adaptive optimization methods, 2019.

    >>> import jax.numpy as jnp
    >>> x = {"q": jnp.eye(4, 2), "bias": jnp.zeros(2)}
    >>> adam = stiefel_adam(0.1, mask={"q": "columns"})
    >>> u, state = adam.update({"q": jnp.ones((4, 2)), "bias": jnp.ones(2)}, adam.init(x), x)
    >>> y = optax.apply_updates(x, u)
    >>> print(jnp.abs(y["q"].T @ y["q"]).round(3), y["bias"].round(3))
    [[1. 0.]
     [0. 1.]] [-0.1 -0.1]
    """
    return optax.chain(
        scale_by_riemannian_adam(b1, b2, eps, second_moment, metric, mask=mask),
        optax.scale_by_learning_rate(learning_rate),
        retract(retraction, every, mask=mask),
    )


def stiefel_muon(
    learning_rate: optax.ScalarOrSchedule,
    decay: float = 0.95,
    nesterov: bool = True,
    *,
    metric: str = "stiefel",
    retraction: str = "series",
    every: int = 1,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon on the Stiefel manifold: x <- R_x(-η P_x(msign(m))).

    `scale_by_stiefel_muon`, then the learning rate, then `retract`; plain momentum on the
    leaves that are not orthonormal.

    Args:
      learning_rate: η, about the largest angle in radians that a step turns a column by.
      decay: decay of the momentum m.
      nesterov: whether the momentum looks ahead.
      metric: a name in `retractions.PROJECTIONS`.
      retraction: a name in `retractions.RETRACTIONS`.
      every: retract in every k-th step only.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown name or a value out of range; a leaf that does not fit its label.

    References:
      Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.

    >>> import jax.numpy as jnp
    >>> x = jnp.eye(4, 2)
    >>> muon = stiefel_muon(0.1, mask=True)
    >>> u, state = muon.update(jnp.ones((4, 2)), muon.init(x), x)
    >>> bool(jnp.linalg.norm(u, 2) < 0.13)
    True
    """
    return optax.chain(
        scale_by_stiefel_muon(decay, nesterov, metric=metric, mask=mask),
        optax.scale_by_learning_rate(learning_rate),
        retract(retraction, every, mask=mask),
    )


def ssa(
    learning_rate: optax.ScalarOrSchedule,
    *,
    optimizer: optax.GradientTransformation | None = None,
    hoyer: ScalarOrSchedule = 0.0,
    clip: float = 1.0,
    target: Target = 1.0,
    floor: float = 0.3,
    truncate_every: int = 1,
    least_rank: int = 1,
    metric: str = "stiefel",
    retraction: str = "series",
    retract_every: int = 1,
    mask: Mask | None = None,
    rank_mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Hoyer -> clip -> tangent -> Adam or momentum -> tangent -> rate -> truncate -> retract.

    The chain of SSA (arXiv 2510.25594) for trees with `Factors`. Projected before the adaptive
    step, so that its moments see tangent gradients, and after it, since an elementwise
    rescaling leaves the tangent space: by a link of its own where the retraction does not
    do that, as ``series`` does. Truncation changes s alone, so the retraction of U
    and V may follow it.

    Args:
      learning_rate: a number or a schedule.
      optimizer: the adaptive step, without a learning rate; `optax.scale_by_adam` by default.
      hoyer: weight of `add_hoyer`, a number or a schedule; of the number 0 the link is left out.
      clip: largest RMS of one gradient array; local, unlike a global norm.
      target: of `truncate_rank`; 1 keeps every rank, and the link is left out.
      floor: lowest rank of the energy rule, as a fraction of the initial one.
      truncate_every: period of the energy rule in steps.
      least_rank: no rank goes below this number.
      metric: a name in `retractions.PROJECTIONS`.
      retraction: a name in `retractions.RETRACTIONS`.
      retract_every: steps between retractions.
      mask: which leaves outside `Factors` are orthonormal too, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.
      rank_mask: False at a `Factors` leaves its spectrum to the gradient: no Hoyer term and no
        truncation; `mask` where it is None.

    Raises:
      ValueError: an unknown name or a value out of range; a leaf that does not fit its label.

    References:
      SVD-Space Alignment, arXiv 2510.25594.

    >>> import jax.numpy as jnp
    >>> from ssa_jax.factors import Factors
    >>> f = Factors(jnp.eye(4, 3), jnp.array([3.0, 2.0, 0.1]), jnp.eye(5, 3))
    >>> chain = ssa(1e-2, target=0.95)
    >>> u, state = chain.update(Factors(*(jnp.ones_like(x) for x in f)), chain.init(f), f)
    >>> print(optax.apply_updates(f, u).s.round(2))
    [2.99 1.99 0.  ]
    """
    tangent = project_to_tangent(metric, mask=mask)
    rank_mask = mask if rank_mask is None else rank_mask
    keeps_ranks = isinstance(target, int | float) and target == 1
    # This retraction takes out itself what is not tangent.
    projects = retraction == "series" and retract_every == 1 and metric == "stiefel"
    sparse = not (isinstance(hoyer, int | float) and hoyer == 0)
    # Made in any case, so that a wrong floor is always refused.
    truncation = truncate_rank(target, floor, truncate_every, least_rank, mask=rank_mask)
    links: list[Any] = [
        *([add_hoyer(hoyer, mask=rank_mask)] if sparse else []),
        clip_by_rms(clip),
        tangent,
        optax.scale_by_adam() if optimizer is None else optimizer,
        *([] if projects else [tangent]),
        optax.scale_by_learning_rate(learning_rate),
        *([] if keeps_ranks else [truncation]),
        retract(retraction, retract_every, mask=mask),
    ]
    return optax.chain(*links)
