"""Truncation of spectra inside the step, and the compaction that follows it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import normal, orthonormal, run

from ssa_jax import transforms
from ssa_jax.factors import Factors, to_dense
from ssa_jax.training import ranks


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


def stepped(chain, f, gradients):
    """(spectrum, state) after every step on the given gradients of s."""
    state, seen = chain.init(f), []
    update = jax.jit(chain.update)
    for g in gradients:
        zero = jax.tree.map(jnp.zeros_like, f)
        u, state = update(zero._replace(s=jnp.asarray(g, jnp.float32)), state, f)
        f = optax.apply_updates(f, u)
        seen.append((f.s, state))
    return seen


def test_a_budget_is_shared_out_by_energy_per_cost_whatever_the_scale_of_a_layer():
    def masks(scale):
        params = {
            "cheap": spectrum([8.0, 4, 2, 1], n=4),
            "dear": spectrum(scale * np.array([8.0, 4, 2, 1]), n=40),
        }  # fmt: skip
        chain = transforms.adapt_rank(optax.sgd(0.0), budget=2 * 81 + 3 * 9 + 8, every=1)
        still = jax.tree.map(jnp.zeros_like, params)
        return chain.update(still, chain.init(params), params)[1].masks

    for scale in (1.0, 1e-3, 1e3):
        kept = masks(scale)
        # 64, 16, 4 and 1 of 85 parts: the third of the dear layer would cost ten of the cheap.
        np.testing.assert_array_equal(kept["cheap"].s, [True, True, True, False])
        np.testing.assert_array_equal(kept["dear"].s, [True, True, False, False])


@pytest.mark.parametrize("budget", [0.0, 30.0, 90.0, 1e9])
def test_what_stays_fits_the_budget_or_is_the_least(budget):
    rng = np.random.default_rng(3)
    params = {str(n): spectrum(rng.uniform(0.1, 1, 8), n=n) for n in (8, 9, 20)}
    grads = jax.tree.map(lambda x: normal(rng, x.shape), params)
    chain = transforms.adapt_rank(optax.sgd(0.0), budget, every=1, least=1)
    masks = chain.update(grads, chain.init(params), params)[1].masks
    kept = {n: int(masks[n].s.sum()) for n in params}
    assert min(kept.values()) >= 1
    spent = sum((2 * int(n) + 1) * k for n, k in kept.items())
    assert spent <= max(budget, 17 + 19 + 41)
    dearest = 41
    if budget < 1e9:
        assert spent > budget - dearest
    else:
        assert set(kept.values()) == {8}


def test_a_dropped_direction_comes_back_at_zero_when_its_gradient_asks_for_it():
    f = spectrum([1.0, 0.5])
    chain = transforms.adapt_rank(optax.sgd(0.01), budget=17, every=1)
    seen = stepped(chain, f, [[0.0, -3.0]] * 60)
    assert seen[0][0][1] == 0
    back = next(i for i, (_, state) in enumerate(seen) if state.masks.s[1])
    before, after = seen[back - 1][0], seen[back][0]
    np.testing.assert_array_equal(before, [1, 0])
    # The step of its own gradient and nothing else; the budget has room for one.
    np.testing.assert_allclose(after, [0, 0.03], rtol=1e-6)
    assert seen[back][1].dropped.s[0] == 1
    # Without a gradient it stays away, and one that does not grow is dropped again.
    still = stepped(chain, f, [[0.0, 0.0]] * 60)
    assert all(not state.masks.s[1] for _, state in still)
    rest = stepped(chain, f, [[0.0, -3.0]] * (back + 1) + [[0.0, 0.0]] * 200)
    assert int(rest[-1][1].masks.s.sum()) == 1


def test_choices_are_made_in_every_kth_step_and_end():
    f = spectrum([4.0, 3, 2, 1])
    falling = transforms.adapt_rank(
        optax.sgd(0.0), lambda count: 17 * (5 - count), every=2, until=3
    )
    kept = [int(jnp.count_nonzero(s)) for s, _ in stepped(falling, f, [[0.0] * 4] * 6)]
    assert kept == [4, 3, 3, 3, 3, 3]


def test_layers_outside_the_mask_are_whole_and_cost_nothing():
    params = {"in": spectrum([4.0, 3, 2, 1]), "out": spectrum([4.0, 3, 2, 1])}
    grads = jax.tree.map(jnp.zeros_like, params)
    chain = transforms.adapt_rank(
        optax.sgd(0.0), 34, every=1, least=2, mask={"in": True, "out": False}
    )
    state = chain.update(grads, chain.init(params), params)[1]
    assert state.masks["out"] is None
    assert int(state.masks["in"].s.sum()) == 2


def test_stable_ranks_cut_once_when_they_have_settled_and_by_their_share():
    rule = transforms.truncate_stable_rank(tolerance=0.05, floor=0.0)
    f = spectrum(np.ones(8))
    state, still = rule.init(f), jax.tree.map(jnp.zeros_like, f)
    kept = []
    for tail in (1.0, 0.6, 0.2, 0.19, 0.0):
        s = jnp.asarray([1, 1, *[tail] * 6], jnp.float32)
        _, state = rule.update(still, state, f._replace(s=s))
        kept.append(int(state.masks.s.sum()))
    # ρ = 2 + 6 · 0.19² = 2.22 of 8 at the first look that moved less than a twentieth.
    assert kept == [8, 8, 8, 3, 3]
    with pytest.raises(ValueError, match="rank floor"):
        transforms.truncate_stable_rank(floor=2.0)


@pytest.mark.parametrize("wrap", ["bare", "finite", "masked", "adaptive"])
def test_what_a_step_truncated_can_be_put_back_exactly(wrap):
    rng = np.random.default_rng(5)
    params = {"layer": spectrum(rng.uniform(1, 2, 6)), "bias": jnp.ones(3)}
    grads = jax.tree.map(lambda x: normal(rng, x.shape), params)
    rule = transforms.truncate_rank(lambda count: 0.5)
    chain, plain = optax.chain(optax.sgd(0.1), rule), optax.sgd(0.1)
    chain = {
        "bare": lambda: chain,
        "finite": lambda: optax.apply_if_finite(chain, 2),
        "masked": lambda: optax.chain(plain, optax.masked(rule, {"layer": True, "bias": False})),
        "adaptive": lambda: transforms.adapt_rank(plain, 40.0, every=1),
    }[wrap]()
    updates, state = chain.update(grads, chain.init(params), params)
    after = optax.apply_updates(params, updates)
    expected = optax.apply_updates(params, plain.update(grads, plain.init(params), params)[0])
    assert int(jnp.count_nonzero(after["layer"].s)) < 6
    chex.assert_trees_all_equal(transforms.restore_dropped(after, state), expected)
    assert transforms.restore_dropped(after, plain.init(params)) is None
