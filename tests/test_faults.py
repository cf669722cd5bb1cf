"""Runs that are killed, stopped, damaged or starved end in what an untouched run gives, or say why.

The programs are real processes. They share a compilation cache, so that each starts quickly.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import max_difference
from jax.experimental.compilation_cache import compilation_cache

from ssa_jax import data as data_lib
from ssa_jax import factors
from ssa_jax.errors import ConfigError, NotFiniteError
from ssa_jax.factors import Factors
from ssa_jax.parallel.interrupt import Interruptible, Terminated
from ssa_jax.runs import build, given, loop, run
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.workdir import WorkdirError
from ssa_jax.training.checkpoint import CheckpointError, Checkpoints

ROOT = Path(__file__).parent.parent
STEPS = 11
SMALL = Config(
    dataset="digits", model="mlp", batch_size=128, epochs=3, rank_schedule="hybrid", rank_init=1.0
)
# What may differ between two runs of one configuration.
TIMED = {"images_per_second", "wall_s", "compiles", "compile_s"}


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Every run compiles the same programs; keeps them for the runs of this module."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    folder = before[names[0]] or str(tmp_path_factory.mktemp("compiled"))
    for name, value in zip(names, (folder, 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def rows(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMED} for x in lines]


def summary(folder):
    return json.loads((Path(folder) / "summary.json").read_text())


def last_state(folder, config=SMALL):
    like = build.build(config, data_lib.load("digits")).state
    return Checkpoints(Path(folder) / "checkpoints", config=identity(config)).restore(like)[1]


def assert_equal_runs(folder, other):
    assert rows(folder) == rows(other)
    a, b = (jax.tree.leaves(last_state(f)._replace(key=None)) for f in (folder, other))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def at(config, folder, **change):
    return dataclasses.replace(config, workdir=str(folder), **change)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An untouched run, whose ranks change on the way."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run.run(at(SMALL, folder))
    stored = [tuple(r["ranks"].values()) for r in rows(folder)]
    assert len(set(stored)) > 1
    return folder


@pytest.fixture
def signal_at(monkeypatch):
    """Sends a signal to this process before a step."""

    def arrange(step, number):
        between = loop.Loop._between_steps

        def sending(self, current, means):
            if current == step:
                signal.raise_signal(number)
            between(self, current, means)

        monkeypatch.setattr(loop.Loop, "_between_steps", sending)
        return monkeypatch.undo

    return arrange


def test_a_signal_behind_the_last_step_is_heard_by_what_comes_after_the_run(tmp_path):
    def stop(row):
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Terminated, match="had finished"):
        run.train_given(
            at(SMALL, tmp_path / "run", epochs=1), given=given.NOTHING._replace(callbacks=(stop,))
        )
    assert summary(tmp_path / "run")["status"] == "finished"


@pytest.mark.parametrize(
    ("number", "error"),
    [
        pytest.param(signal.SIGTERM, Terminated, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.long),
    ],
)
def test_a_run_stopped_within_an_epoch_goes_on_bit_for_bit(
    number, error, whole, signal_at, tmp_path
):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    undo = signal_at(2 * STEPS + 4, number)
    with pytest.raises(error, match=f"after step {2 * STEPS + 4} is kept.*--resume") as caught:
        run.run(at(SMALL, tmp_path / "run"))
    assert type(caught.value) is error
    undo()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert len(rows(tmp_path / "run")) == 2
    assert run.run(at(SMALL, tmp_path / "run", resume=True))["status"] == "finished"
    assert_equal_runs(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_run_of_several_steps_a_program_stops_between_two_and_goes_on(whole, signal_at, tmp_path):
    """And is bit for bit a run of single steps, without convolutions, through compactions."""
    several = dataclasses.replace(SMALL, steps_per_dispatch=4)
    # The first step of an epoch may cut ranks, and is a program of its own.
    undo = signal_at(2 * STEPS + 5, signal.SIGTERM)
    with pytest.raises(Terminated, match=f"after step {2 * STEPS + 5} is kept"):
        run.run(at(several, tmp_path / "run"))
    undo()
    run.run(at(several, tmp_path / "run", resume=True))
    assert rows(tmp_path / "run") == rows(whole)
    a = last_state(tmp_path / "run", several)._replace(key=None)
    b = last_state(whole)._replace(key=None)
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    assert all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.long
def test_steps_that_end_within_an_epoch_are_kept(whole, tmp_path):
    """Each part logs what it saw of its last epoch; the next takes that row back."""
    for limit in (STEPS + 3, STEPS + 3, 2 * STEPS):
        config = at(SMALL, tmp_path / "run", max_steps=limit, resume=(tmp_path / "run").exists())
        stopped = run.run(config)
        assert (stopped["status"], stopped["steps"]) == ("stopped", limit)
        assert stopped["epochs"] == limit // STEPS
        assert len(rows(tmp_path / "run")) == -(-limit // STEPS)
    run.run(at(SMALL, tmp_path / "run", resume=True))
    assert_equal_runs(tmp_path / "run", whole)


def test_the_second_signal_acts_at_once():
    with Interruptible() as interrupt:
        assert not interrupt.requested
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.requested
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        with pytest.raises(Terminated):
            interrupt.check()


@pytest.mark.long
def test_a_run_killed_before_its_first_checkpoint_begins_anew(whole, tmp_path):
    folder = tmp_path / "run"
    run.run(at(SMALL, folder, max_steps=3))
    shutil.rmtree(folder / "checkpoints")
    run.run(at(SMALL, folder, resume=True))
    assert_equal_runs(folder, whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    run.run(at(SMALL, folder, save_every=4, max_steps=2 * STEPS + 5))
    newest = Checkpoints(folder / "checkpoints").latest()
    assert newest == 2 * STEPS + 5
    for file in (folder / "checkpoints" / str(newest) / "state").rglob("manifest.ocdbt"):
        os.truncate(file, 10)
    capsys.readouterr()
    run.run(at(SMALL, folder, resume=True))
    told = [x for x in capsys.readouterr().out.splitlines() if " is damaged" in x]
    assert len(told) == 1
    assert told[0].startswith(f"checkpoint {newest} is damaged (")
    assert told[0].endswith("going back to checkpoint 24")
    assert (folder / "checkpoints" / f"{newest}.damaged").is_dir()
    assert_equal_runs(folder, whole)


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_refused_wherever_it_lies(whole, tmp_path):
    other = at(SMALL, tmp_path / "other", method="bp", factorize="on")
    run.run(dataclasses.replace(other, max_steps=1))
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    shutil.copytree(whole / "checkpoints", tmp_path / "other" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"another run: .*method=bp here and ssa there"):
        run.run(dataclasses.replace(other, resume=True))
    with pytest.raises(WorkdirError, match="model=smallconv here and mlp there"):
        run.run(at(SMALL, whole, model="smallconv", resume=True))


@pytest.mark.slow
def test_the_best_epoch_is_named_and_kept(whole):
    found, logged = summary(whole), rows(whole)
    best = max(logged, key=lambda r: (r["test_accuracy"], r["epoch"]))
    assert (found["best_epoch"], found["best_test_accuracy"]) == (
        best["epoch"], best["test_accuracy"]
    )  # fmt: skip
    assert Checkpoints(whole / "checkpoints").best() == best["step"]


PLAIN = dataclasses.replace(SMALL, method="bp", rank_schedule="none")


@pytest.mark.slow
def test_a_rollback_halves_the_rate_until_the_loss_is_finite(tmp_path, monkeypatch):
    """Poisoned gradients stand for a rate that is too high: they end once it was halved twice."""
    make = build.build

    def poisoned(config, data, rate_scale=1.0, **given):
        built = make(config, data, rate_scale, **given)
        if rate_scale > 0.3:
            update = built.optimizer.update

            def spoil(gradients, state, params):
                updates, state = update(gradients, state, params)
                return jax.tree.map(lambda u: u * jnp.nan, updates), state

            built = built._replace(optimizer=built.optimizer._replace(update=spoil))
        return built

    monkeypatch.setattr(build, "build", poisoned)
    config = at(PLAIN, tmp_path / "run", on_nan="rollback", max_steps=STEPS + 3)
    run.run(config)
    stopped = summary(tmp_path / "run")
    assert stopped["rollbacks"] == [{"step": 3, "to_step": 0}] * 2
    done = run.run(dataclasses.replace(config, resume=True, max_steps=0))
    assert (done["status"], done["rollbacks"]) == ("finished", stopped["rollbacks"])
    assert [r["rollbacks"] for r in rows(tmp_path / "run")] == [2] * SMALL.epochs
    monkeypatch.undo()
    slow = make(PLAIN, data_lib.load("digits"), 0.25)
    for row in rows(tmp_path / "run"):
        assert row["learning_rate"] == pytest.approx(float(slow.learning_rate(row["step"] - 1)))


@pytest.mark.slow
def test_rollbacks_are_bounded(tmp_path):
    config = at(PLAIN, tmp_path / "run", optimizer="momentum", learning_rate=1e30,
                on_nan="rollback")  # fmt: skip
    with pytest.raises(NotFiniteError, match="not finite in epoch 1; the state after step 0"):
        run.run(config)
    found = summary(tmp_path / "run")
    assert (found["status"], len(found["rollbacks"])) == ("not_finite", loop.MAX_ROLLBACKS)


def drifted(seed, d_out=12, d_in=9, rank=6, size=0.05):
    keys = jax.random.split(jax.random.key(seed), 3)
    u, v = (jnp.linalg.qr(jax.random.normal(k, (n, rank)))[0] for k, n in
            zip(keys, (d_out, d_in), strict=False))  # fmt: skip
    noise = [size * jax.random.normal(k, x.shape)
             for k, x in zip(jax.random.split(keys[2]), (u, v), strict=True)]  # fmt: skip
    s = jnp.asarray([0.5, -2.0, 0.0, 1.0, 0.0, 3.0])
    return Factors(u + noise[0], s, v + noise[1])


@pytest.mark.parametrize("seed", range(3))
def test_orthonormalized_factors_are_the_same_weight(seed):
    before = drifted(seed)
    after = factors.orthonormalized(before)
    assert float(factors.orthogonality_error([before])) > 0.05
    assert float(factors.orthogonality_error([after])) < 1e-6
    assert max_difference(factors.to_dense(before), factors.to_dense(after)) < 1e-6
    # Triplets keep their places and signs, and a truncated one stays truncated.
    assert np.array_equal(np.sign(after.s), np.sign(before.s))
    assert np.array_equal(np.argsort(np.abs(after.s)), np.argsort(np.abs(before.s)))
    for x, y in ((before.u, after.u), (before.v, after.v)):
        assert float(jnp.min(jnp.sum(x * y, 0)[jnp.asarray([0, 1, 3, 5])])) > 0.8
    again = factors.orthonormalized(after)
    # Of vectors whose singular values are zero the span alone is determined: rounding turns them.
    kept = jnp.asarray([0, 1, 3, 5])
    pairs = list(zip(after, again, strict=True))
    assert max(max_difference(x[..., kept], y[..., kept]) for x, y in pairs) < 1e-6
    assert max(max_difference(x, y) for x, y in pairs) < 1e-4


@pytest.mark.slow
def test_drift_above_its_bound_is_repaired_and_logged(tmp_path):
    loose = at(SMALL, tmp_path / "a", rank_schedule="none", retraction="none", epochs=2,
               projection="none", drift_bound=1e-3)  # fmt: skip
    run.run(loose)
    for row in rows(tmp_path / "a"):
        assert row["drift"] > 1e-3
        assert row["drift_repaired"] < 1e-5
        assert row["test_accuracy"] == pytest.approx(row["test_accuracy_before_repair"], abs=0.003)
    run.run(at(loose, tmp_path / "b", drift_bound=0.0))
    assert all("drift_repaired" not in row for row in rows(tmp_path / "b"))
    assert rows(tmp_path / "b")[-1]["drift"] > rows(tmp_path / "a")[-1]["drift"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"save_every": -1}, "--save_every must be at least 0"),
        ({"keep_checkpoints": 0}, "--keep_checkpoints must be at least 1"),
        ({"on_nan": "pray"}, "--on_nan must be one of stop, rollback"),
        ({"drift_bound": -1.0}, "--drift_bound must be at least 0"),
        ({"drift_bound": float("nan")}, "--drift_bound must be at least 0"),
        ({"drift_bound": float("inf")}, "--drift_bound must be finite"),
    ],
)
def test_limits_of_the_fault_flags(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **change).validate()


# Real processes.

FLAGS = [
    f"--{name}={getattr(SMALL, name)}"
    for name in ("dataset", "model", "batch_size", "epochs", "rank_schedule", "rank_init")
]


@pytest.fixture(scope="module")
def cache(compiled_once):
    """An environment in which programs find what earlier ones compiled."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def start(folder, env, *flags, prefix=()):
    resume = ["--resume"] if (Path(folder) / "config.json").exists() else []
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "experiments.cifar", *FLAGS, f"--workdir={folder}",
         *resume, *flags],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def trained_steps(folder):
    return Checkpoints(Path(folder) / "checkpoints").latest() or 0


@pytest.fixture(scope="module")
def whole_process(cache, tmp_path_factory):
    """An untouched run of a process, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("process") / "run"
    for name in ("warm", "run"):
        begun = time.monotonic()
        code, _, err = finish(start(folder.with_name(name), cache))
        assert code == 0, err
    return folder, time.monotonic() - begun


KILLS = 5


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_any_moment_ends_as_if_it_was_not(seed, whole_process, cache, tmp_path):
    """Twenty kills in all, in starts, steps, measurements and saves alike.

    A run that ends before it is killed is compared too, and another one begins.
    """
    expected, seconds = whole_process
    rng, kills, finished = np.random.default_rng(seed), 0, 0

    def compare():
        assert summary(folder)["status"] == "finished"
        assert_equal_runs(folder, expected)

    folder = tmp_path / "0"
    while kills < KILLS:
        process = start(folder, cache, "--save_every=2", "--keep_checkpoints=1")
        try:
            _, err = process.communicate(timeout=rng.uniform(0.3, 1) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            if not (folder / "config.json").exists():
                shutil.rmtree(folder, ignore_errors=True)
            continue
        assert process.returncode == 0, err
        compare()
        finished += 1
        folder = tmp_path / str(finished)
    code, _, err = finish(start(folder, cache))
    assert code == 0, err
    compare()


@pytest.mark.long
def test_sigterm_saves_and_ends_in_good_order(whole_process, cache, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, cache)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and rows(folder))
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert (code, err) == (0, "")
    assert "stopped by SIGTERM; the state after step" in out.splitlines()[-1]
    assert f"--workdir={folder} --resume" in out.splitlines()[-1]
    code, _, err = finish(start(folder, cache))
    assert code == 0, err
    assert_equal_runs(folder, whole_process[0])


def assert_refused(result, message):
    code, out, err = result
    assert code == 2, err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in out + err


@pytest.mark.long
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(whole_process, cache, tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "disk" / "run"
    disk.mkdir()
    size = sum(f.stat().st_size for f in whole_process[0].rglob("*") if f.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={3 * size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        code, _, err = finish(start(folder, cache, f"--max_steps={STEPS}"))
        assert code == 0, err
        kept = trained_steps(folder)
        ballast = disk / "ballast"
        free = shutil.disk_usage(disk).free
        ballast.write_bytes(bytes(free - size // 20))
        assert_refused(finish(start(folder, cache)), "No space left on device")
        assert trained_steps(folder) == kept
        ballast.unlink()
        code, _, err = finish(start(folder, cache))
        assert code == 0, err
        assert_equal_runs(folder, whole_process[0])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.long
def test_a_limit_on_files_ends_the_run_and_leaves_the_last_checkpoint(
    whole_process, cache, tmp_path
):
    """As a full disk, where none can be mounted: writing beyond the limit fails with EFBIG."""
    folder = tmp_path / "run"
    code, _, err = finish(start(folder, cache, f"--max_steps={STEPS}"))
    assert code == 0, err
    kept = trained_steps(folder)
    limited = ("bash", "-c", 'trap "" XFSZ; ulimit -f 20; exec "$@"', "limited")
    result = finish(start(folder, cache, prefix=limited))
    assert_refused(result, "a checkpoint could not be written to")
    assert trained_steps(folder) == kept
    code, _, err = finish(start(folder, cache))
    assert code == 0, err
    assert_equal_runs(folder, whole_process[0])
