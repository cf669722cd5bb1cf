"""A chain taken a unit at a time is the chain, and a chain of ours says truly whether it can be."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import max_difference, split
from jax.interpreters import partial_eval

from ssa_jax import transforms
from ssa_jax.factors.retractions import PROJECTIONS, RETRACTIONS
from ssa_jax.training import optim, ranks, unitwise
from ssa_jax.training.optim import OptimizerConfig

# Of a network of four units, the last one dense.
_, PARAMS, _ = split("conv", rank=0.8)


def chain(**settings):
    return optim.make_optimizer(OptimizerConfig(1e-2, 8, 2, hoyer=1e-2, **settings))


def said(chain):
    """An outside chain whose maker says that it treats units alone."""
    return unitwise.Alone(*optax.with_extra_args_support(chain))


ALONE = {
    "momentum": lambda: said(optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "adamw": lambda: said(optax.adamw(optax.cosine_decay_schedule(0.1, 8), weight_decay=1e-2)),
    "injected": lambda: said(
        optax.inject_hyperparams(optax.adam)(learning_rate=lambda count: 0.1 / (count + 1))
    ),
    "within": lambda: chain(optimizer=said(optax.adam(0.1)), rank_schedule="energy"),
    "linear": lambda: chain(rank_schedule="linear"),
    "hybrid": lambda: chain(rank_schedule="hybrid", rank_exclude=("1/*",), first_rate=0.5),
    "every third": lambda: chain(optimizer="momentum", retract_every=3),
}
# What a chain can be built of: two settings at a time that a link is chosen by.
BUILT = [
    {field: name, "rank_schedule": schedule}
    for field, names in (
        ("optimizer", optim.OPTIMIZERS),
        ("projection", PROJECTIONS),
        ("retraction", RETRACTIONS),
        ("retract_every", (2,)),
        ("first_rate", (0.5,)),
    )
    for name in names
    for schedule in ranks.SCHEDULES
    if schedule not in optim.RULES
]
COUPLED = {
    "global norm": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    "budget": lambda: transforms.adapt_rank(optax.sgd(0.1), budget=100, every=2),
    "stable rank": lambda: chain(rank_schedule="stable_rank"),
    "finite": lambda: optax.apply_if_finite(optax.sgd(0.1), 3),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(0.1)),
    "labels": lambda: transforms.retract(mask={0: False, 1: True, 2: True, 3: True}),
    # Nothing is known of what says nothing.
    "sgd": lambda: optax.sgd(0.1),
    "within": lambda: chain(optimizer=optax.adam(0.1)),
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


def paths(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def units_read(optimizer):
    """Which units' gradients, state and parameters a unit's update and state are made of.

    Of unit None are what units share. A mesh keeps the matrices of several units apart, which are
    otherwise one array for one operation; that this changes nothing the steps above show.
    """
    alone = unitwise.split(optimizer, PARAMS)
    state = jax.eval_shape(optimizer.init, PARAMS)
    shared = paths(jax.eval_shape(optimizer.init, tuple(() for _ in PARAMS)))
    owner = {p: i for i, own in enumerate(alone.states) for p in paths(own) if p not in shared}
    of_params = [i for i, unit in enumerate(PARAMS) for _ in jax.tree.leaves(unit)]
    of_state = [owner.get(path) for path in paths(state)]
    with jax.set_mesh(jax.make_mesh((1,), ("batch",), (jax.sharding.AxisType.Auto,))):
        program = jax.make_jaxpr(optimizer.update)(PARAMS, state, PARAMS).jaxpr
    inputs, results = [*of_params, *of_state, *of_params], [*of_params, *of_state]
    read = {}
    for i in set(results):
        used = partial_eval.dce_jaxpr(program, [of == i for of in results])[1]
        read[i] = {of for of, is_used in zip(inputs, used, strict=True) if is_used}
    return read


@pytest.mark.parametrize("settings", BUILT, ids=lambda s: " ".join(map(str, s.values())))
def test_a_chain_of_ours_treats_units_alone_as_it_says(settings):
    read = units_read(chain(**settings))
    assert read.keys() >= set(range(len(PARAMS)))
    assert all(units <= {i, None} for i, units in read.items())


def test_what_a_coupling_chain_says_would_not_hold():
    read = units_read(said(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))))
    assert read[0] == set(range(len(PARAMS)))


@pytest.mark.parametrize("name", COUPLED)
def test_a_chain_that_couples_units_is_not_split(name):
    assert unitwise.split(COUPLED[name](), PARAMS) is None


def test_a_unit_without_parameters_is_no_trouble():
    params = (PARAMS[0], {}, PARAMS[3])
    gradients = jax.tree.map(jnp.ones_like, params)
    optimizer = said(optax.adam(0.1))
    state = optimizer.init(params)
    ours, theirs = (step(optimizer, params, gradients, state) for step in (by_unit, a_step))
    assert max_difference(ours, theirs) < 1e-6
