"""What transformations of spectra keep at every `Factors` of a tree, and how they cut."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssa_jax.factors import Factors, is_factors, named_leaves, spectra
from ssa_jax.transforms.mapping import compute_dtype
from ssa_jax.transforms.selection import SPECTRUM, Mask, kinds_at_init, path_name

Array = jax.Array


def keep_largest(s: Array, mask: Array, k: Array) -> Array:
    """Mask (..., r) of the k largest |s| among those `mask` keeps; ties go to the first.

    Args:
      s: (..., r).
      mask: (..., r) bool.
      k: (...,) or a scalar.
    """
    # The dropped ones are zero and come last, so that they never displace a kept one.
    position = jnp.sum(spectra.smaller_than(jnp.where(mask, s, 0)), axis=-2)
    return mask & (position < jnp.broadcast_to(k, s.shape[:-1])[..., None])


def next_spectrum(mask: Factors, update: Any, params: Any) -> Array:
    """Spectrum s (..., r) after the update, zero outside of the mask."""
    dtype = compute_dtype(params.s, update.s)
    return jnp.where(mask.s, params.s.astype(dtype) + update.s.astype(dtype), 0)


def spectrum(s: Any) -> Factors:
    """An entry of a state: something about the spectrum (..., r), and nothing about U and V."""
    return Factors(None, s, None)  # type: ignore[arg-type]


def at_factors(
    name: str, params: optax.Params, mask: Mask | None
) -> Callable[[Callable[[Factors], Any]], Any]:
    """A function of make: the tree with make(f) at every `Factors` of the mask, and None elsewhere.

    Warns in the name of a transformation where there is none.
    """
    kinds = kinds_at_init(name, params, mask, (SPECTRUM,))

    def at(make: Callable[[Factors], Any]) -> Any:
        return jax.tree.map(
            lambda kind, p: make(p) if is_factors(kind) and kind.s == SPECTRUM else None,
            kinds,
            params,
            is_leaf=is_factors,
        )

    return at


def map_entries(fn: Callable[..., Any], *trees: Any) -> Any:
    """Maps fn over trees whose entries are `Factors` or None."""
    return jax.tree.map(fn, *trees, is_leaf=lambda x: x is None or is_factors(x))


def cut(mask: Factors | None, update: Any, params: Any) -> Any:
    """The update that leaves s of the mask as it is and makes s outside of it zero."""
    if mask is None:
        return update
    return update._replace(s=jnp.where(mask.s, update.s, -params.s.astype(update.s.dtype)))


def dropped_by(mask: Factors | None, before: Any, update: Any, params: Any) -> Factors | None:
    """What s + update has of the values (..., r) that leave the mask, and 0 elsewhere."""
    if mask is None:
        return None
    s = (params.s + update.s).astype(params.s.dtype)
    return spectrum(jnp.where(before.s & ~mask.s, s, 0))


def restore_dropped(params: optax.Params, state: optax.OptState) -> optax.Params | None:
    """The parameters as the last step would have left them without its truncation, exactly.

    Truncation changes s alone, and the state of every truncating transformation keeps what it
    zeroed in its last step.

    Args:
      params: after `optax.apply_updates`; s of shape (..., r).
      state: of the chain that made the update, in any of optax's wrappers.

    Returns:
      The parameters, or None where no link of the chain truncates.

    >>> import jax.numpy as jnp
    >>> from ssa_jax.transforms import truncate_rank
    >>> f = Factors(jnp.eye(4, 2), jnp.array([3.0, 0.1]), jnp.eye(2))
    >>> chain = truncate_rank(0.95)
    >>> u, state = chain.update(jax.tree.map(jnp.zeros_like, f), chain.init(f), f)
    >>> print(restore_dropped(optax.apply_updates(f, u), state).s)
    [3.  0.1]
    """
    by_link = [_by_name(x) for _, x in optax.tree.get_all_with_path(state, "dropped")]
    if not any(by_link):
        return None

    def restore(path: tuple[Any, ...], p: Any) -> Any:
        name = path_name(path)
        for dropped in by_link:
            if name in dropped:
                p = p._replace(s=p.s + dropped[name].s)
        return p

    return jax.tree_util.tree_map_with_path(restore, params, is_leaf=is_factors)


def _by_name(tree: Any) -> dict[str, Factors]:
    return {name or path_name(()): f for name, f in named_leaves(tree).items()}
