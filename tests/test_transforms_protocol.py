"""What optax asks of every transformation, asked of every one of ours."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import MASK, RETRACTIONS, TRANSFORMS, arguments, make, tree

from ssa_jax import transforms
from ssa_jax.factors import Factors

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float64]


@functools.cache
def stepped(name):
    """(parameters, gradients, state after init, updates and state of one step).

    Takes two steps with donated states, and sees that the second compiles nothing.
    """
    params, grads = tree()
    transform = make(name)
    state = transform.init(params)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(grads, state, params):
        traces.append(name)
        return transform.update(grads, state, params)

    updates, new_state = step(grads, jax.tree.map(jnp.copy, state), params)
    step(grads, jax.tree.map(jnp.copy, new_state), optax.apply_updates(params, updates))
    assert len(traces) == 1
    return params, grads, state, updates, new_state


@pytest.mark.parametrize("name", TRANSFORMS)
def test_keeps_types_and_does_not_recompile(name):
    params, _, state, updates, new_state = stepped(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))
    assert getattr(new_state, "_fields", ())[:1] in ((), ("count",))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_keeps_the_dtype_of_the_parameters(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, grads = tree(dtype)
        transform = make(name)
        state = jax.eval_shape(transform.init, params)
        updates, new_state = jax.eval_shape(transform.update, grads, state, params)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("method", RETRACTIONS)
def test_every_retraction_keeps_the_dtype(method, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, grads = tree(dtype)
        retract = transforms.retract(method, mask=MASK)
        state = jax.eval_shape(retract.init, params)
        updates, _ = jax.eval_shape(retract.update, grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inits_from_shapes(name):
    params, _, state, *_ = stepped(name)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    chex.assert_trees_all_equal(make(name).init(shapes), state)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(make(name).init, shapes), state)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state_can_be_mapped_over(name):
    _, _, _, _, state = stepped(name)
    mapped = optax.tree.map_params(make(name), lambda x: x, state)
    chex.assert_trees_all_equal(mapped, state)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_works_in_the_wrappers_of_optax(name):
    """One compiled step of every wrapper, with an unknown extra argument, against the bare one."""
    factory, _, static = TRANSFORMS[name]
    params, grads, _, expected, _ = stepped(name)
    wrappers = {
        "multi_steps": optax.MultiSteps(make(name), every_k_schedule=1),
        "inject": optax.inject_hyperparams(factory, static_args=static)(**arguments(name)),
        "finite": optax.apply_if_finite(make(name), 3),
        "chain": optax.chain(optax.identity(), make(name)),
    }
    states = {key: w.init(params) for key, w in wrappers.items()}

    @jax.jit
    def step(states):
        return {
            key: w.update(grads, states[key], params, unheard_of=1)[0]
            for key, w in wrappers.items()
        }

    for updates in step(states).values():
        # Injected decays are float32, which leaves 1 - b₂ five digits; Muon enlarges rounding.
        chex.assert_trees_all_close(updates, expected, atol=5e-5)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_works_under_masked_and_partition(name):
    """The leaves outside are untouched; those inside move as they do without the wrapper."""
    params, grads, _, unwrapped, _ = stepped(name)
    if name == "add_alignment":
        kwargs = {**arguments(name), "target": None}
        transform = TRANSFORMS[name][0](**kwargs)
        extra = {"alignment_target": {"layer": jax.tree.map(jnp.ones_like, params["layer"])}}
        extra["alignment_target"] |= {"rows": None, "bias": None}
    else:
        transform, extra = make(name), {}
    inside = {"layer": True, "rows": True, "bias": False}
    masked = optax.with_extra_args_support(optax.masked(transform, inside))
    labels = jax.tree.map(lambda m: "ours" if m else "theirs", inside)
    split = optax.partition({"ours": transform, "theirs": optax.identity()}, labels)
    states = masked.init(params), split.init(params)

    def step(states):
        one = masked.update(grads, states[0], params, **extra)[0]
        two = split.update(grads, states[1], params, **extra)[0]
        # Operation by operation: Muon multiplies the rounding of a fusion by ten.
        alone = unwrapped if extra else transform.update(grads, transform.init(params), params)[0]
        return alone, one, two

    expected, *wrapped = step(states)
    for updates in wrapped:
        chex.assert_trees_all_equal(updates["bias"], grads["bias"])
        for key in ("layer", "rows"):
            chex.assert_trees_all_close(updates[key], expected[key], atol=1e-6)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_asks_for_the_parameters(name):
    _, grads, state, *_ = stepped(name)
    with pytest.raises(ValueError, match=r"^bias: .*update\(updates, state, params\)"):
        make(name).update(grads, state)


def test_partition_keeps_whole_factors_together():
    """Factors that belong wholly to another rule are nothing to the transformation."""
    params, grads = tree()
    labels = {"layer": Factors("sgd", "sgd", "sgd"), "rows": "ours", "bias": "sgd"}
    chain = optax.partition({"ours": make("stiefel_sgd"), "sgd": optax.sgd(0.1)}, labels)
    updates, _ = chain.update(grads, chain.init(params), params)
    np.testing.assert_allclose(updates["layer"].u, -0.1 * grads["layer"].u, rtol=1e-6)
    moved = params["rows"] + updates["rows"]
    np.testing.assert_allclose(moved @ moved.mT, jnp.stack([jnp.eye(2)] * 2), atol=1e-6)
