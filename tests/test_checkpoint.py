"""Checkpoints hold the whole state, at any rank, and fit their own run only."""

import errno
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_batch, make_method, split
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from ssa_jax.training import checkpoint, ranks
from ssa_jax.training.checkpoint import CheckpointError, Checkpoints
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OptimizerConfig, make_optimizer
from ssa_jax.training.record import Position, versions
from ssa_jax.training.train import init_state, make_refresh, make_step


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


START = Position()
LAYER = "units/0/map/kernel"


def save(folder, state, position=START, **options):
    with Checkpoints(folder, **options) as checkpoints:
        checkpoints.save(state, position)


def save_each(folder, accuracies, **options):
    """A checkpoint an epoch, of one state with another number of steps each."""
    state, *_ = fresh()
    with Checkpoints(folder, **options) as checkpoints:
        for epoch, accuracy in enumerate(accuracies):
            state = state._replace(step=jnp.int32(epoch))
            checkpoints.save(state, Position(epoch, score=accuracy))


def test_a_restored_run_goes_on_bit_for_bit_across_a_rank_change(tmp_path):
    state, step, refresh = fresh()
    state = advance(state, step, refresh, 0, 10)
    chosen = ranks.selection(state.params, 1)
    assert chosen
    state = ranks.compact(state, chosen)
    position = Position(5, 2, {"loss": 0.1 + 0.2}, [{"step": 3, "to_step": 2}], 1.5)
    save(tmp_path, state, position)
    expected = advance(state, step, refresh, 10, 13)

    like, step, refresh = fresh()
    found, restored = Checkpoints(tmp_path).restore(like)
    assert found == position
    assert int(restored.step) == 10
    assert identical(advance(restored, step, refresh, 10, 13), expected)


def test_saving_in_the_background_keeps_what_was_saved(tmp_path):
    """The step is donated the saved buffers at once; the checkpoint must not change."""
    state, step, refresh = fresh()
    kept = jax.tree.map(lambda x: x.copy(), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Position())
        advance(state, step, refresh, 0, 3)
    assert identical(Checkpoints(tmp_path).restore(fresh()[0])[1], kept)


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept(tmp_path):
    save_each(tmp_path, [0.1, 0.7, 0.3, 0.7, 0.2, None, 0.4])
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [3, 5, 6]
    assert checkpoints.latest() == 6
    assert checkpoints.best() == 3
    position, state = checkpoints.restore(fresh()[0], checkpoints.best())
    assert (position.epoch, position.score, int(state.step)) == (3, 0.7, 3)


@pytest.mark.slow
def test_the_best_is_remembered_by_the_next_process(tmp_path):
    save_each(tmp_path, [0.1, 0.9, 0.2, 0.3], keep=1)
    assert Checkpoints(tmp_path).steps() == [1, 3]
    state = fresh()[0]._replace(step=jnp.int32(4))
    save(tmp_path, state, Position(4, score=0.4), keep=1)
    assert Checkpoints(tmp_path).steps() == [1, 4]
    assert Checkpoints(tmp_path).best() == 1


@pytest.mark.slow
def test_reading_changes_nothing(tmp_path):
    """Another process may be writing: its temporary folder must stay."""
    save_each(tmp_path, [0.1, 0.2])
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore(fresh()[0])
        assert (checkpoints.latest(), checkpoints.best()) == (1, 1)
    assert sorted(tmp_path.rglob("*")) == before
    missing = Checkpoints(tmp_path / "missing")
    assert (missing.latest(), missing.best()) == (None, None)
    assert not (tmp_path / "missing").exists()


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        Checkpoints(tmp_path).restore(fresh()[0])


@pytest.mark.parametrize(
    "other",
    [{"method_name": "bp"}, {"network": "residual"}, {"rank": 0.5}, {"rank": None}],
    ids=["method", "network", "smaller rank", "dense"],
)
def test_another_run_is_refused(tmp_path, other):
    save(tmp_path, fresh()[0])
    with pytest.raises(
        CheckpointError, match=r"does not fit this run, whose model .* here and .* there"
    ):
        Checkpoints(tmp_path).restore(fresh(**other)[0])


def test_another_configuration_is_refused_by_what_differs(tmp_path):
    save(tmp_path, fresh()[0], config={"method": "ssa", "dataset": "mnist", "seed": 0})
    other = Checkpoints(tmp_path, config={"method": "ssa", "dataset": "digits", "seed": 0})
    with pytest.raises(CheckpointError, match=r"another run: dataset=digits here and mnist there$"):
        other.restore(fresh()[0])


def test_a_setting_that_is_newer_than_a_checkpoint_is_no_difference(tmp_path):
    state, *_ = fresh()
    save(tmp_path, state, config={"seed": 0})
    with Checkpoints(tmp_path, config={"seed": 0, "newer": 3}) as checkpoints:
        assert identical(checkpoints.restore(state)[1], state)
    with (
        Checkpoints(tmp_path, config={"seed": 1, "newer": 3}) as checkpoints,
        pytest.raises(CheckpointError, match=r"another run: seed=1 here and 0 there$"),
    ):
        checkpoints.restore(state)


def test_other_versions_are_told(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "versions", lambda: {**versions(), "jax": "0.1"})
        save(tmp_path, fresh()[0])
    told = []
    Checkpoints(tmp_path, tell=told.append).restore(fresh()[0])
    assert len(told) == 1
    assert "other versions: jax=" in told[0]


def everything_in(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def truncate(file, rng):
    os.truncate(file, rng.integers(file.stat().st_size))


def flip(file, rng):
    raw = bytearray(file.read_bytes())
    raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    file.write_bytes(raw)


def remove(file, rng):
    del rng
    file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_no_damage_to_any_file_changes_what_is_read(damage, tmp_path):
    """Whatever is done to a file, a restore gives the newest state or the one before, whole."""
    save_each(tmp_path / "whole", [0.1, 0.2])
    rng, fallbacks = np.random.default_rng(0), 0
    whole = [Checkpoints(tmp_path / "whole").restore(fresh()[0], step) for step in (0, 1)]
    files = everything_in(tmp_path / "whole" / "1")
    assert len(files) > 5
    for file in files:
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        damage(tmp_path / "copy" / file.relative_to(tmp_path / "whole"), rng)
        told = []
        checkpoints = Checkpoints(tmp_path / "copy", tell=told.append)
        position, state = checkpoints.restore(fresh()[0])
        assert position == whole[position.epoch][0]
        assert identical(state, whole[position.epoch][1])
        assert bool(told) == (position.epoch == 0)
        if told:
            fallbacks += 1
            assert len(told) == 1
            assert re.match(r"checkpoint 1 is damaged \(.*\): going back to checkpoint 0$", told[0])
            checkpoints.set_aside_after(0)
            assert checkpoints.steps() == [0]
        shutil.rmtree(tmp_path / "copy")
    assert fallbacks


def test_a_changed_bit_that_the_storage_does_not_notice_is_found(tmp_path, monkeypatch):
    save_each(tmp_path, [0.1, 0.2])
    load = checkpoint.ocp.load_checkpointables

    def altered(folder, abstract):
        state = load(folder, abstract)["state"]
        first = state.params[0]
        bits = np.asarray(first[LAYER].s).view(np.uint32) ^ (folder.name == "1")
        first[LAYER] = first[LAYER]._replace(s=jnp.asarray(bits.view(np.float32)))
        return {"state": state}

    monkeypatch.setattr(checkpoint.ocp, "load_checkpointables", altered)
    told = []
    position, _ = Checkpoints(tmp_path, tell=told.append).restore(fresh()[0])
    assert position.epoch == 0
    assert f"its arrays are altered: params/0/{LAYER}/s" in told[0]


def test_all_damaged_is_an_error(tmp_path):
    save_each(tmp_path, [0.1, 0.2])
    for step in ("0", "1"):
        (tmp_path / step / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=r"nothing in .* can be read: checkpoint 1 .*; chec"):
        Checkpoints(tmp_path).restore(fresh()[0])


@pytest.mark.slow
def test_a_save_that_fails_in_the_background_is_told_and_harms_nothing(tmp_path, monkeypatch):
    save_each(tmp_path, [0.1])
    state = fresh()[0]._replace(step=jnp.int32(1))

    async def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AtomicRenameTemporaryPath, "finalize", full)
    with pytest.raises(CheckpointError, match=r"could not be written to .*No space left on device"):
        save(tmp_path, state, Position(1), keep=1)
    monkeypatch.undo()
    assert Checkpoints(tmp_path).restore(fresh()[0])[0].epoch == 0
    # There is room again, and nothing of the failed save is in the way.
    save(tmp_path, state, Position(1), keep=1)
    assert Checkpoints(tmp_path).latest() == 1
    assert all(p.name.isdigit() for p in tmp_path.iterdir())
