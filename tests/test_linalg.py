"""Truncated SVD, spectra and angles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_on_an_accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from stiefel_cases import drift, normal, orthonormal

from ssa_jax.factors import linalg, polar, spectra, svd
from ssa_jax.training import losses, metrics


def test_truncated_svd_is_the_best_approximation():
    rng = np.random.default_rng(0)
    w = normal(rng, (9, 6))
    u, s, v = svd.truncated_svd(w, 4)
    assert max(drift(u), drift(v)) < 1e-5
    values = np.linalg.svd(np.asarray(w), compute_uv=False)
    np.testing.assert_allclose(s, values[:4], rtol=1e-5)
    rest = np.linalg.norm(w - (u * s[None, :]) @ v.T)
    np.testing.assert_allclose(rest, np.sqrt(np.sum(values[4:] ** 2)), rtol=1e-5)


def test_randomized_svd_finds_a_decaying_spectrum():
    rng = np.random.default_rng(1)
    left, right = orthonormal(rng, (80, 30)), orthonormal(rng, (60, 30))
    values = 2.0 ** -jnp.arange(30.0)
    w = (left * values[None, :]) @ right.T
    u, s, v = svd.randomized_svd(w, 8, jax.random.key(0))
    np.testing.assert_allclose(s, values[:8], rtol=1e-4)
    assert max(drift(u), drift(v)) < 1e-5
    assert np.linalg.norm(w - (u * s[None, :]) @ v.T, 2) < 1.01 * values[8]


def test_a_large_matrix_needs_a_key_and_takes_the_randomised_way(monkeypatch):
    monkeypatch.setattr(svd, "EXACT_SVD_LIMIT", 10)
    w = normal(np.random.default_rng(2), (8, 6))
    with pytest.raises(ValueError, match="PRNG key"):
        svd.truncated_svd(w, 3)
    _, s, _ = svd.truncated_svd(w, 3, jax.random.key(0))
    np.testing.assert_allclose(s, np.linalg.svd(w, compute_uv=False)[:3], rtol=1e-4)
    with pytest.raises(ValueError, match="rank 7 does not fit"):
        svd.truncated_svd(w, 7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    s=st.lists(st.floats(0.125, 100, width=32), min_size=1, max_size=6),
    scale=st.floats(0.125, 8, width=32),
)
def test_hoyer_ignores_scale_and_lies_between_one_and_the_root_of_r(s, scale):
    s = jnp.asarray(s, jnp.float32)
    h = float(spectra.hoyer(s))
    assert 1 - 1e-5 <= h <= np.sqrt(s.size) * (1 + 1e-5)
    np.testing.assert_allclose(spectra.hoyer(scale * s), h, rtol=1e-5)


def test_hoyer_of_a_zero_spectrum_is_zero_with_a_finite_gradient():
    assert spectra.hoyer(jnp.zeros(3)) == 0
    np.testing.assert_array_equal(jax.grad(spectra.hoyer)(jnp.zeros(3)), 0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    s=st.lists(st.floats(0, 100, width=32), min_size=5, max_size=5),
    energy=st.floats(0, 1, width=32),
)
def test_energy_rank_is_the_smallest_that_suffices(s, energy):
    power = np.sort(np.asarray(s, np.float32) ** 2)[::-1].astype(np.float64)
    k = int(spectra.energy_rank(jnp.asarray(s, jnp.float32), energy))
    slack = 1e-5 * power.sum()
    assert 1 <= k <= 5
    assert power[:k].sum() >= energy * power.sum() - slack
    assert k == 1 or power[: k - 1].sum() <= energy * power.sum() + slack


def test_spectra_may_be_stacked():
    s = jnp.array([[3.0, 0.1, 2.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(spectra.energy_rank(s, 0.95), [2, 3])
    np.testing.assert_allclose(spectra.hoyer(s), [spectra.hoyer(row) for row in s], rtol=1e-6)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_gram_of_a_tall_matrix_is_summed_to_the_last_digit(elsewhere, monkeypatch):
    if elsewhere:
        monkeypatch.setattr(jax.lax, "platform_dependent", as_on_an_accelerator)
    rng = np.random.default_rng(3)
    for n, r in ((255, 16), (256, 16), (2304, 16), (600, 160)):
        x = orthonormal(rng, (n, r))
        exact = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
        # A CPU adds up twice as many rows at once of so many columns.
        bound = 3e-7 if r == 16 or elsewhere else 6e-7
        assert np.abs(linalg.gram(x) - exact).max() < bound


@pytest.mark.parametrize(("platform", "devices", "columns", "products"), [
    ("cpu", 1, 128, 1), ("cpu", 1, 129, 4), ("cpu", 2, 129, 1), ("cuda", 1, 129, 1),
    ("tpu", 1, 129, 1),
])  # fmt: skip
def test_wide_gram_matrices_are_products_of_their_own_on_one_cpu_alone(
    platform, devices, columns, products, monkeypatch
):
    monkeypatch.setattr(linalg, "devices_that_share", lambda: devices)
    traced = jax.jit(lambda x: linalg.gram(x)).trace(jnp.zeros((2, 1000, columns)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert program.count("dot_general") == products


def test_principal_angles_of_a_turned_basis():
    x = jnp.eye(4, 2)
    c, s = np.cos(0.3), np.sin(0.3)
    y = jnp.array([[1, 0], [0, c], [0, s], [0, 0]], jnp.float32)
    np.testing.assert_allclose(linalg.principal_angles(x, y), [0, np.degrees(0.3)], atol=0.05)


def test_msign_keeps_the_singular_vectors_and_nears_one():
    rng = np.random.default_rng(4)
    left, right = orthonormal(rng, (9, 4)), orthonormal(rng, (4, 4))
    m = (left * jnp.array([8.0, 2.0, 0.5, 0.0])[None, :]) @ right.T
    o = left.T @ polar.msign(m) @ right
    values = np.diag(o)
    np.testing.assert_allclose(o, np.diag(values), atol=1e-5)
    assert np.all((values[:3] > 0.65) & (values[:3] < 1.25))
    assert abs(values[3]) < 1e-5
    np.testing.assert_array_equal(polar.msign(jnp.zeros((3, 2))), 0)


SCALES = [1e-37, 1e-30, 1e-20, 1e-15, 1e15, 1e20, 1e30, 1e37]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    "measure",
    [
        lambda x, y: spectra.hoyer(x),
        lambda x, y: spectra.stable_rank(x),
        lambda x, y: spectra.energy_rank(x, 0.9),
        lambda x, y: polar.msign(jnp.stack([x, y], -1)),
        lambda x, y: linalg.angle(x, y),
        lambda x, y: linalg.angle(x, jnp.array([3.0, 1.0, 0.1])),
        lambda x, y: metrics.angle([x], [y]),
        lambda x, y: metrics.ratio([x], [y]),
        lambda x, y: losses.cosine_term(x[None], y[None]),
        lambda x, y: linalg.norm(x) / jnp.max(x),
    ],
)
def test_what_has_no_scale_does_not_see_one(measure, scale):
    x, y = jnp.array([2.0, 1.0, 0.5]), jnp.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(measure(x * scale, y * scale), measure(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", SCALES[:-1])
@pytest.mark.parametrize(
    "measure", [spectra.hoyer, lambda x: losses.cosine_term(x[None], jnp.array([[1.0, 2.0, 0.0]]))]
)
def test_the_gradient_of_what_has_no_scale_falls_with_it(measure, scale):
    """∇f(cx) = ∇f(x)/c for an f without scale, as long as that can be represented."""
    x = jnp.array([2.0, 1.0, 0.5])
    found = np.asarray(jax.grad(measure)(x * scale), np.float64) * scale
    np.testing.assert_allclose(found, jax.grad(measure)(x), rtol=1e-4, atol=1e-6)


def test_of_zeros_nothing_is_infinite():
    zero = jnp.zeros(3)
    assert linalg.norm(zero) == spectra.hoyer(zero) == spectra.stable_rank(zero) == 0
    assert (polar.msign(jnp.zeros((4, 2))) == 0).all()
    assert np.isfinite(jax.grad(lambda x: losses.cosine_term(x[None], x[None]))(zero)).all()
    assert metrics.angle([zero], [zero + 1]) == 90
