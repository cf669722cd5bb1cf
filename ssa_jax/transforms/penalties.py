"""Optax transformations that add the gradient of a penalty on factors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import linalg, spectra
from ssa_jax.transforms.manifold import choose
from ssa_jax.transforms.mapping import each, map_matrices, map_spectra
from ssa_jax.transforms.selection import (
    SPECTRUM,
    Mask,
    kinds_at_init,
    kinds_of,
    need_params,
    path_name,
    with_params,
)

Array = jax.Array
ScalarOrSchedule = float | Array | Callable[[Array], Array | float]

HOYER_KINDS: dict[str, Callable[[Array], Array]] = {
    "l1_l2": lambda s: jnp.sum(spectra.hoyer(s)),
    "squared": lambda s: jnp.sum(jnp.square(spectra.hoyer(s))),
}


class HoyerState(NamedTuple):
    """Steps done."""

    count: chex.Array


class OrthogonalityPenaltyState(NamedTuple):
    """Steps done."""

    count: chex.Array


class AlignmentState(NamedTuple):
    """Steps done, and the target: a tree of arrays with None where nothing is aligned."""

    count: chex.Array
    target: Any


def _at(weight: ScalarOrSchedule, count: Array) -> Any:
    return weight(count) if callable(weight) else weight


def add_hoyer(
    weight: ScalarOrSchedule, kind: str = "l1_l2", *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds w ∇H(s) to the gradient of the spectrum of every `Factors`.

    ``l1_l2``: H(s) = ‖s‖₁/‖s‖₂ with ∇H = sign(s)/‖s‖₂ - ‖s‖₁ s/‖s‖₂³; ``squared``:
    H(s) = ‖s‖₁²/‖s‖₂². Neither depends on the scale of s: ⟨s, ∇H⟩ = 0, so the term moves
    energy from small to large singular values and leaves its sum.

    Args:
      weight: w, a number or a function of the step count.
      kind: ``l1_l2`` or ``squared``; s has shape (..., r), one spectrum a row.
      mask: False at a `Factors` leaves it out; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: an unknown kind; no params at update; a tree that does not fit the mask.

    References:
      Yang et al., Learning low-rank deep neural networks via singular vector orthogonality
      regularization and singular value sparsification, 2020.
      Yang, Wen & Li, DeepHoyer, 2020.

    >>> import jax.numpy as jnp
    >>> from ssa_jax.factors import Factors
    >>> f = Factors(jnp.eye(3, 2), jnp.array([4.0, 3.0]), jnp.eye(2))
    >>> hoyer = add_hoyer(125.0)
    >>> g, _ = hoyer.update(f._replace(s=jnp.zeros(2)), hoyer.init(f), f)
    >>> print(jnp.rint(g.s))
    [-3.  4.]
    """
    gradient = jax.grad(choose(HOYER_KINDS, kind, "kind of Hoyer term"))

    def init(params: optax.Params) -> HoyerState:
        kinds_at_init("add_hoyer", params, mask, (SPECTRUM,))
        return HoyerState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: HoyerState, params: optax.Params
    ) -> tuple[optax.Updates, HoyerState]:
        w = _at(weight, state.count)
        added = map_spectra(
            lambda s, g: g + w * gradient(s), kinds_of(params, mask), updates, params
        )
        return added, HoyerState(optax.safe_increment(state.count))

    return with_params(init, update)


def add_orthogonality_penalty(
    weight: ScalarOrSchedule, *, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds w ∇‖XᵀX - I‖² = 4w X(XᵀX - I) to the gradient of every orthonormal matrix.

    The soft constraint, for a chain without `retract` or with a rare one. The gradient is
    normal to the manifold and vanishes on it.

    Args:
      weight: w, a number or a function of the step count.
      mask: which leaves outside `Factors` are orthonormal, (..., n, r) by columns or
        (..., r, n) by rows; see `ssa_jax.transforms.selection`.

    Raises:
      ValueError: no params at update; a leaf that does not fit its label.

    References:
      Bansal, Chen & Wang, Can we gain more from orthogonality regularizations, 2018.

    >>> import jax.numpy as jnp
    >>> x = 2 * jnp.eye(3, 2)
    >>> soft = add_orthogonality_penalty(0.5, mask=True)
    >>> g, _ = soft.update(jnp.zeros((3, 2)), soft.init(x), x)
    >>> print(g)
    [[12.  0.]
     [ 0. 12.]
     [ 0.  0.]]
    """

    def init(params: optax.Params) -> OrthogonalityPenaltyState:
        kinds_at_init("add_orthogonality_penalty", params, mask)
        return OrthogonalityPenaltyState(jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: OrthogonalityPenaltyState, params: optax.Params
    ) -> tuple[optax.Updates, OrthogonalityPenaltyState]:
        w = _at(weight, state.count)
        added = map_matrices(
            each(lambda x, g: g + w * linalg.orthogonality_gradient(x)),
            kinds_of(params, mask),
            updates,
            params,
        )
        return added, OrthogonalityPenaltyState(optax.safe_increment(state.count))

    return with_params(init, update)


def add_alignment(
    target: Any = None, weight: ScalarOrSchedule = 1.0
) -> optax.GradientTransformationExtraArgs:
    """Adds w ∇‖p - t‖² = 2w (p - t) to the gradient of every leaf that has a target.

    For factors it is the alignment term ‖U - B_U‖² + ‖s - B_s‖² + ‖V - B_V‖² of SSA. The target
    lives in the state, where `AlignmentState._replace` moves it; or pass it anew with every
    update as the extra argument ``alignment_target``, which wins.

    Args:
      target: t, a tree shaped like the parameters, with None in place of a leaf, a `Factors` or
        a subtree that has none; None altogether if every update brings it.
      weight: w, a number or a function of the step count.

    Raises:
      ValueError: no params, no target at all, or one of another shape, at update.

    References:
      The SSA paper, arXiv 2510.25594.

    >>> import jax.numpy as jnp
    >>> params = {"w": jnp.array([3.0]), "b": jnp.array([1.0])}
    >>> pull = add_alignment({"w": jnp.array([1.0]), "b": None}, weight=0.5)
    >>> g, _ = pull.update({"w": jnp.zeros(1), "b": jnp.zeros(1)}, pull.init(params), params)
    >>> print(g["w"], g["b"])
    [2.] [0.]
    """

    def init(params: optax.Params) -> AlignmentState:
        del params
        # A copy, since donating the state must not delete the caller's arrays.
        held = jax.tree.map(lambda t: jnp.array(t, copy=True), target)
        return AlignmentState(jnp.zeros([], jnp.int32), held)

    def update(
        updates: optax.Updates,
        state: AlignmentState,
        params: optax.Params | None = None,
        *,
        alignment_target: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlignmentState]:
        del extra_args
        need_params(params, updates)
        t = state.target if alignment_target is None else alignment_target
        if t is None:
            raise ValueError("add_alignment needs a target: an argument of its own or of update")
        w = _at(weight, state.count)

        def pull(path: tuple[Any, ...], t: Any, g: Any, p: Any) -> Any:
            if t is None:
                return g
            if t.shape != p.shape:
                raise ValueError(
                    f"{path_name(path)}: a target of shape {t.shape} for a leaf of {p.shape}"
                )
            return (g + 2 * w * (p - t)).astype(g.dtype)

        added = jax.tree_util.tree_map_with_path(
            pull, t, updates, params, is_leaf=lambda x: x is None
        )
        return added, AlignmentState(optax.safe_increment(state.count), state.target)

    return optax.GradientTransformationExtraArgs(init, update)
