"""The chain as a whole: its order, and what it keeps true."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import make_batch, make_method, max_difference, split

from ssa_jax import factors, transforms
from ssa_jax.training import ranks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    decayed,
    learning_rate,
    make_optimizer,
    scale_by_depth,
)
from ssa_jax.training.train import init_state, make_step


def train(config, steps=10, rank=0.5, network="conv"):
    units, params, mstate = split(network, rank)
    method = make_method("bp", units, params, mstate)
    optimizer = make_optimizer(config)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    step = make_step(units, method, optimizer, LossWeights())
    for i in range(steps):
        state, measured = step(state, make_batch(16, seed=i))
    return state, measured


@pytest.mark.parametrize(
    ("retraction", "optimizer"),
    [
        *[("series", optimizer) for optimizer in OPTIMIZERS],
        *[
            pytest.param(retraction, "adam", marks=pytest.mark.slow)
            for retraction in ("cholesky_qr2", "qr", "cayley")
        ],
    ],
)
def test_factors_stay_on_the_manifold(retraction, optimizer):
    config = OptimizerConfig(0.02, 40, 10, optimizer=optimizer, retraction=retraction)
    state, measured = train(config, steps=20)
    assert float(factors.orthogonality_error(state.params)) < 2e-5
    assert bool(jnp.isfinite(measured["loss"]))


def test_without_retraction_they_leave_it():
    state, _ = train(OptimizerConfig(0.02, 40, 10, retraction="none"), steps=20)
    assert float(factors.orthogonality_error(state.params)) > 1e-3


def test_a_retraction_every_fourth_step_brings_them_back():
    config = OptimizerConfig(0.01, 40, 10, retract_every=4)
    assert float(factors.orthogonality_error(train(config, steps=8)[0].params)) < 1e-4
    assert float(factors.orthogonality_error(train(config, steps=10)[0].params)) > 1e-4


def test_without_factors_the_chain_is_adam():
    config = OptimizerConfig(0.01, 20, 10, clip=1e9)
    units, params, mstate = split("conv", None)
    method = make_method("bp", units, params, mstate)
    states = []
    for optimizer in (make_optimizer(config), optax.adam(learning_rate(config))):
        own = jax.tree.map(jnp.copy, (params, mstate))
        state = init_state(method, optimizer, *own, jax.random.key(0))
        step = make_step(units, method, optimizer, LossWeights())
        for i in range(4):
            state, _ = step(state, make_batch(seed=i))
        states.append(state)
    assert max_difference(states[0].params, states[1].params) < 1e-6


def test_learning_rate_warms_up_and_ends_at_zero():
    rate = learning_rate(OptimizerConfig(0.1, 100, 10))
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(0.1)
    assert float(rate(100)) == pytest.approx(0, abs=1e-8)


def test_rates_fall_geometrically_from_the_last_unit_to_the_first():
    units = tuple({"w": jnp.ones(2)} for _ in range(3))
    updates, _ = scale_by_depth(0.25).update(units, optax.EmptyState())
    assert [float(u["w"][0]) for u in updates] == [0.25, 0.5, 1.0]
    (single,), _ = scale_by_depth(0.25).update(units[:1], optax.EmptyState())
    assert float(single["w"][0]) == 0.25


def test_a_smaller_first_rate_moves_the_first_unit_less_and_the_last_as_before():
    def moved(first_rate):
        _, before, _ = split("conv", 0.5)
        # The first step has a rate of zero, so that both take the second from the same weights.
        after = train(OptimizerConfig(0.02, 40, 10, first_rate=first_rate), steps=2)[0].params
        return [max_difference(a, b) for a, b in zip(after, before, strict=True)]

    even, uneven = moved(1.0), moved(0.1)
    assert uneven[0] == pytest.approx(0.1 * even[0], rel=0.05)
    assert uneven[-1] == even[-1]


@pytest.mark.slow
def test_hoyer_makes_the_spectrum_sparser():
    def sparsity(hoyer):
        config = OptimizerConfig(0.02, 40, 40, hoyer=hoyer, rank_schedule="hybrid")
        state, _ = train(config, steps=12)
        return sum(float(jnp.abs(f.s).sum() / jnp.linalg.norm(f.s))
                   for f in factors.leaves(state.params))  # fmt: skip

    assert sparsity(1.0) < sparsity(0.0) - 0.1


@pytest.mark.parametrize("schedule", ranks.SCHEDULES)
def test_a_chain_has_the_hoyer_term_where_its_schedule_ever_weighs_it(schedule):
    _, params, _ = split("conv", 0.5)

    def has_term(hoyer):
        chain = make_optimizer(OptimizerConfig(0.1, 100, 5, hoyer=hoyer, rank_schedule=schedule))
        state = chain.init(params)
        kinds = (transforms.HoyerState,)
        found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
        return any(isinstance(x, kinds) for x in found)

    weighs = any(ranks.SCHEDULES[schedule](jnp.float32(t / 100), 0.9).hoyer for t in range(101))
    assert has_term(1e-2) == weighs
    assert not has_term(0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": "up"}, "must be one of"),
        ({"retraction": "up"}, "must be one of"),
        ({"retract_every": 0}, "at least 1"),
        ({"rank_floor": 2.0}, "floor"),
        ({"first_rate": 0.0}, "first_rate must be above 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(OptimizerConfig(0.1, 10, 5, **change))


def test_weight_decay_shrinks_kernels_and_the_scale_of_factors_as_one():
    """W = U diag(s) Vᵀ loses the share rate · λ in a step, whichever form it is stored in."""
    params = {
        "f": factors.from_dense(jax.random.normal(jax.random.key(0), (6, 5)), 3),
        "kernel": jnp.ones((3, 2)),
        "bias": jnp.ones(2),
    }
    still = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(0.1, 40, 10, warmup_steps=1, weight_decay=0.5, optimizer="momentum")
    optimizer = make_optimizer(config)
    state = optimizer.init((params,))
    # The rate of the first step is zero.
    after, once = (params,), learning_rate(config)(1)
    for _ in range(2):
        updates, state = optimizer.update((still,), state, after)
        after = optax.apply_updates(after, updates)
    kept = 1 - float(once) * 0.5
    before, after = factors.to_dense(params["f"]), factors.to_dense(after[0]["f"])
    assert jnp.allclose(after, kept * before, atol=1e-5)
    assert kept == pytest.approx(0.95)


def test_of_a_tree_norms_and_biases_do_not_decay():
    leaf = factors.from_dense(jnp.eye(4), 2)
    assert decayed({"a": leaf, "b": jnp.ones((2, 3)), "c": jnp.ones(3)}) == {
        "a": factors.Factors(False, True, False), "b": True, "c": False
    }  # fmt: skip
