"""A chain taken a unit at a time is the chain, and one that couples units is told."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import max_difference, split

from ssa_jax import transforms
from ssa_jax.training import optim, unitwise
from ssa_jax.training.optim import OptimizerConfig

# Of a network of four units, the last one dense.
_, PARAMS, _ = split("conv", rank=0.8)


def chain(**settings):
    return optim.make_optimizer(OptimizerConfig(1e-2, 8, 2, hoyer=1e-2, **settings))


ALONE = {
    "sgd": lambda: optax.sgd(0.1),
    "momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 8), weight_decay=1e-2),
    "average of updates": lambda: optax.chain(optax.scale(-0.1), optax.ema(0.9)),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(
        learning_rate=lambda count: 0.1 / (count + 1)
    ),
    "linear": lambda: chain(rank_schedule="linear"),
    "hybrid": lambda: chain(rank_schedule="hybrid", rank_exclude=("1/*",), first_rate=0.5),
    "every third": lambda: chain(optimizer="momentum", retract_every=3),
}
COUPLED = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "budget": lambda: transforms.adapt_rank(optax.sgd(0.1), budget=100, every=2),
    "stable rank": lambda: chain(rank_schedule="stable_rank"),
    "finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "labels": lambda: transforms.retract(mask={0: False, 1: True, 2: True, 3: True}),
}


def a_step(optimizer, params, gradients, state):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def by_unit(optimizer, params, gradients, state):
    alone = unitwise.split(optimizer, params)
    moved = [alone.update(i, p, gradients[i], state)[0] for i, p in enumerate(params)]
    return alone.join(moved, state)


def after_steps(step, optimizer, steps=4):
    params, state = PARAMS, optimizer.init(PARAMS)
    step = jax.jit(functools.partial(step, optimizer))
    for key in jax.random.split(jax.random.key(0), steps):
        gradients = optax.tree.random_like(key, params, jax.random.normal)
        params, state = step(params, gradients, state)
    return params, state


@pytest.mark.parametrize(
    "name", [n if n == "hybrid" else pytest.param(n, marks=pytest.mark.long)
             for n in ALONE]
)  # fmt: skip
def test_a_unit_at_a_time_is_the_whole(name):
    ours, theirs = (after_steps(step, ALONE[name]()) for step in (by_unit, a_step))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert max_difference(ours, theirs) < 2e-6
    assert max_difference(ours[0], PARAMS) > 1e-2


@pytest.mark.parametrize("name", ALONE)
def test_a_chain_that_treats_units_alone_is_split(name):
    assert unitwise.split(ALONE[name](), PARAMS) is not None


@pytest.mark.parametrize("name", COUPLED)
def test_a_chain_that_couples_units_is_not_split(name):
    assert unitwise.split(COUPLED[name](), PARAMS) is None


def test_a_unit_without_parameters_is_no_trouble():
    params = (PARAMS[0], {}, PARAMS[3])
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = optax.adam(0.1)
    state = optimizer.init(params)
    ours, theirs = (step(optimizer, params, gradients, state) for step in (by_unit, a_step))
    assert max_difference(ours, theirs) < 1e-6
