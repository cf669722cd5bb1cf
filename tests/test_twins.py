"""Twins: how they are made, how they move, and what they keep of the weights."""

import jax
import jax.numpy as jnp
import pytest
from helpers import max_difference, split

from ssa_jax import factors
from ssa_jax.methods import twins
from ssa_jax.training import losses


def test_twins_are_independent_and_of_the_weights_shape_rank_and_norm():
    _, params, _ = split("conv", 0.5)
    found = twins.init_twins(jax.random.key(3), params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for w, b in zip(factors.leaves(params), factors.leaves(found), strict=True):
        assert [x.shape for x in w] == [x.shape for x in b]
        assert float(jnp.linalg.norm(b.s)) == pytest.approx(float(jnp.linalg.norm(w.s)), rel=1e-5)
        assert float(factors.orthogonality_error(b)) < 1e-5
        cosine = jnp.vdot(factors.to_dense(w), factors.to_dense(b)) / jnp.sum(jnp.square(w.s))
        assert abs(float(cosine)) < 0.6
    again = twins.init_twins(jax.random.key(3), params)
    assert max_difference(found, again) == 0


def test_mutual_twins_close_the_distance_at_their_rate():
    _, params, _ = split("conv", 0.5)
    found = twins.init_twins(jax.random.key(3), params)
    before = losses.alignment_term(params, found)
    after = losses.alignment_term(params, twins.meet(found, params, 0.1))
    assert float(after) == pytest.approx(0.8**2 * float(before), rel=1e-4)


@pytest.mark.parametrize("rank", [None, 0.5])
def test_kolen_pollack_closes_the_difference_at_the_rate_of_its_decay(rank):
    _, params, _ = split("conv", rank)
    found = twins.init_twins(jax.random.key(3), params)
    first = jax.tree.map(lambda b, w: b - w, found, params)
    for i in range(20):
        noise = twins.random_magnitudes(jax.random.key(i), params)
        moved = jax.tree.map(lambda w, n: w + 0.1 * n, params, noise)
        found, params = twins.accompany(found, params, moved, 0.05), moved
    left = jax.tree.map(lambda b, w, d: (b - w) - 0.95**20 * d, found, params, first)
    assert max_difference(left, jax.tree.map(jnp.zeros_like, left)) < 1e-5


@pytest.mark.parametrize("rank", [None, 0.5])
@pytest.mark.parametrize("uniform", [True, False])
def test_sign_concordant_twins_have_the_weights_signs_and_norm(rank, uniform):
    _, params, _ = split("conv", rank)
    if uniform:
        magnitudes = jax.tree.map(jnp.ones_like, params)
    else:
        magnitudes = twins.random_magnitudes(jax.random.key(0), params)
    found = twins.sign_concordant(params, magnitudes)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    kernels = [
        (p[path], b[path])
        for p, b in zip(params, found, strict=True)
        for path in p
        if path.endswith("kernel")
    ]
    assert len(kernels) == 4
    for kernel, twin in kernels:
        for w, b in zip(jax.tree.leaves(kernel), jax.tree.leaves(twin), strict=True):
            assert jnp.array_equal(jnp.sign(b), jnp.sign(w))
            assert float(jnp.linalg.norm(b)) == pytest.approx(float(jnp.linalg.norm(w)), rel=1e-5)
            spread = float(jnp.std(jnp.abs(b)))
            assert spread < 1e-6 if uniform else spread > 1e-3
    assert jnp.array_equal(found[0]["units/0/norm/scale"], params[0]["units/0/norm/scale"])


def test_twins_lose_the_ranks_that_the_weights_lose():
    _, params, _ = split("conv", 0.5)
    found = twins.init_twins(jax.random.key(3), params)
    cut = factors.map_factors(lambda f: f._replace(s=f.s.at[1:].set(0)), params)
    followed = twins.follow_ranks(found, cut)
    for before, after in zip(factors.leaves(found), factors.leaves(followed), strict=True):
        assert jnp.array_equal(after.s != 0, jnp.arange(after.rank) < 1)
        assert after.s[0] == before.s[0]
        assert jnp.array_equal(after.u, before.u)
    assert max_difference(twins.follow_ranks(found, params), found) == 0
    signs = twins.sign_concordant(cut, jax.tree.map(jnp.ones_like, cut))
    assert all(int(jnp.count_nonzero(f.s)) == 1 for f in factors.leaves(signs))
