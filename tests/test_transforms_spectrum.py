"""Truncation of spectra inside the step, and the compaction that follows it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import normal, orthonormal, run

from ssa_jax import ranks, transforms
from ssa_jax.factors import Factors, to_dense


def spectrum(s, n=8):
    s = jnp.asarray(s, jnp.float32)
    return Factors(jnp.eye(n, s.size), s, jnp.eye(n, s.size))


def truncated(chain, f, steps=1):
    f, state, _ = run(chain, f, jax.tree.map(jnp.zeros_like, f), steps)
    return f, state


@pytest.mark.parametrize(
    ("energy", "kept"), [(1.0, 4), (0.999, 3), (0.99, 3), (0.9, 2), (0.5, 1), (0.0, 1)]
)
def test_energy_keeps_the_fewest_values_that_hold_it(energy, kept):
    f, state = truncated(transforms.truncate_rank(energy, floor=0.0), spectrum([0.1, 4, 2, 1]))
    assert np.count_nonzero(f.s) == kept == state.masks.s.sum()
    np.testing.assert_array_equal(f.s[state.masks.s], jnp.array([0.1, 4, 2, 1])[state.masks.s])


def test_the_floor_bounds_the_energy_rule_and_not_the_schedule():
    f, _ = truncated(transforms.truncate_rank(0.1, floor=0.75), spectrum([4, 3, 2, 1]))
    assert np.count_nonzero(f.s) == 3
    f, _ = truncated(
        transforms.truncate_rank(lambda count: 0.5, floor=0.75), spectrum([4, 3, 2, 1])
    )
    assert np.count_nonzero(f.s) == 2


def test_again_and_again_the_energy_rule_stops_at_the_floor():
    f, _ = truncated(
        transforms.truncate_rank(0.8, floor=0.5), spectrum(np.linspace(1, 0.1, 8)), steps=20
    )
    assert np.count_nonzero(f.s) == 4


def test_dropped_values_never_return():
    cut = transforms.truncate_rank(lambda count: (jnp.where(count < 2, 0.5, 1.0), 1.0))
    f = spectrum([4, 3, 2, 1])
    grow = jax.tree.map(jnp.ones_like, f)
    f, state, _ = run(cut, f, grow, steps=5)
    np.testing.assert_array_equal(f.s, [9, 8, 0, 0])
    np.testing.assert_array_equal(state.masks.s, [True, True, False, False])


def kept_in_each_step(cut, f, steps):
    state, kept = cut.init(f), []
    for _ in range(steps):
        u, state = cut.update(jax.tree.map(jnp.zeros_like, f), state, f)
        f = optax.apply_updates(f, u)
        kept.append(int(np.count_nonzero(f.s)))
    return kept


def test_a_falling_rank_is_followed_in_every_step():
    cut = transforms.truncate_rank(lambda count: 1 - count / 8, every=3)
    assert kept_in_each_step(cut, spectrum([4, 3, 2, 1]), 6) == [4, 3, 3, 2, 2, 1]


def test_the_energy_rule_bites_in_the_first_step_of_every_period():
    cut = transforms.truncate_rank(0.8, floor=0.0, every=3)
    equal = spectrum([1, 1, 1, 1, 1, 1, 1, 1])
    assert kept_in_each_step(cut, equal, 8) == [7, 7, 7, 6, 6, 6, 5, 5]


def test_no_rank_goes_below_the_least():
    cut = transforms.truncate_rank(lambda count: (0.1, 0.1), floor=0.0, least=3)
    assert kept_in_each_step(cut, spectrum([4, 3, 2, 1]), 2) == [3, 3]
    assert kept_in_each_step(cut, spectrum([2, 1]), 2) == [2, 2]


def test_hoyer_drives_the_rank_down():
    """Under the Hoyer term the small values shrink, and the energy rule then drops them."""
    f = spectrum([1.0, 0.9, 0.5, 0.4])
    zero = jax.tree.map(jnp.zeros_like, f)

    def kept(hoyer):
        chain = optax.chain(
            transforms.add_hoyer(hoyer),
            optax.scale(-0.1),
            transforms.truncate_rank(0.95, floor=0.25, every=20),
        )
        return np.count_nonzero(run(chain, f, zero, steps=21)[0].s)

    assert kept(0.0) == 4
    assert kept(1.0) == 2


def test_compaction_slices_masks_and_moments_and_keeps_the_weight():
    rng = np.random.default_rng(4)
    f = Factors(orthonormal(rng, (24, 16)), jnp.arange(16.0, 0, -1), orthonormal(rng, (20, 16)))
    params = {"layer": f}
    grads = jax.tree.map(lambda x: normal(rng, x.shape), params)
    for kind in ("elementwise", "matrix"):
        chain = optax.chain(
            transforms.scale_by_riemannian_adam(second_moment=kind),
            optax.scale(-1e-3),
            transforms.truncate_rank(lambda count: 0.4),
            transforms.retract("qr"),
        )
        moved, state, _ = run(chain, params, grads, steps=2)
        chosen = ranks.selection(moved)
        small, small_state = ranks.compact((moved, state), chosen)
        np.testing.assert_allclose(to_dense(small["layer"]), to_dense(moved["layer"]), atol=1e-5)
        assert small_state[2].masks["layer"].s.shape == (8,)
        update = jax.jit(chain.update)
        big = update(grads, state, moved)[0]["layer"]
        little, after = update(ranks.compact(grads, chosen), small_state, small)
        keep = chosen["layer"]
        np.testing.assert_allclose(little["layer"].s, big.s[keep], atol=1e-6)
        assert jax.tree.structure(after) == jax.tree.structure(small_state)
