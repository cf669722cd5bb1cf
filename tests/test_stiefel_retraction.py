"""Theorems of the retractions: they land, agree to first order, and survive any step."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import first
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from stiefel_cases import RETRACTIONS, SHAPES, drift, normal, orthonormal

from ssa_jax import factors, transforms
from ssa_jax.factors import linalg, polar, retractions
from ssa_jax.transforms.mapping import common_shapes

COMPILED = {name: jax.jit(retractions.RETRACTIONS[name]) for name in RETRACTIONS}


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", RETRACTIONS)
def test_lands_on_the_manifold_from_a_tangent_step_of_any_size(name, shape, size):
    rng = np.random.default_rng(1)
    x = orthonormal(rng, shape)
    xi = retractions.project_stiefel(x, size * normal(rng, shape))
    assert drift(COMPILED[name](x, xi)) < 1e-6


@pytest.mark.parametrize("name", RETRACTIONS)
def test_lands_on_the_manifold_at_the_size_of_a_layer(name):
    rng = np.random.default_rng(2)
    x = orthonormal(rng, (576, 64))
    xi = retractions.project_stiefel(x, 0.1 * normal(rng, x.shape))
    assert drift(COMPILED[name](x, xi)) < 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(RETRACTIONS),
    shape=st.sampled_from([(4, 2), (5, 5), (2, 6, 3), (7, 1)]),
    size=st.floats(1e-6, 1e4),
    seed=st.integers(0, 2**31),
)
def test_lands_on_the_manifold_for_drawn_steps(name, shape, size, seed):
    rng = np.random.default_rng(seed)
    x = orthonormal(rng, shape)
    xi = retractions.project_stiefel(x, size * normal(rng, shape))
    assert drift(COMPILED[name](x, xi)) < 1e-6


@pytest.mark.parametrize("shape", [(9, 4), (6, 6), (3, 7, 2)])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_agrees_with_the_identity_to_first_order(name, shape):
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        retraction = retractions.RETRACTIONS[name]
        x = polar.orthonormalize(orthonormal(rng, shape, jnp.float64))
        xi = retractions.project_stiefel(x, normal(rng, shape, jnp.float64))
        np.testing.assert_allclose(retraction(x, 0 * xi), x, atol=1e-14)
        errors = [np.abs(retraction(x, h * xi) - x - h * xi).max() for h in (1e-3, 1e-4)]
    # Second order in the step: a tenth of it leaves a hundredth of the error.
    assert errors[0] < 1e-4
    assert errors[1] < 0.011 * errors[0]


@pytest.mark.parametrize("name", ["newton_schulz", "polar"])
def test_polar_retractions_give_the_nearest_orthonormal_matrix(name):
    rng = np.random.default_rng(4)
    x, xi = orthonormal(rng, (8, 3)), 2 * normal(rng, (8, 3))
    u, _, vt = np.linalg.svd(np.asarray(x + xi, np.float64), full_matrices=False)
    np.testing.assert_allclose(COMPILED[name](x, xi), u @ vt, atol=2e-6)


@pytest.mark.parametrize("name", ["qr", "cholesky_qr2"])
def test_qr_retractions_agree_with_geoopt(name):
    torch = pytest.importorskip("torch")
    geoopt = pytest.importorskip("geoopt")
    rng = np.random.default_rng(5)
    x = orthonormal(rng, (9, 4))
    xi = retractions.project_stiefel(x, normal(rng, (9, 4)))
    peer = geoopt.Stiefel(canonical=False).retr(
        torch.tensor(np.asarray(x)), torch.tensor(np.asarray(xi))
    )
    np.testing.assert_allclose(COMPILED[name](x, xi), peer.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["newton_schulz", "cholesky_qr2", "qr", "polar"])
@pytest.mark.parametrize("start", [1e-4, 1e4, "ill-conditioned", "rank-deficient", "huge"])
def test_lands_from_far_outside_the_tangent_space(name, start):
    rng = np.random.default_rng(6)
    y = np.array(normal(rng, (8, 3)))
    if start == "ill-conditioned":
        y = y * np.array([1.0, 1e-3, 1e-6], np.float32)
    elif start == "rank-deficient":
        y[:, 2] = y[:, 1]
    elif start == "huge":
        y = y * np.float32(1e25)
    else:
        y = y * np.float32(start)
    landed = COMPILED[name](jnp.zeros((8, 3)), jnp.asarray(y))
    assert drift(landed) < 1e-6


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rank", [0, 1, 3, 5])
def test_a_matrix_without_full_rank_is_completed(dtype, rank):
    """Its own directions stay: the completed Q holds the polar factor of Y on the span of Yᵀ."""
    with jax.enable_x64(dtype == jnp.float64):
        rng = np.random.default_rng(rank)
        y = rng.normal(size=(40, rank)) @ rng.normal(size=(rank, 6))
        q = polar.orthonormalize(jnp.asarray(y, dtype))
        assert drift(q) < 1e-6
        u, _, vt = np.linalg.svd(y, full_matrices=False)
        v = vt[:rank].T
        np.testing.assert_allclose(q @ v, u[:, :rank], atol=1e-5)


@pytest.mark.parametrize("name", first(RETRACTIONS, 2))
def test_retractions_have_a_derivative_in_both_modes(name):
    with jax.enable_x64(True):
        rng = np.random.default_rng(5)
        x = polar.orthonormalize(jnp.asarray(rng.normal(size=(2, 7, 3))))
        xi = jnp.asarray(0.3 * rng.normal(size=x.shape))
        check_grads(retractions.RETRACTIONS[name], (x, xi), order=1, modes=["fwd", "rev"])


def test_the_polar_factor_has_second_derivatives():
    with jax.enable_x64(True):
        y = jnp.asarray(np.random.default_rng(6).normal(size=(6, 3)))
        check_grads(polar.orthonormalize, (y,), order=2, modes=["fwd"])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_the_polar_factor_does_not_depend_on_the_scale(scale):
    y = normal(np.random.default_rng(7), (20, 4))
    np.testing.assert_allclose(polar.orthonormalize(y * scale), polar.orthonormalize(y), atol=1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 1e4, 1e14])
@pytest.mark.parametrize("shape", [(40, 8), (6, 6), (3, 30, 5)])
def test_a_series_is_the_polar_factor_of_the_tangent_part_shortened_if_need_be(shape, size):
    rng = np.random.default_rng(11)
    x = orthonormal(rng, shape)
    step = normal(rng, shape)
    step *= size / np.linalg.norm(step, 2, axis=(-2, -1)).max()
    landed = COMPILED["series"](x, step)
    assert drift(landed) < 1e-6
    # It lies on the curve through x along the tangent part: some length of it gives the same.
    tangent = np.asarray(retractions.project_stiefel(x, step / size), np.float64)

    def at(length):
        u, _, vt = np.linalg.svd(np.asarray(x, np.float64) + length * tangent, full_matrices=False)
        return u @ vt

    tall = np.asarray(landed, np.float64)
    if size <= 0.1:
        np.testing.assert_allclose(tall, at(size), atol=1e-6)
    elif len(shape) == 2:
        assert min(np.abs(at(length) - tall).max() for length in np.linspace(0, 1, 1001)) < 1e-3


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("least", "most", "left"), [(-0.12, 0, 1.5e-7), (0, 0.02, 6e-13), (0, 0.12, 1.6e-7)]
)
def test_the_series_is_an_inverse_root_as_far_as_it_says(least, most, left, platform):
    with jax.enable_x64(True), linalg.traced_for(platform):
        e = np.linspace(least, most, 10_001)
        p = np.asarray(polar.inverse_root_series(jnp.asarray(e)[:, None, None]))[:, 0, 0]
        residual = np.abs((1 - e) * (1 + p) ** 2 - 1).max()
        assert left / 2 < residual < left


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_the_series_keeps_what_does_not_move(platform):
    # Without a step nothing moves, not by a rounding error that thousands of steps would add up.
    with linalg.traced_for(platform):
        still = polar.inverse_root_series(jnp.zeros((3, 5, 5), jnp.float32))
        assert (np.asarray(still) == 0).all()
        assert str(jax.make_jaxpr(polar.inverse_root_series)(still)).count("dot_general[") == 3


@pytest.mark.parametrize("size", [1e20, 3e38])
def test_a_series_lands_for_a_step_that_is_too_long_to_be_squared(size):
    rng = np.random.default_rng(11)
    x = orthonormal(rng, (40, 8))
    landed = COMPILED["series"](x, np.float32(size) * np.clip(normal(rng, (40, 8)), -1, 1))
    assert drift(landed) < 1e-6
    assert np.abs(landed - x).max() > 1e-2


def test_a_series_takes_back_a_drift():
    rng = np.random.default_rng(12)
    x = np.float32(1.3) * orthonormal(rng, (30, 6)) + np.float32(0.05) * normal(rng, (30, 6))
    drifts = [drift(x)]
    for _ in range(12):
        x = COMPILED["series"](x, jnp.zeros_like(x))
        drifts.append(drift(x))
    assert drifts[0] > 0.5
    assert all(b < a for a, b in itertools.pairwise(drifts[:4]))
    assert drifts[-1] < 1e-6


@pytest.mark.parametrize("name", ["series", "newton_schulz"])
def test_products_alone_show_a_nan(name):
    x = orthonormal(np.random.default_rng(13), (4, 2))
    assert np.isnan(COMPILED[name](x, jnp.ones((4, 2)).at[0, 0].set(jnp.nan))).any()


def lowered_chain(shapes, platform="cpu"):
    """The default chain for factors of these (m, n, r), as a platform's compiler gets it."""
    params = {
        str(i): factors.Factors(jnp.eye(m, r), jnp.ones(r), jnp.eye(n, r))
        for i, (m, n, r) in enumerate(shapes)
    }
    chain = transforms.ssa(1e-3)
    with linalg.traced_for(platform):
        traced = jax.jit(chain.update).trace(params, chain.init(params), params)
        return traced.lower(lowering_platforms=(platform,))


def test_the_default_chain_compiles_to_neither_loop_nor_conditional():
    program = lowered_chain([(12, 20, 4)] * 10).compile().as_text()
    assert "fusion" in program
    assert " while(" not in program
    assert " conditional(" not in program


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_ten_layers_of_one_shape_take_as_many_products_as_one(platform):
    ten, one = (lowered_chain([(12, 20, 4)] * n, platform).as_text() for n in (10, 1))
    assert "while" not in ten
    assert 0 < ten.count("dot_general") == one.count("dot_general")


def test_on_accelerators_nearly_equal_shapes_share_their_products():
    """Small matrices of every shape are brought to one; on a CPU each shape has its own."""
    shapes = [(12, 20, 4), (30, 16, 5), (9, 9, 3)]
    one = lowered_chain([(30, 30, 5)], "cuda").as_text().count("dot_general")
    assert lowered_chain(shapes, "cuda").as_text().count("dot_general") == one
    assert lowered_chain(shapes, "cpu").as_text().count("dot_general") > 4 * one


@pytest.mark.parametrize("name", ["project_stiefel", "project_horizontal", "retract_series"])
def test_rows_and_columns_of_zeros_stay_zeros_and_change_nothing_else(name):
    fn = getattr(retractions, name)
    rng = np.random.default_rng(3)
    x, g = orthonormal(rng, (2, 9, 4)), 0.3 * normal(rng, (2, 9, 4))
    wide = [jnp.pad(a, [(0, 0), (0, 3), (0, 2)]) for a in (x, g)]
    done = np.asarray(jax.jit(fn)(*wide))
    np.testing.assert_allclose(done[:, :9, :4], fn(x, g), rtol=0, atol=1e-6)
    assert not done[:, 9:].any()
    assert not done[:, :, 4:].any()


def test_common_shapes_hold_what_they_stand_for_and_padding_pays():
    large = [(4096, 512)] * 3
    shapes = [(96, 16), (80, 32), *large, (16, 96)]
    common = common_shapes(shapes)
    assert all(
        c >= s
        for new, old in zip(common, shapes, strict=True)
        for c, s in zip(new, old, strict=True)
    )
    assert common[2:5] == large
    assert len(set(common)) == 2
    # Stacks of stacks are of their own kind.
    assert common_shapes([(2, 8, 4), (8, 4), (9, 4)]) == [(2, 8, 4), (9, 4), (9, 4)]


def test_small_steps_take_one_iteration(monkeypatch):
    """As training takes them: a loop that may run but once ends at the same digits."""
    rng = np.random.default_rng(8)
    x = orthonormal(rng, (64, 8))
    xi = retractions.project_stiefel(x, 0.01 * normal(rng, x.shape))
    landed = polar.orthonormalize(x + xi)
    far = polar.orthonormalize(x + 10 * xi)
    monkeypatch.setattr(polar, "_MOST_STEPS", 1)
    jax.clear_caches()
    assert drift(landed) < 1e-6
    assert np.abs(landed - polar.orthonormalize(x + xi)).max() == 0
    assert np.abs(far - polar.orthonormalize(x + 10 * xi)).max() > 0
    jax.clear_caches()


@pytest.mark.parametrize("name", RETRACTIONS)
def test_ten_thousand_large_steps_stay_on_the_manifold(name):
    rng = np.random.default_rng(9)
    x = {"tall": orthonormal(rng, (6, 3)), "stack": orthonormal(rng, (2, 4, 2))}
    pull = jax.tree.map(lambda a: normal(rng, a.shape), x)
    chain = transforms.stiefel_sgd(5.0, 0.9, retraction=name, mask=True)

    def step(carry, i):
        x, state = carry
        g = jax.tree.map(lambda p, a: p * jnp.cos(i.astype(jnp.float32) + a), pull, x)
        u, state = chain.update(g, state, x)
        x = optax.apply_updates(x, u)
        return (x, state), jax.tree.map(linalg.orthogonality_error, x)

    (x, _), errors = jax.jit(lambda x: jax.lax.scan(step, (x, chain.init(x)), jnp.arange(10_000)))(
        x
    )
    for leaf in jax.tree.leaves((x, errors)):
        assert np.isfinite(leaf).all()
    assert max(drift(leaf) for leaf in jax.tree.leaves(x)) < 1e-6
    assert max(np.max(e) for e in jax.tree.leaves(errors)) < 2e-6


@pytest.mark.long
@pytest.mark.parametrize("name", ["qr", "cholesky_qr2", "polar", "cayley"])
def test_stacked_factorisations_do_not_block_one_another(name):
    """Batched factorisations side by side on two threads once hung within some hundred calls."""
    program = f"""
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax
from ssa_jax.factors import linalg, polar, retractions
from ssa_jax.transforms.mapping import common_shapes
retract = retractions.RETRACTIONS[{name!r}]
keys = jax.random.split(jax.random.key(0), 8)
xs = [polar.orthonormalize(jax.random.normal(k, (3, 200, 160))) for k in keys]
step = jax.jit(lambda xs: [retract(x, 0.1 * x) for x in xs])
for _ in range(300):
    xs = jax.block_until_ready(step(xs))
print(max(float(linalg.orthogonality_error(x)) for x in xs))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240, check=True
    )
    assert float(done.stdout) < 1e-6
