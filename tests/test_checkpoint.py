"""Checkpoints hold the whole state, at any rank, and fit their own run only."""

import jax
import numpy as np
import pytest
from helpers import make_batch, make_method, split

from ssa_jax import ranks
from ssa_jax.checkpoint import CheckpointError, Checkpoints
from ssa_jax.losses import LossWeights
from ssa_jax.optim import OptimizerConfig, make_optimizer
from ssa_jax.train import init_state, make_refresh, make_step


def fresh(method_name="ssa", network="conv", rank=1.0):
    units, params, mstate = split(network, rank)
    method = make_method(method_name, units, params, mstate)
    optimizer = make_optimizer(OptimizerConfig(0.01, 12, 2, rank_schedule="hybrid"))
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    return state, make_step(units, method, optimizer, LossWeights()), make_refresh(method)


def advance(state, step, refresh, first, last):
    for i in range(first, last):
        state, _ = step(refresh(state), make_batch(16, seed=i))
    return state


def identical(a, b):
    def raw(x):
        return np.asarray(jax.random.key_data(x) if jax.dtypes.issubdtype(
            x.dtype, jax.dtypes.prng_key) else x)  # fmt: skip

    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(raw(x), raw(y))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))  # fmt: skip


def save(folder, epoch, state):
    checkpoints = Checkpoints(folder)
    checkpoints.save(epoch, state)
    checkpoints.close()


def restore(folder, like):
    checkpoints = Checkpoints(folder)
    try:
        return checkpoints.restore(like)
    finally:
        checkpoints.close()


def test_a_restored_run_goes_on_bit_for_bit_across_a_rank_change(tmp_path):
    state, step, refresh = fresh()
    state = advance(state, step, refresh, 0, 10)
    chosen = ranks.selection(state.params)
    assert chosen
    state = ranks.compact(state, chosen)
    save(tmp_path, 5, state)
    expected = advance(state, step, refresh, 10, 13)

    like, step, refresh = fresh()
    epoch, restored = restore(tmp_path, like)
    assert epoch == 5
    assert int(restored.step) == 10
    assert identical(advance(restored, step, refresh, 10, 13), expected)


def test_saving_in_the_background_keeps_what_was_saved(tmp_path):
    """The step is donated the saved buffers at once; the checkpoint must not change."""
    state, step, refresh = fresh()
    kept = jax.tree.map(lambda x: x.copy(), state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state)
    advance(state, step, refresh, 0, 3)
    checkpoints.close()
    assert identical(restore(tmp_path, fresh()[0])[1], kept)


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    state, *_ = fresh()
    for epoch in range(4):
        checkpoints.save(epoch, state)
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
    assert Checkpoints(tmp_path).latest() == 3


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        restore(tmp_path, fresh()[0])


@pytest.mark.parametrize(
    "other",
    [{"method_name": "bp"}, {"network": "residual"}, {"rank": 0.5}, {"rank": None}],
    ids=["method", "network", "smaller rank", "dense"],
)
def test_another_run_is_refused(tmp_path, other):
    save(tmp_path, 0, fresh()[0])
    with pytest.raises(CheckpointError, match="this run"):
        restore(tmp_path, fresh(**other)[0])
