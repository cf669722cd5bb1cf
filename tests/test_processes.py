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

from experiments import processes, pulse, workdir
from experiments.config import Config, ConfigError
from experiments.workdir import Elsewhere, WorkdirError

ROOT = Path(__file__).parent.parent
SMALL = ("--dataset=digits", "--model=mlp", "--batch_size=128", "--rank_schedule=hybrid",
         "--rank_init=1.0")  # fmt: skip
EPOCHS = 3


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


def start(folder, *flags, devices=1, epochs=EPOCHS):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    args = [*SMALL, f"--epochs={epochs}", f"--workdir={folder}", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.cifar", *args],
        cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def start_two(folder, *flags, **kwargs):
    address = f"--coordinator_address=127.0.0.1:{port()}"
    return [
        start(folder, address, "--num_processes=2", f"--process_id={i}", *flags, **kwargs)
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


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process on one device."""
    folder = tmp_path_factory.mktemp("one") / "run"
    ended(start(folder))
    return folder


@pytest.mark.slow
def test_two_processes_train_what_one_trains(one, tmp_path):
    ended(start(tmp_path / "eight", devices=8))
    first, second = (ended(p) for p in start_two(tmp_path / "two", devices=4))
    assert_same_curve(tmp_path / "eight", one)
    assert_same_curve(tmp_path / "two", one)
    assert "epoch 1/" in first[0]
    # The second one leaves all words to the first.
    assert second[0] == ""
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sent"), [(1, signal.SIGKILL), (0, signal.SIGSTOP)])
def test_a_process_that_is_gone_ends_the_other_and_one_goes_on(one, tmp_path, victim, sent):
    folder = tmp_path / "run"
    pair = start_two(folder, "--save_every=2", epochs=EPOCHS, devices=4)
    wait_for(lambda: (folder / "metrics.jsonl").exists() and rows(folder), pair)
    pair[victim].send_signal(sent)
    began = time.monotonic()
    _, err = pair[1 - victim].communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert pair[1 - victim].returncode not in (0, None)
    assert "another process of this run is gone" in err
    pair[victim].kill()
    pair[victim].communicate()
    assert len(rows(folder)) < EPOCHS
    ended(start(folder, "--resume"))
    assert_same_curve(folder, one)


def wait_for(condition, pair):
    until = time.monotonic() + 120
    while not condition():
        assert all(p.poll() is None for p in pair), [p.communicate() for p in pair]
        assert time.monotonic() < until
        time.sleep(0.05)
