"""An optax transformation that shares one budget of rank out among all `Factors`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import Factors, is_factors, linalg
from ssa_jax.transforms.entries import (
    at_factors,
    cut,
    dropped_by,
    keep_largest,
    map_entries,
    spectrum,
)
from ssa_jax.transforms.manifold import check_every, when_due
from ssa_jax.transforms.selection import Mask, need_params, path_name

Array = jax.Array

# Decay of what is remembered of a direction: one that came back has some hundred steps to grow
# before its past stops counting, and one that stays away is judged by as many last updates.
DECAY = 0.99
# Worths are compared as logarithms; this one stands for a worth of zero.
LOWEST_LOG = -200.0


class AdaptState(NamedTuple):
    """What is known of every singular direction.

    All trees are the parameter tree with `Factors(None, x, None)`, x (..., r), at every
    `Factors`, and None elsewhere.

    Attributes:
      count: steps done.
      masks: bool, the directions that are kept.
      shadows: float32, s, or of a dropped direction what it would have come to.
      sizes: float32, |shadow|, or what it was of late.
      dropped: the singular values that this step set to zero, and 0 for the others.
      inner: state of the wrapped transformation.
    """

    count: chex.Array
    masks: Any
    shadows: Any
    sizes: Any
    dropped: Any
    inner: optax.OptState


def parameters_of(path: str, f: Factors) -> float:
    """Parameters of one direction: a column of U, one of V, and s."""
    del path
    return f.u.shape[-2] + f.v.shape[-2] + 1


def adapt_rank(
    inner: optax.GradientTransformation,
    budget: float | Array | Callable[[Array], Any],
    cost: Callable[[str, Factors], float] = parameters_of,
    every: int = 10,
    until: int | None = None,
    least: int = 1,
    *,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Wraps a chain, and keeps the singular directions that are worth their cost.

    With c_k the cost of direction k, whatever its layer, and w_k its worth, those with the
    largest w_k / c_k stay whose costs fit the budget together, chosen anew in every k-th step:

        w_k = m_k² / Σ_j m_j²,   the sum over the directions of the same layer.

    m_k is |s_k|, so w_k is the share of the layer's energy ‖W‖² that truncating direction k
    would take, whatever the scale of the layer. Of a dropped direction it is what s_k would
    have come to: from the value it was dropped at, a decaying sum of the updates that the
    wrapped chain makes of ∂L/∂s_k = u_kᵀ (∂L/∂W) v_k, which is known since u_k and v_k are
    still there. A direction that becomes worth its cost comes back, at zero, so that its return
    does not move the loss; it keeps a decaying m_k, and is dropped again if it does not grow.

    The wrapped chain sees every gradient, and its update of a kept direction is untouched. In
    trials worths with gradients, (s_k g_k)² and |s_k g_k|, did no better (docs/research.md).

    Args:
      inner: the whole chain, retraction included: truncation changes s alone.
      budget: sum of the costs of what stays; a number, or a function of the step count after
        this step.
      cost: (path, `Factors`) -> cost of one of its directions; parameters by default.
      every: steps between choices; 1 chooses in each.
      until: no choice is made after this step; None for no end.
      least: of each spectrum s (..., r) so many directions stay whatever they cost.
      mask: False at a `Factors` leaves it whole and out of the budget; see
        `ssa_jax.transforms.selection`.

    Raises:
      ValueError: `every` or `least` below one; no params at update; a tree that does not fit
        the mask.

    References:
      Zhang et al., AdaLoRA: adaptive budget allocation for parameter-efficient fine-tuning, 2023.
      Guo, Yao & Chen, Dynamic network surgery for efficient DNNs, 2016.

    >>> import jax.numpy as jnp
    >>> f = Factors(jnp.eye(4, 3), jnp.array([3.0, 0.1, 2.0]), jnp.eye(3))
    >>> chain = adapt_rank(optax.sgd(0.01), budget=16, every=1)
    >>> g = f._replace(s=jnp.array([1.0, 1.0, -1.0]))
    >>> u, state = chain.update(g, chain.init(f), f)
    >>> print(optax.apply_updates(f, u).s)
    [2.99 0.   2.01]
    """
    check_every(every, "choose ranks")
    if isinstance(least, int) and least < 1:
        raise ValueError(f"least rank must be at least 1, got {least}")
    wrapped = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> AdaptState:
        at = at_factors("adapt_rank", params, mask)
        return AdaptState(
            count=jnp.zeros([], jnp.int32),
            masks=at(lambda f: spectrum(jnp.ones(f.s.shape, bool))),
            shadows=at(lambda f: spectrum(jnp.zeros(f.s.shape, jnp.float32))),
            sizes=at(lambda f: spectrum(jnp.zeros(f.s.shape, jnp.float32))),
            dropped=at(lambda f: spectrum(jnp.zeros(f.s.shape, f.s.dtype))),
            inner=wrapped.init(params),
        )

    def update(
        updates: optax.Updates,
        state: AdaptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptState]:
        need_params(params, updates)
        count = optax.safe_increment(state.count)
        inner_updates, inner_state = wrapped.update(updates, state.inner, params, **extra_args)
        shadows = map_entries(_shadow, state.shadows, state.masks, inner_updates, params)
        sizes = map_entries(_size, state.sizes, state.masks, shadows)

        def choose() -> Any:
            allowed = budget(count) if callable(budget) else budget
            costs = jax.tree_util.tree_map_with_path(
                lambda path, size, p: None if size is None else cost(path_name(path), p),
                sizes,
                params,
                is_leaf=lambda x: x is None or is_factors(x),
            )
            return _choose(sizes, costs, allowed, least)

        def keep() -> Any:
            known = jax.tree.leaves(sizes)
            return jax.tree.map(lambda mask: linalg.varying_as(mask, *known), state.masks)

        chosen = when_due(count, every, choose, keep)
        if until is not None:
            chosen = jax.tree.map(lambda a, b: jnp.where(count <= until, a, b), chosen, state.masks)
        dropped = map_entries(dropped_by, chosen, state.masks, inner_updates, params)
        cut_updates = map_entries(cut, chosen, inner_updates, params)
        return cut_updates, AdaptState(count, chosen, shadows, sizes, dropped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _shadow(shadow: Factors | None, mask: Any, update: Any, params: Any) -> Factors | None:
    """Spectrum after the update; of a dropped direction the decaying sum of its updates."""
    if shadow is None:
        return None
    moved = update.s.astype(jnp.float32)
    s = params.s.astype(jnp.float32)
    return spectrum(jnp.where(mask.s, s, DECAY * shadow.s) + moved)


def _size(size: Factors | None, mask: Any, shadow: Any) -> Factors | None:
    """|shadow|; of a kept direction at least what is left of its former size."""
    if size is None:
        return None
    now = jnp.abs(shadow.s)
    return spectrum(jnp.where(mask.s, jnp.maximum(now, DECAY * size.s), now))


def _choose(sizes: Any, costs: Any, budget: Any, least: int) -> Any:
    """Masks of the directions that are worth most for their cost and fit the budget."""

    def log_worth(size: Factors | None, price: Any) -> Array | None:
        if size is None:
            return None
        worth = jnp.square(linalg.unit_peak(size.s)[0])
        share = worth / jnp.maximum(jnp.sum(worth), 1)
        kept = keep_largest(share, jnp.ones(share.shape, bool), jnp.int32(least))
        log = jnp.maximum(jnp.log(share / price), LOWEST_LOG)
        return jnp.where(kept, jnp.inf, log)

    logs = map_entries(log_worth, sizes, costs)
    price = clearing_price(jax.tree.leaves(logs), jax.tree.leaves(costs), budget)
    return map_entries(lambda x: None if x is None else spectrum(x >= price), logs)


def clearing_price(logs: list[Array], costs: list[float], budget: Any) -> Array:
    """The lowest price at which what is worth it fits the budget.

    By bisection: compares and sums, where a sort would take the compiler a second.

    Args:
      logs: logarithm of worth over cost, (..., r) for each layer; infinite for what must stay.
      costs: of one direction of each layer.
      budget: for the sum of the costs of all whose logarithm is at least the price.
    """

    def spent(price: Array) -> Array:
        kept = (cost * jnp.sum(x >= price) for x, cost in zip(logs, costs, strict=True))
        return sum(kept, jnp.float32(0))

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        fits = spent(middle) <= budget
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    low, high = (linalg.varying_as(jnp.float32(x), *logs) for x in (LOWEST_LOG, -LOWEST_LOG))
    _, cleared = jax.lax.fori_loop(0, 40, halve, (low, high))
    return jnp.where(spent(low) <= budget, low, cleared)
