"""The training loop: nothing crosses between host and device unasked; several steps a program."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import max_difference

from ssa_jax import data as data_lib
from ssa_jax.errors import NotFiniteError
from ssa_jax.parallel.compiling import Ahead, Compiling
from ssa_jax.runs import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.trainer import Trainer
from ssa_jax.training.running_means import RunningMeans

STEPS = 11
SMALL = Config(dataset="digits", model="mlp", batch_size=128, epochs=2, feedback_every=4)


def make_trainer(**change):
    config = dataclasses.replace(SMALL, **change)
    data = data_lib.load(config.dataset)
    return Trainer(config, data, build.build(config, data), Compiling())


def train(trainer, epochs=1, between=lambda step: None):
    rows = []
    for e in range(epochs):
        means = RunningMeans({}, 0)
        rows.append(trainer.train_epoch(e, means, between) | means.row())
    return rows


def assert_equal_states(a, b):
    leaves = (jax.tree.leaves(t.state._replace(key=None)) for t in (a, b))
    assert all(np.array_equal(x, y) for x, y in zip(*leaves, strict=True))


def at_host(epoch):
    return epoch._replace(rows=np.asarray(epoch.rows))


@pytest.mark.parametrize("steps", [1, 3])
def test_an_implicit_transfer_in_the_loop_raises(steps):
    """From host to device, which a CPU guards too; the way back costs it nothing and passes."""
    trainer = make_trainer(steps_per_dispatch=steps)
    whole = dict(trainer.programs.steps.programs)
    for n, dispatch in whole.items():
        trainer.programs.steps.programs[n] = lambda state, feed, d=dispatch: d(state, at_host(feed))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(trainer)
    # Without it the loop goes through, refreshes and all.
    trainer.programs.steps.programs.update(whole)
    assert train(trainer)[0]["images"] == STEPS * 128


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, marks=pytest.mark.long),
        pytest.param({"precision": "bfloat16", "method": "bp"}, marks=pytest.mark.long),
        {"rank_schedule": "hybrid", "rank_init": 1.0},
        pytest.param({"warmup_method": "bp", "max_steps": STEPS + 6}, marks=pytest.mark.long),
    ],
    ids=["ssa", "bfloat16", "truncation", "warm-up"],
)
def test_without_convolutions_several_steps_are_single_steps_bit_for_bit(change):
    single, several = (make_trainer(steps_per_dispatch=n, **change) for n in (1, 3))
    assert train(single, 2) == train(several, 2)
    assert_equal_states(single, several)
    assert several.step == (change.get("max_steps") or 2 * STEPS)


def test_what_is_due_finds_its_step():
    trainer = make_trainer(steps_per_dispatch=3, save_every=5)
    refreshed, seen = [], []
    refresh = trainer.programs.refresh

    def noting(state):
        refreshed.append(int(jax.device_get(state.step)))
        return refresh(state)

    trainer.programs = trainer.programs._replace(refresh=noting)
    train(trainer, 2, lambda step: seen.append((step, trainer.step)))
    assert refreshed == [0, 4, 8, 12, 16, 20]
    assert all(told == done for told, done in seen)
    assert {0, 5, 10, 15, 20} <= {step for step, _ in seen}
    assert len(seen) < 2 * STEPS


@pytest.mark.parametrize("steps", [1, 3])
def test_a_method_takes_over_within_an_epoch_from_a_warm_up_of_steps(steps):
    warm = {"warmup_method": "svd_bp", "warmup_until": 6}
    options = {"feedback": "random", "feedback_update": "fixed", "feedback_lookahead": 0}
    trainer = make_trainer(steps_per_dispatch=steps, **warm, **options)
    refreshed, refresh = [], trainer.programs.refresh

    def noting(state):
        refreshed.append(int(jax.device_get(state.step)))
        return refresh(state)

    trainer.programs = trainer.programs._replace(refresh=noting)
    seen = {"warm": [], "after": []}
    for n, take in trainer.programs.warmup.programs.items():
        trainer.programs.warmup.programs[n] = telling(seen["warm"], n, take)
    for n, take in trainer.programs.steps.programs.items():
        trainer.programs.steps.programs[n] = telling(seen["after"], n, take)
    train(trainer)
    assert sum(seen["warm"]) == 6
    assert sum(seen["warm"] + seen["after"]) == STEPS
    assert refreshed == [6]


def telling(seen, steps, dispatch):
    def take(state, feed):
        seen.append(steps)
        return dispatch(state, feed)

    return take


def test_steps_of_a_warm_up_are_those_of_its_method():
    """Until the other takes over; from then on they part."""
    warm = {"warmup_method": "svd_bp", "warmup_until": 5}
    runs = [make_trainer(method="svd_bp"), make_trainer(**warm)]
    part = [make_trainer(method="svd_bp", max_steps=5), make_trainer(max_steps=5, **warm)]
    rows = [train(trainer)[0]["train_loss"] for trainer in (*part, *runs)]
    assert rows[0] == rows[1]
    assert max_difference(part[0].state.params, part[1].state.params) == 0
    assert rows[2] != rows[3]


def test_both_programs_are_counted_once():
    trainer = make_trainer(steps_per_dispatch=3)
    train(trainer, 2)
    assert trainer.compiling.steps == 2


def test_the_default_on_a_cpu_is_single_steps():
    assert make_trainer().programs.steps.length == 1
    assert make_trainer(steps_per_dispatch=30).programs.steps.length == 4


def test_batches_of_an_epoch_are_its_order():
    """Every example is seen at most once an epoch, and each epoch has an order of its own."""
    loader = make_trainer().loader
    key = jax.random.key(0)
    first, second = (loader.epoch(key, e, 128) for e in range(2))
    seen = np.sort(np.asarray(first.rows).ravel())
    assert first.rows.shape == (STEPS, 128)
    assert len(np.unique(seen)) == seen.size
    assert not np.array_equal(first.rows, second.rows)
    batch = loader.batch_at(second, jnp.int32(STEPS + 2))
    assert np.array_equal(batch.labels, loader.fixed_batch(second.rows[2]).labels)
    # The crops are another step's, the examples not.
    again = loader.batch_at(second, jnp.int32(2))
    assert np.array_equal(batch.labels, again.labels)
    assert not np.array_equal(batch.images, again.images)


def test_a_tally_reads_one_dispatch_late_and_in_order():
    values = np.float32([0.1, 0.7, 1e8, 0.3])
    single, several = RunningMeans({}, 0), RunningMeans({}, 0)
    for x in values:
        single.add({"loss": jnp.asarray([x]), "accuracy": jnp.zeros(1)}, 1)
    several.add({"loss": jnp.asarray(values[:2]), "accuracy": jnp.zeros(2)}, 2)
    assert several.sums == {}
    several.add({"loss": jnp.asarray(values[2:]), "accuracy": jnp.zeros(2)}, 2)
    assert several.sums["loss"] == float(values[0]) + float(values[1])
    assert several.row() == single.row()
    assert several.steps == 4


@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_that_is_not_finite_is_found(steps):
    trainer = make_trainer(
        method="bp", optimizer="momentum", learning_rate=1e12, steps_per_dispatch=steps
    )
    with pytest.raises(NotFiniteError):
        train(trainer)


def compiled_in(call):
    """Names of the programs that a call compiles, or reads from the cache on disk."""
    names = []

    def listen(event, duration_secs, **of):
        if event.endswith("backend_compile_duration"):
            names.append(of.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        call()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return names


def test_what_the_end_of_an_epoch_needs_is_compiled_beside_its_steps(monkeypatch):
    plain = make_trainer()
    train(plain)
    needed = {"jit(evaluate)", "jit(probe)"}
    assert needed <= set(compiled_in(plain.measure))
    monkeypatch.setattr(Ahead, "pays", staticmethod(lambda: True))
    ahead = make_trainer()
    train(ahead)
    ahead.ahead.wait()
    assert not needed & set(compiled_in(ahead.measure))
    # Nothing else changes.
    train(plain), train(ahead)
    assert_equal_states(plain, ahead)


def test_what_fails_to_compile_ahead_fails_where_it_is_called():
    def wrong(x):
        raise ValueError("a fault of the program")

    def right(x):
        return x + 1

    ahead, (first, second), x = Ahead(), map(jax.jit, (wrong, right)), jnp.ones(3)
    ahead.begin([(first, (x,)), (second, (x,))])
    ahead.wait()
    with pytest.raises(ValueError, match="a fault of the program"):
        first(x)
    # The ones behind it are compiled.
    assert "jit(right)" not in compiled_in(lambda: second(x))
