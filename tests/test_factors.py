import jax
import jax.numpy as jnp
import pytest

from ssa_jax import factors
from ssa_jax.factors import Factors


def random(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_full_rank_factors_hold_the_matrix():
    w = random(0, (7, 5))
    f = factors.from_dense(w, 5)
    assert jnp.allclose(factors.to_dense(f), w, atol=1e-5)
    assert float(factors.orthogonality_error(f)) < 1e-5


def test_truncation_is_the_best_approximation():
    w = random(1, (9, 6))
    error = jnp.linalg.norm(w - factors.to_dense(factors.from_dense(w, 4)))
    dropped = jnp.linalg.svd(w, compute_uv=False)[4:]
    assert jnp.allclose(error, jnp.linalg.norm(dropped), rtol=1e-4)


def test_rank_fraction_bounds():
    assert factors.rank_of(0.5, 10, 6) == 3
    assert factors.rank_of(0.01, 10, 6) == 1
    for bad in (0, 1.1, -1):
        with pytest.raises(ValueError, match="rank fraction"):
            factors.rank_of(bad, 10, 6)


def test_rank_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        factors.from_dense(random(0, (4, 3)), 4)


def test_maps_reach_factors_and_leave_the_rest():
    f = factors.from_dense(random(2, (4, 3)), 2)
    tree = {"a": {"kernel": f, "bias": jnp.ones(4)}, "b": jnp.zeros(2)}
    doubled = factors.map_factors(lambda x: x._replace(s=2 * x.s), tree)
    assert jnp.array_equal(doubled["a"]["kernel"].s, 2 * f.s)
    assert doubled["a"]["bias"] is tree["a"]["bias"]
    assert list(factors.named_leaves(tree)) == ["a/kernel"]
    assert factors.leaves(tree)[0] is f


def test_factors_are_a_pytree_of_three_arrays():
    f = Factors(jnp.ones((3, 2)), jnp.ones(2), jnp.ones((4, 2)))
    assert f.rank == 2
    assert isinstance(jax.tree.map(jnp.negative, f), Factors)
