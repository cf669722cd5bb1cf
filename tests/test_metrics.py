"""The probe: angles and lengths of local gradients and signals beside the true ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import NETWORKS, first, make_batch, make_method, split

from ssa_jax import factors
from ssa_jax.factors import Factors
from ssa_jax.training import metrics
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import init_state

# In float32 the arccos of a cosine next to one is right to some hundredths of a degree.
ZERO_DEGREES = 0.1


def probe_of(name, network="conv", rank=0.5, change=lambda method: method, **options):
    units, params, mstate = split(network, rank)
    method = change(make_method(name, units, params, mstate, **options))
    state = init_state(method, optax.sgd(0.1), params, mstate, jax.random.key(0))
    return metrics.make_probe(units, method, LossWeights())(state, make_batch(16))


def scaled(factor):
    """A change of a method: all signals times `factor`."""

    def change(method):
        return method._replace(signals=lambda *a: [factor * d for d in method.signals(*a)])

    return change


def assert_exact(probe):
    for angles in (probe.angles, probe.weight_angles, probe.signal_angles):
        assert float(angles.max()) < ZERO_DEGREES
    for ratios in (probe.gradient_ratios, probe.signal_ratios):
        np.testing.assert_allclose(ratios, 1, rtol=1e-4)


@pytest.mark.parametrize("rank", first([0.5, None], 1))
@pytest.mark.parametrize("network", NETWORKS)
def test_bp_has_no_angle_and_the_right_length(network, rank):
    assert_exact(probe_of("bp", network, rank))


@pytest.mark.parametrize("path", ["composed", "sequential"])
def test_ssa_that_follows_the_weights_is_exact_on_a_linear_network(path):
    assert_exact(probe_of("ssa", "linear", path=path))


def test_hidden_units_of_fixed_twins_are_not_exact_and_the_last_one_is():
    probe = probe_of("ssa", update="fixed")
    for angles in (probe.angles, probe.weight_angles, probe.signal_angles):
        assert float(angles[:-1].min()) > 5
        assert float(angles[-1]) < ZERO_DEGREES


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bp", "dfa"])
def test_longer_signals_change_the_ratios_and_not_the_angles(name):
    one, three = probe_of(name), probe_of(name, change=scaled(3.0))
    for field in ("angles", "weight_angles", "signal_angles"):
        np.testing.assert_allclose(getattr(three, field), getattr(one, field), atol=ZERO_DEGREES)
    for field in ("gradient_ratios", "signal_ratios"):
        np.testing.assert_allclose(getattr(three, field), 3 * getattr(one, field), rtol=1e-4)


def test_no_signal_is_at_right_angles_and_never_nan():
    probe = probe_of("bp", change=scaled(0.0))
    for angles in (probe.angles, probe.weight_angles, probe.signal_angles):
        assert angles.tolist() == [90.0] * 4
    assert probe.gradient_ratios.tolist() == probe.signal_ratios.tolist() == [0.0] * 4
    nothing = {"w": jnp.zeros(3)}
    assert float(metrics.angle(nothing, nothing)) == 90
    assert float(metrics.ratio({"w": jnp.ones(3)}, nothing)) == 0


def random_factors(key, d_out, d_in, rank):
    return factors.from_dense(jax.random.normal(key, (d_out, d_in)), rank)


def test_weight_change_is_the_derivative_of_the_weights():
    f = random_factors(jax.random.key(0), 7, 5, 3)
    keys = jax.random.split(jax.random.key(1), 3)
    d = Factors(*(jax.random.normal(k, x.shape) for k, x in zip(keys, f, strict=True)))
    bias = jnp.arange(7.0)
    change = metrics.weight_change({"kernel": f, "bias": bias}, {"kernel": d, "bias": bias + 1})
    expected = jax.jvp(factors.to_dense, (f,), (d,))[1]
    np.testing.assert_allclose(change["kernel"], expected, rtol=1e-5, atol=1e-5)
    assert jnp.array_equal(change["bias"], bias + 1)


def test_factors_that_turn_together_do_not_change_the_weights():
    f = random_factors(jax.random.key(0), 7, 5, 3)._replace(s=2 * jnp.ones(3))
    turn = jnp.array([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]])
    change = metrics.weight_change(f, Factors(f.u @ turn, jnp.zeros(3), f.v @ turn))
    np.testing.assert_allclose(change, 0, atol=1e-5)


def test_the_gradient_on_the_manifold_is_what_a_curve_on_it_feels():
    f = random_factors(jax.random.key(0), 7, 5, 3)
    keys = jax.random.split(jax.random.key(1), 4)
    g = Factors(*(jax.random.normal(k, x.shape) for k, x in zip(keys[:3], f, strict=True)))
    projected = metrics.tangent({"w": f, "b": g.s}, {"w": g, "b": g.s})
    assert jnp.array_equal(projected["b"], g.s)
    assert jnp.array_equal(projected["w"].s, g.s)
    for x, full, t in ((f.u, g.u, projected["w"].u), (f.v, g.v, projected["w"].v)):
        # Tangent, and all that tangent directions see of the gradient.
        np.testing.assert_allclose(x.T @ t + t.T @ x, 0, atol=1e-5)
        along = jax.random.normal(keys[3], x.shape)
        along = along - x @ (x.T @ along + along.T @ x) / 2
        np.testing.assert_allclose(jnp.vdot(along, t), jnp.vdot(along, full), rtol=1e-4)


def test_the_norm_is_that_of_the_true_gradient_whatever_the_method():
    units, params, mstate = split("linear", None)
    batch = make_batch(16)

    def loss(params):
        x = batch.images
        for unit, p, m in zip(units, params, mstate, strict=True):
            x, _ = unit.apply(p, m, x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch.labels).mean()

    expected = optax.tree.norm(jax.jit(jax.grad(loss))(params))
    norm = probe_of("dfa", "linear", rank=None).gradient_norm
    np.testing.assert_allclose(norm, expected, rtol=1e-4)


@pytest.mark.parametrize("network", ["conv", "residual"])
@pytest.mark.slow
def test_subspaces_of_tracked_twins_are_the_weights_and_of_independent_ones_are_not(network):
    tracked = probe_of("ssa", network, update="tracked").subspace_angles
    fixed = probe_of("ssa", network, update="fixed").subspace_angles
    assert all(float(a) < ZERO_DEGREES for a in tracked[:-1])
    assert all(float(a) > 30 for a in fixed[:-1])
    # The classifier holds no factors.
    assert tracked[-1] is fixed[-1] is None


def test_no_subspaces_without_twins_or_without_factors():
    assert probe_of("bp").subspace_angles == (None,) * 4
    assert probe_of("ssa", rank=None).subspace_angles == (None,) * 4


def test_subspaces_do_not_depend_on_the_basis():
    f = random_factors(jax.random.key(0), 8, 6, 3)
    mixed = f._replace(u=f.u @ jnp.array([[2.0, 1, 0], [0, 1, 5], [0, 0, 3]]))
    assert float(metrics.subspace_angle({"w": f}, {"w": mixed})) < ZERO_DEGREES


def test_of_a_unit_without_parameters_there_is_nothing_to_measure():
    assert float(metrics.angle({}, {})) == float(metrics.ratio({}, {})) == 0
    assert metrics.flatten(({}, {"w": jnp.ones((2, 2))})).shape == (4,)
