"""Factorisations of many matrices, on the CPU one after the other."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ssa_jax.factors.linalg import eye_like

Array = jax.Array


def _one_by_one(factorise: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """A factorisation of (..., n, r) that takes one matrix after the other on the CPU.

    jaxlib splits a batched LAPACK routine over XLA's thread pool and waits for the parts on one
    of its threads; several at once can occupy every thread, and the program hangs (seen with
    jaxlib 0.10.2 on two CPUs within some hundred calls). Elsewhere the batch stays a batch.
    """

    @jax.custom_batching.custom_vmap
    def single(matrix: Array) -> Any:
        return factorise(matrix)

    @single.def_vmap
    def batched(size: int, is_batched: list[bool], matrices: Array) -> tuple[Any, Any]:
        del size, is_batched
        out = jax.lax.platform_dependent(
            matrices, cpu=functools.partial(jax.lax.map, single), default=jax.vmap(factorise)
        )
        return out, jax.tree.map(lambda _: True, out)

    # A rule of batching has no reverse mode, so a derivative is that of the factorisation itself.
    @jax.custom_jvp
    def differentiable(matrix: Array) -> Any:
        return single(matrix)

    @differentiable.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
        return jax.jvp(factorise, primals, tangents)

    def over_leading_axes(matrices: Array) -> Any:
        function: Callable[[Array], Any] = differentiable
        for _ in range(matrices.ndim - 2):
            function = jax.vmap(function)
        return function(matrices)

    return over_leading_axes


qr = _one_by_one(jnp.linalg.qr)
eigh = _one_by_one(jnp.linalg.eigh)


@_one_by_one
def solve(system: Array) -> Array:
    """A⁻¹B (n, m) of the system [A B] (n, n + m)."""
    n = system.shape[0]
    return jnp.linalg.solve(system[:, :n], system[:, n:])


@_one_by_one
def inverse_root(g: Array) -> Array:
    """L⁻ᵀ (r, r) of the Cholesky factorisation G = LLᵀ."""
    lower = jnp.linalg.cholesky(g)
    return jax.scipy.linalg.solve_triangular(lower, eye_like(g), lower=True).mT
