"""Several processes train what one trains, and end when one of them is gone."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssa_jax.data import streams
from ssa_jax.errors import ConfigError, DataError
from ssa_jax.parallel import processes, pulse
from ssa_jax.runs import workdir
from ssa_jax.runs.config import Config
from ssa_jax.runs.workdir import Elsewhere, WorkdirError

ROOT = Path(__file__).parent.parent
# Ranks fall in the first epoch, and are compacted at its end.
SMALL = ("--dataset=digits", "--model=mlp", "--batch_size=128", "--rank_schedule=hybrid",
         "--rank_init=1.0", "--rank_target=0.3")  # fmt: skip
EPOCHS = 2
# Cheap to compile, and of many epochs, so that there is time to end one process in.
LONG = ("--dataset=digits", "--model=mlp", "--batch_size=64", "--method=bp", "--save_every=5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_processes": 2}, r"--num_processes needs --coordinator_address"),
        ({"process_id": 0}, r"--process_id needs --coordinator_address"),
        ({"coordinator_address": "a:1"}, r"needs --num_processes and, from 0 on, --process_id"),
        ({"coordinator_address": "a:1", "num_processes": 2}, r"from 0 on, --process_id"),
        (
            {"coordinator_address": "a:1", "num_processes": 2, "process_id": 2},
            r"--process_id must be less than --num_processes=2, got 2",
        ),
        (
            {"coordinator_address": "host", "num_processes": 2, "process_id": 0},
            r"--coordinator_address must be HOST:PORT, got host",
        ),
        (
            {"coordinator_address": "a:1", "distributed": True},
            r"give --distributed or --coordinator_address, not both",
        ),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message):
    with pytest.raises(ConfigError, match=message) as error:
        processes.join(dataclasses.replace(Config(), **flags))
    assert "\n" not in str(error.value)


def test_a_process_is_gone_when_its_pulse_rests_too_long_unless_it_is_done():
    heard = pulse.Heard({1, 2}, now=0.0)
    heard.hear({0: "5", 1: "0", 2: "0"}, now=1.0)
    heard.hear({1: "1", 2: "0"}, now=20.0)
    assert heard.gone(now=pulse.LIMIT_S) == []
    assert heard.gone(now=pulse.LIMIT_S + 2) == [2]
    heard.hear({1: "done"}, now=21.0)
    assert heard.gone(now=1000.0) == [2]
    # Also one that never told anything.
    assert pulse.Heard({1}, now=0.0).gone(now=pulse.LIMIT_S + 1) == [1]


def test_without_flags_a_process_is_alone():
    processes.join(Config())
    assert not processes.several()


def test_all_but_the_first_process_write_nothing_and_know_their_rows(tmp_path):
    folder = Elsewhere(tmp_path)
    assert not folder.ours
    folder.write_json("summary.json", {})
    for epoch in (1, 2):
        folder.log({"epoch": epoch})
    folder.keep_rows(1)
    assert folder.rows() == [{"epoch": 1}]
    assert not list(tmp_path.iterdir())


def test_one_process_opens_its_folder_or_says_why_not(tmp_path):
    config = Config(workdir=str(tmp_path / "run"))
    assert workdir.of_all(lambda: workdir.create(config)).ours
    with pytest.raises(WorkdirError, match="holds a run"):
        workdir.of_all(lambda: workdir.create(config))


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, *flags, devices=1, program="cifar"):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{program}", f"--workdir={folder}", *flags],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_two(folder, *flags, **options):
    address = f"--coordinator_address=127.0.0.1:{port()}"
    return [
        start(folder, *flags, address, "--num_processes=2", f"--process_id={i}", **options)
        for i in (0, 1)
    ]


def ended(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def rows(folder):
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_curve(folder, other):
    mine, theirs = rows(folder), rows(other)
    assert [r["ranks"] for r in mine] == [r["ranks"] for r in theirs]
    for name in ("train_loss", "test_loss", "train_accuracy", "test_accuracy"):
        assert [r[name] for r in mine] == pytest.approx([r[name] for r in theirs], rel=2e-3), name


@pytest.mark.long
def test_two_processes_train_what_one_trains(tmp_path):
    flags = (*SMALL, f"--epochs={EPOCHS}")
    ended(start(tmp_path / "one", *flags))
    ended(start(tmp_path / "eight", *flags, devices=8))
    # With factors in parts on both, which are gathered to be compacted and sealed.
    pair = start_two(tmp_path / "two", *flags, "--shard_params", devices=4)
    # The second one leaves all words to the first.
    (first, _), (second, _) = (ended(p) for p in pair)
    assert second == ""
    assert "epoch 1/2" in first
    for name in ("eight", "two"):
        assert_same_curve(tmp_path / name, tmp_path / "one")
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["status"] == "finished"
        # Stored ranks change once, after the first epoch.
        assert summary["compiles"] == 2


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR is not set")
def test_two_processes_decode_a_batch_between_them_and_train_what_one_trains(tmp_path):
    try:
        streams.load("tiny_imagenet10")
    except DataError:
        pytest.skip("tiny_imagenet10 is not prepared in TFDS_DATA_DIR")
    # The last of the batches of 500 test images is not whole.
    flags = ("--dataset=tiny_imagenet10", "--image_size=16", "--model=mlp", "--method=bp",
             "--batch_size=64", f"--epochs={EPOCHS}", "--train_size=512")  # fmt: skip
    ended(start(tmp_path / "one", *flags, program="imagenet"))
    for process in start_two(tmp_path / "two", *flags, devices=2, program="imagenet"):
        ended(process)
    assert_same_curve(tmp_path / "two", tmp_path / "one")
    top5 = [[r["test_top5_accuracy"] for r in rows(tmp_path / name)] for name in ("one", "two")]
    assert top5[0] == pytest.approx(top5[1], rel=2e-3)
    assert [r["skipped"] for r in rows(tmp_path / "two")] == [0, 0]


def end_one_of_two(folder, victim, sent, flags=LONG):
    """What the other one of two processes says and returns, and after how many seconds."""
    pair = start_two(folder, *flags, "--epochs=100")
    other = pair[1 - victim]
    try:
        until = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists():
            assert all(p.poll() is None for p in pair), [p.communicate() for p in pair]
            assert time.monotonic() < until
            time.sleep(0.05)
        pair[victim].send_signal(sent)
        began = time.monotonic()
        _, err = other.communicate(timeout=100)
        return err, other.returncode, time.monotonic() - began
    finally:
        for process in pair:
            process.kill()
            process.communicate()


@pytest.mark.long
def test_a_killed_process_ends_the_other_and_one_goes_on_alone(tmp_path):
    folder = tmp_path / "run"
    err, code, seconds = end_one_of_two(folder, 1, signal.SIGKILL)
    assert code == processes.EXIT_LOST, err
    assert processes.LOST in err
    assert seconds < 60
    done = len(rows(folder))
    ended(start(folder, *LONG, "--epochs=100", f"--max_steps={22 * (done + 2)}", "--resume"))
    ended(start(tmp_path / "one", *LONG, "--epochs=100", f"--max_steps={22 * (done + 2)}"))
    assert len(rows(folder)) == done + 2
    assert_same_curve(folder, tmp_path / "one")


@pytest.mark.long
def test_a_first_process_that_hangs_ends_the_other(tmp_path):
    err, code, seconds = end_one_of_two(tmp_path / "run", 0, signal.SIGSTOP)
    # JAX may be the first to notice.
    ours = code == processes.EXIT_LOST and processes.LOST in err
    assert ours or (code == -signal.SIGABRT and "another task died" in err), err
    assert seconds < 60


@pytest.mark.long
def test_sigterm_to_one_process_saves_in_all_and_ends_them(tmp_path):
    folder = tmp_path / "run"
    _, code, _ = end_one_of_two(folder, 1, signal.SIGTERM)
    assert code == 0
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"


@pytest.mark.long
def test_flags_that_do_not_fit_end_the_program_with_one_line(tmp_path):
    _, err = ended(start(tmp_path / "a", *SMALL, "--batch_size=100", devices=8), code=2)
    assert err.splitlines()[-1] == (
        "error: --batch_size must be a multiple of 8, the number of devices, got 100"
    )
    _, err = ended(start(tmp_path / "b", *SMALL, "--distributed"), code=2)
    assert "--distributed finds no TPU pod, SLURM or Open MPI job" in err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
