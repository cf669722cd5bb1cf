"""Theorems of the tangent projections over tall, square, batched and drawn inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stiefel_cases import SHAPES, normal, orthonormal

from ssa_jax import transforms
from ssa_jax.factors import linalg, polar, retractions

METRICS = ["stiefel", "horizontal"]


def inner(a, b):
    return np.sum(np.asarray(a, np.float64) * np.asarray(b, np.float64))


def check_projection(metric, x, g, h):
    project = retractions.PROJECTIONS[metric]
    xi, eta = project(x, g), project(x, h)
    scale = 1e-5 * (1 + float(jnp.linalg.norm(g) * jnp.linalg.norm(h)))
    np.testing.assert_allclose(project(x, xi), xi, atol=scale)
    assert abs(inner(xi, h) - inner(g, eta)) < scale
    np.testing.assert_allclose(linalg.sym(x.mT @ xi), 0, atol=scale)
    if metric == "horizontal":
        np.testing.assert_allclose(x.mT @ xi, 0, atol=scale)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("metric", METRICS)
def test_idempotent_self_adjoint_and_tangent(metric, shape):
    rng = np.random.default_rng(1)
    x = orthonormal(rng, shape)
    check_projection(metric, x, normal(rng, shape), normal(rng, shape))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    r=st.integers(1, 4),
    extra=st.integers(0, 3),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_idempotent_self_adjoint_and_tangent_for_drawn_inputs(r, extra, scale, seed):
    rng = np.random.default_rng(seed)
    shape = (r + extra, r)
    x = orthonormal(rng, shape)
    for metric in METRICS:
        check_projection(metric, x, scale * normal(rng, shape), normal(rng, shape))


def test_stiefel_projection_is_the_nearest_tangent_vector():
    rng = np.random.default_rng(2)
    x, g = orthonormal(rng, (6, 3)), normal(rng, (6, 3))
    xi = retractions.project_stiefel(x, g)
    other = retractions.project_stiefel(x, normal(rng, (6, 3)))
    assert abs(inner(g - xi, other)) < 1e-5


def test_horizontal_projection_is_zero_for_a_square_matrix():
    rng = np.random.default_rng(3)
    x = orthonormal(rng, (5, 5))
    np.testing.assert_allclose(retractions.project_horizontal(x, normal(rng, (5, 5))), 0, atol=1e-5)


def test_transform_agrees_with_the_formula_for_rows_and_stacks():
    rng = np.random.default_rng(4)
    x, g = orthonormal(rng, (2, 6, 3)), normal(rng, (2, 6, 3))
    expected = np.stack([retractions.project_stiefel(a, b) for a, b in zip(x, g, strict=True)])
    tall = transforms.project_to_tangent(mask="columns")
    wide = transforms.project_to_tangent(mask="rows")
    np.testing.assert_allclose(tall.update(g, tall.init(x), x)[0], expected, atol=1e-6)
    turned = wide.update(g.mT, wide.init(x.mT), x.mT)[0]
    np.testing.assert_allclose(turned.mT, expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(9, 4), (6, 6)])
def test_agrees_with_geoopt(shape):
    torch = pytest.importorskip("torch")
    geoopt = pytest.importorskip("geoopt")
    rng = np.random.default_rng(5)
    x, g = orthonormal(rng, shape), normal(rng, shape)
    peer = geoopt.Stiefel(canonical=False).egrad2rgrad(
        torch.tensor(np.asarray(x)), torch.tensor(np.asarray(g))
    )
    np.testing.assert_allclose(retractions.project_stiefel(x, g), peer.numpy(), atol=1e-5)


def test_projection_differentiates_the_polar_factor():
    rng = np.random.default_rng(6)
    x, g = orthonormal(rng, (6, 3)), normal(rng, (6, 3))
    with jax.enable_x64(True):
        x64, g64 = jnp.asarray(x, jnp.float64), jnp.asarray(g, jnp.float64)
        x64 = polar.orthonormalize(x64)
        h = 1e-5
        slope = (polar.orthonormalize(x64 + h * g64) - polar.orthonormalize(x64 - h * g64)) / (
            2 * h
        )
        np.testing.assert_allclose(slope, retractions.project_stiefel(x64, g64), atol=1e-8)
