"""An optax transformation that shares one budget of rank out among all `Factors`."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import Factors, is_factors
from ssa_jax.transforms.entries import (
    at_factors,
    cut,
    dropped_by,
    keep_largest,
    map_entries,
    spectrum,
)
from ssa_jax.transforms.manifold import check_every, when_due
from ssa_jax.transforms.selection import Mask, compute_dtype, need_params, path_name

Array = jax.Array

# Decay of the running mean of squared gradients, and of the size that a direction once had: a
# direction that came back has some hundred steps to grow before its past stops counting.
GRADIENT_DECAY = 0.95
SIZE_DECAY = 0.99
# Worths are compared as logarithms; this one stands for a worth of zero.
LOWEST_LOG = -200.0


class AdaptState(NamedTuple):
    """What is known of every singular direction.

    All trees are the parameter tree with `Factors(None, x, None)`, x (..., r), at every
    `Factors`, and None elsewhere.

    Attributes:
      count: steps done.
      masks: bool, the directions that are kept.
      sizes: float32, |s|, or what it was of late.
      squares: float32, running mean of (∂L/∂s)².
      dropped: the singular values that this step set to zero, and 0 for the others.
      inner: state of the wrapped transformation.
    """

    count: chex.Array
    masks: Any
    sizes: Any
    squares: Any
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

        w_k = m_k² E[g_k²],   g_k = ∂L/∂s_k = u_kᵀ (∂L/∂W) v_k,

    an estimate of what the loss loses without the direction (its curvature taken as the mean
    of g², as in optimal brain damage and in Fisher pruning), whose scale does not depend on
    that of the weights. E is a running mean, and m_k is |s_k|, or a decaying memory of it, or
    the value it had when it was dropped. g_k is known for dropped directions too, since u_k and
    v_k are still there; one that becomes worth its cost comes back, at zero, so that its return
    does not move the loss, and is dropped again if it does not grow. Layers are compared after
    division by their own total Σ_k w_k, since local gradients of different layers have
    different scales.

    The wrapped chain sees every gradient, and its update of a kept direction is untouched.

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
      LeCun, Denker & Solla, Optimal brain damage, 1990.

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
        at = functools.partial(at_factors, params, mask)
        return AdaptState(
            count=jnp.zeros([], jnp.int32),
            masks=at(lambda f: spectrum(jnp.ones(f.s.shape, bool))),
            sizes=at(lambda f: spectrum(jnp.zeros(f.s.shape, jnp.float32))),
            squares=at(lambda f: spectrum(jnp.zeros(f.s.shape, jnp.float32))),
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
        squares = map_entries(_mean_square, state.squares, updates)
        sizes = map_entries(_size, state.sizes, state.masks, inner_updates, params)

        def choose() -> Any:
            allowed = budget(count) if callable(budget) else budget
            costs = jax.tree_util.tree_map_with_path(
                lambda path, p: cost(path_name(path), p) if is_factors(p) else None,
                params,
                is_leaf=is_factors,
            )
            costs = map_entries(lambda size, c: None if size is None else c, sizes, costs)
            return _choose(sizes, squares, costs, allowed, least)

        chosen = when_due(count, every, choose, lambda: state.masks)
        if until is not None:
            chosen = jax.tree.map(lambda a, b: jnp.where(count <= until, a, b), chosen, state.masks)
        dropped = map_entries(dropped_by, chosen, state.masks, inner_updates, params)
        cut_updates = map_entries(cut, chosen, inner_updates, params)
        return cut_updates, AdaptState(count, chosen, sizes, squares, dropped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _mean_square(mean: Factors | None, gradient: Any) -> Factors | None:
    if mean is None:
        return None
    square = jnp.square(gradient.s.astype(jnp.float32))
    return spectrum(GRADIENT_DECAY * mean.s + (1 - GRADIENT_DECAY) * square)


def _size(size: Factors | None, mask: Any, update: Any, params: Any) -> Factors | None:
    """The larger of |s + update| and what is left of the size; of a dropped one as it was."""
    if size is None:
        return None
    dtype = compute_dtype(params.s, update.s)
    s = jnp.abs(params.s.astype(dtype) + update.s.astype(dtype)).astype(jnp.float32)
    return spectrum(jnp.where(mask.s, jnp.maximum(s, SIZE_DECAY * size.s), size.s))


def _choose(sizes: Any, squares: Any, costs: Any, budget: Any, least: int) -> Any:
    """Masks of the directions that are worth most for their cost and fit the budget."""

    def log_worth(size: Factors | None, square: Any, price: Any) -> Array | None:
        if size is None:
            return None
        worth = jnp.square(size.s) * square.s
        share = worth / jnp.maximum(jnp.sum(worth), jnp.finfo(jnp.float32).tiny)
        kept = keep_largest(share, jnp.ones(share.shape, bool), jnp.int32(least))
        log = jnp.maximum(jnp.log(share / price), LOWEST_LOG)
        return jnp.where(kept, jnp.inf, log)

    logs = map_entries(log_worth, sizes, squares, costs)
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

    low, high = jnp.float32(LOWEST_LOG), jnp.float32(-LOWEST_LOG)
    _, cleared = jax.lax.fori_loop(0, 40, halve, (low, high))
    return jnp.where(spent(low) <= budget, low, cleared)
