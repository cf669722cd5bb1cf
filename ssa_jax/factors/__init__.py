"""The factored weight W = U diag(s) Vᵀ and maps over trees that hold it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.factors import linalg, svd

Array = jax.Array

# Stored ranks are multiples of what the hardware computes anyway: a CPU's vector of float32, a
# tile of a GPU's tensor cores, the lanes of a TPU's matrix unit.
BUCKETS = {"cpu": 8, "gpu": 16, "tpu": 128}
# A change of stored ranks costs a compilation of the step. Share of what is stored that it leaves,
# at most: down to a floor of 0.3 there are three of them, and a last one at the end.
PAYS = 0.7


class Factors(NamedTuple):
    """W = U diag(s) Vᵀ, a pytree of three arrays.

    Attributes:
      u: (d_out, r) float32, orthonormal columns.
      s: (r,) float32.
      v: (d_in, r) float32, orthonormal columns.
    """

    u: Array
    s: Array
    v: Array

    @property
    def rank(self) -> int:
        """Number of stored singular triplets r."""
        return self.s.shape[-1]


class WithFeedback(NamedTuple):
    """Factors of a layer whose input's cotangent passes through few directions alone.

    With δ the cotangent of the layer's output, Uᵀδ scaled by s are r coefficients c along the
    columns of V. Of these pass some, or their part P Pᵀ c in the span of an orthonormal P.

    Attributes:
      weights: the layer's factors; their own gradient is exact.
      passed: places (q,), integers; or P (r, q), whose own cotangent is C P up to a factor, with
        C = Σ c cᵀ over examples and positions. So of P = I all of c passes, and C is told.
    """

    weights: Factors
    passed: Array


def is_factors(node: Any) -> bool:
    """True for a `Factors` node; the `is_leaf` of every map below."""
    return isinstance(node, Factors)


def full_rank(d_out: int, d_in: int) -> int:
    """Largest rank of a (d_out, d_in) matrix."""
    return min(d_out, d_in)


def rank_of(fraction: float, d_out: int, d_in: int) -> int:
    """The rank that is `fraction` of full rank, rounded, at least one.

    Raises:
      ValueError: fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"rank fraction must lie in (0, 1], got {fraction}")
    return max(1, round(fraction * full_rank(d_out, d_in)))


def bucket(rank: int, stored: int, multiple: int | None = None) -> int:
    """The rank rounded up to a multiple of the hardware's, at most what is stored.

    Args:
      rank: to store.
      stored: rank stored now, never exceeded.
      multiple: by default that of the backend in `BUCKETS`; 1 stores exactly the rank.
    """
    if multiple is None:
        multiple = BUCKETS.get(jax.default_backend(), max(BUCKETS.values()))
    return min(-(-rank // multiple) * multiple, stored)


def from_dense(w: Array, rank: int, key: Array | None = None) -> Factors:
    """Best rank-r factors of w (d_out, d_in) by `svd.truncated_svd`, which see for errors."""
    return Factors(*svd.truncated_svd(w, rank, key))


def to_dense(f: Factors) -> Array:
    """U diag(s) Vᵀ, shape (d_out, d_in)."""
    return (f.u * f.s[None, :]) @ f.v.T


def map_factors(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Applies fn to each `Factors` node of a tree (and its peers in `rest`); keeps the others."""
    return jax.tree.map(
        lambda x, *r: fn(x, *r) if is_factors(x) else x, tree, *rest, is_leaf=is_factors
    )


def leading(f: Factors, rank: int) -> Array:
    """Places (rank,) of the singular values of largest modulus, largest first."""
    return jax.lax.top_k(jnp.abs(f.s), rank)[1]


def taken(f: Factors, places: Array) -> Factors:
    """The singular triplets at some places (q,), as factors of rank q."""
    return Factors(f.u[:, places], f.s[places], f.v[:, places])


def narrowed(given: WithFeedback) -> Factors:
    """What the input's cotangent passes through, as factors of rank q."""
    f, passed = given
    if passed.ndim == 1:
        return taken(f, passed)
    ones = jnp.ones(passed.shape[1], f.s.dtype)
    return Factors(f.u @ (f.s[:, None] * passed), ones, f.v @ passed)


def leaves(tree: Any) -> list[Factors]:
    """The `Factors` nodes of a tree, in tree order."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_factors) if is_factors(x)]


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as layers are named, such as ``"0/map/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Factors]:
    """The `Factors` nodes of a tree by their `path_name`."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
    return {path_name(path): x for path, x in nodes if is_factors(x)}


def orthonormalized(f: Factors) -> Factors:
    """The same W with orthonormal U and V again: for factors that have drifted; on the host.

    From U = Q_u R_u and V = Q_v R_v the small matrix R_u diag(s) R_vᵀ = A diag(σ) Bᵀ gives
    W = (Q_u A) diag(σ) (Q_v B)ᵀ, in float64. Triplets keep the place (by magnitude) and the sign of
    the ones they came from, so that what is kept for each entry elsewhere, such as a moment, goes
    on to mean nearly the same. A singular value that was truncated to zero stays zero.

    Args:
      f: of finite entries.
    """
    u, s, v = (np.asarray(x, np.float64) for x in f)
    (q_u, r_u), (q_v, r_v) = np.linalg.qr(u), np.linalg.qr(v)
    a, sigma, bt = np.linalg.svd((r_u * s[None, :]) @ r_v.T)
    # Both spectra fall: the j-th largest of the one takes the place of that of the other.
    place = np.argsort(np.argsort(-np.abs(s), kind="stable"), kind="stable")
    new_u, new_s, new_v = (q_u @ a)[:, place], sigma[place], (q_v @ bt.T)[:, place]
    sign_u, sign_v = (
        np.where(np.sum(x * y, 0) < 0, -1.0, 1.0) for x, y in ((u, new_u), (v, new_v))
    )
    new_s = np.where(s == 0, 0.0, new_s * sign_u * sign_v)
    new = (new_u * sign_u[None, :], new_s, new_v * sign_v[None, :])
    return Factors(*(jnp.asarray(x, old.dtype) for x, old in zip(new, f, strict=True)))


def orthogonality_error(tree: Any) -> Array:
    """Largest `linalg.orthogonality_error` over all U and V of a tree; 0 without factors."""
    errors = [linalg.orthogonality_error(x) for f in leaves(tree) for x in (f.u, f.v)]
    return jnp.max(jnp.stack(errors)) if errors else jnp.float32(0)
