"""Several steps in one program are the same steps one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_method, max_difference, split

from ssa_jax.training.dispatch import dispatches, make_dispatch, make_steps
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import init_state, make_step
from ssa_jax.types import Batch

LENGTHS = (1, 3)


def tiny_run(length, on_compile=lambda: None, name="ssa"):
    """A dispatch on the tiny network, its state, and six fixed batches."""
    units, params, mstate = split("conv", 0.5)
    method = make_method(name, units, params, mstate)
    optimizer = optax.adam(1e-2)
    step = make_step(units, method, optimizer, LossWeights())
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (6, 8, 6, 6, 2))
    batches = Batch(images, jnp.arange(48, dtype=jnp.int32).reshape(6, 8) % 5)

    def batch_at(epoch, step):
        return jax.tree.map(lambda x: x[step], epoch)

    return make_dispatch(step, batch_at, length, on_compile), state, batches


def after(length, steps=6):
    dispatch, state, batches = tiny_run(length)
    losses = []
    for _ in range(steps // length):
        state, measured = dispatch(state, batches)
        assert measured["loss"].shape == (length,)
        losses += measured["loss"].tolist()
    return state._replace(key=None), losses


@pytest.mark.slow
def test_several_steps_are_single_steps_to_rounding():
    """XLA:CPU lowers a convolution in a loop in another way, so the last bits may differ."""
    (single, losses), (scanned, same_losses) = (after(n) for n in LENGTHS)
    assert int(scanned.step) == 6
    assert max_difference(single, scanned) < 1e-5
    assert np.allclose(losses, same_losses, atol=1e-5)
    # Six different batches: a loop that saw one of them twice would show.
    assert np.ptp(losses) > 0.01


@pytest.mark.parametrize("length", LENGTHS)
def test_the_state_is_updated_in_place(length):
    dispatch, state, batches = tiny_run(length)
    # What a feedback is measured on is replaced, and never read by a step.
    feedback = state.feedback._replace(examples=())
    kept = (state.params, state.opt_state, state.mstate, feedback)
    size = sum(x.nbytes for x in jax.tree.leaves(kept))
    memory = dispatch.lower(state, batches).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    dispatch(state, batches)
    assert all(x.is_deleted() for x in jax.tree.leaves(kept))
    assert not any(x.is_deleted() for x in jax.tree.leaves(batches))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_program_is_traced_once(length):
    compiled = []
    dispatch, state, batches = tiny_run(length, lambda: compiled.append(1))
    for _ in range(2):
        state, _ = dispatch(state, batches)
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["bp", "ssa", "fa", "local", "kp"])
def test_a_step_closes_over_no_array_on_the_device(name):
    """Such an array would be fetched to the host to be compiled in."""
    dispatch, state, batches = tiny_run(1, name=name)
    consts = jax.make_jaxpr(dispatch)(state, batches).consts
    assert not [c for c in consts if isinstance(c, jax.Array)]


@pytest.mark.parametrize("periods", [(), (0,), (10,), (7, 0), (4, 6), (1,)])
@pytest.mark.parametrize(("first", "last"), [(0, 40), (3, 29), (20, 21), (5, 5)])
@pytest.mark.parametrize("length", [1, 3, 10])
def test_runs_cover_every_step_and_stop_where_something_is_due(first, last, length, periods):
    runs = list(dispatches(first, last, length, periods))
    assert [s for start, n in runs for s in range(start, start + n)] == list(range(first, last))
    assert {n for _, n in runs} <= {1, length}
    for start, n in runs:
        for p in filter(None, periods):
            assert all(step % p for step in range(start + 1, start + n))
        # Going on from any of the boundaries gives the same runs.
        rest = [(s, n) for s, n in runs if s >= start]
        assert list(dispatches(start, last, length, periods)) == rest


def test_single_steps_lead_to_what_is_due_and_long_runs_follow():
    assert list(dispatches(7, 27, 5, (10,))) == [
        (7, 1), (8, 1), (9, 1), (10, 5), (15, 5), (20, 5), (25, 1), (26, 1),
    ]  # fmt: skip


def test_a_length_that_would_never_run_is_shortened():
    def length(most, periods):
        return make_steps(None, None, most, periods, None).length

    assert length(10, (7, 0, 20)) == 7
    assert length(10, (0, 15)) == 10
    assert length(10, ()) == 10


def test_a_dispatch_of_no_step_is_refused():
    with pytest.raises(ValueError, match="at least one step, got 0"):
        tiny_run(0)


def test_a_step_to_be_looked_at_is_a_run_of_its_own():
    runs = list(dispatches(0, 30, 5, (10,), alone=lambda step: step == 12))
    assert (12, 1) in runs
    assert [step for first, n in runs for step in range(first, first + n)] == list(range(30))
    assert runs[:2] == [(0, 5), (5, 5)]
