"""AugLocal: local losses behind auxiliary networks like the layers above."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CLASSES, make_batch, make_method, max_difference, split

from ssa_jax.methods.auglocal import drawn
from ssa_jax.networks.forward import forward
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.tasks import CROSS_ENTROPY, output_error
from ssa_jax.training.train import init_state, make_step


@pytest.mark.parametrize(
    ("i", "hidden", "depth", "wanted"),
    [
        (0, 10, 3, (3, 6, 9)),
        (0, 10, 9, tuple(range(1, 10))),
        (0, 10, 99, tuple(range(1, 10))),
        (4, 10, 3, (7, 9)),
        (7, 10, 3, (9,)),
        (8, 10, 3, ()),
        (9, 10, 3, ()),
        (0, 10, 0, ()),
        (0, 1, 3, ()),
        (0, 2, 1, (1,)),
    ],
)
def test_layers_are_drawn_evenly_and_fewer_towards_the_output(i, hidden, depth, wanted):
    assert drawn(i, hidden, depth) == wanted


def test_depth_never_grows_towards_the_output_and_the_last_unit_above_is_always_in():
    for hidden in range(1, 20):
        for depth in range(6):
            taken = [drawn(i, hidden, depth) for i in range(hidden)]
            assert [len(t) for t in taken] == sorted(map(len, taken), reverse=True)
            for i, above in enumerate(taken):
                assert list(above) == sorted(set(above))
                assert not above or (above[0] > i and above[-1] == hidden - 1)


def setup(depth, name="conv", seed=0):
    units, params, mstate = split(name, None)
    method = make_method("auglocal", units, params, mstate, aux_depth=depth)
    batch = make_batch(16, seed)
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(CROSS_ENTROPY, logits, batch.labels)
    return units, params, mstate, method, batch, tape, error


def test_without_layers_it_is_a_linear_readout_of_the_mean_over_positions():
    _, params, mstate, method, batch, tape, error = setup(0)
    feedback = method.init(jax.random.key(0), params, mstate)
    signals = method.signals(feedback, params, tape, error, batch)
    for h, signal, readout in zip(tape.outputs[:-1], signals, feedback.readouts, strict=False):
        positions = int(np.prod(h.shape[1:-1]))
        pooled = h.reshape(len(h), -1, h.shape[-1]).mean(1)
        p = jax.nn.softmax(pooled @ readout["kernel"] + readout["bias"][None])
        e = (p - jax.nn.one_hot(batch.labels, CLASSES)) / len(h)
        wanted = (e @ readout["kernel"].T / positions).reshape(len(h), *[1] * (h.ndim - 2), -1)
        assert jnp.allclose(signal, jnp.broadcast_to(wanted, h.shape), atol=1e-6)
    assert jnp.array_equal(signals[-1], error)


def test_a_signal_is_of_the_unit_s_own_output_alone():
    _, params, mstate, method, batch, tape, error = setup(2)
    feedback = method.init(jax.random.key(0), params, mstate)
    signals = method.signals(feedback, params, tape, error, batch)
    other = [h + 1.0 for h in tape.outputs]
    for i in range(len(signals) - 1):
        mixed = tape._replace(outputs=(*other[:i], tape.outputs[i], *other[i + 1 :]))
        again = method.signals(feedback, params, mixed, error, batch)
        assert max_difference(again[i], signals[i]) == 0
        assert float(jnp.abs(signals[i]).max()) > 0


def test_parameters_are_counted():
    _, params, mstate, method, *_ = setup(2)
    feedback = method.init(jax.random.key(0), params, mstate)
    size = sum(x.size for x in jax.tree.leaves(feedback.readouts))
    assert method.note == f"readouts of {size:,} parameters beside the network's"


def test_it_learns_what_it_is_shown():
    units, params, mstate, method, batch, *_ = setup(2)
    optimizer = optax.adam(2e-2)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    step = make_step(units, method, optimizer, LossWeights())
    losses = []
    for _ in range(60):
        state, measured = step(state, batch)
        losses.append(float(measured["loss"]))
    assert losses[-1] < 0.2 * losses[0]


def test_a_depth_below_zero_is_refused():
    units, params, mstate = split("conv", None)
    with pytest.raises(ValueError, match="aux_depth must be at least 0, got -1"):
        make_method("auglocal", units, params, mstate, aux_depth=-1)
