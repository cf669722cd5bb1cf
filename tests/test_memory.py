"""Which runs are streamed, and that it changes nothing but memory."""

import dataclasses
import json

import jax
import pytest

from ssa_jax import data as data_lib
from ssa_jax.networks.forward import forward
from ssa_jax.runs import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.fitted import Described
from ssa_jax.runs.run import run
from ssa_jax.training import memory
from ssa_jax.training.memory import activation_bytes

SMALL = Config(dataset="digits", model="mlp", epochs=2, batch_size=128)


@pytest.fixture(scope="module")
def digits():
    return data_lib.load("digits")


def mode(config, data, device_bytes, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda: device_bytes)
    return build.build(config, data).memory


def test_auto_streams_where_the_tape_takes_over_half_the_device(digits, monkeypatch):
    built = build.build(SMALL, digits)
    params, mstate = built.state.params, built.state.mstate
    images = jax.ShapeDtypeStruct((128, *digits.image_shape), "float32")
    inputs = jax.eval_shape(
        lambda p, m, x: forward(built.units, p, m, x)[2].inputs, params, mstate, images
    )
    tape = sum(activation_bytes(built.units, built.method, params, mstate, inputs))
    assert tape > 128 * 4 * 64
    assert mode(SMALL, digits, 2 * tape, monkeypatch) == "taped"
    assert mode(SMALL, digits, 2 * tape - 1, monkeypatch) == "streamed"
    larger = dataclasses.replace(SMALL, batch_size=256)
    assert mode(larger, digits, 2 * tape, monkeypatch) == "streamed"


def test_auto_keeps_a_tape_that_fits_where_one_unit_is_nearly_all_of_it(monkeypatch):
    cifar = Described((16, 16, 3), 10, 512, "float32", None)
    config = Config(model="vgg13", rank_init=0.25, batch_size=32)
    joined = build.build(config, cifar)
    (lower, upper, last) = memory.held_bytes(
        joined.units, joined.method, joined.state.params, joined.state.mstate,
        jax.ShapeDtypeStruct((32, 16, 16, 3), "float32"),
    )  # fmt: skip
    tape = lower + upper + last
    assert (lower > 0.8 * tape, joined.held) == (True, tape)
    assert mode(config, cifar, tape, monkeypatch) == "taped"
    # What does not fit is streamed all the same.
    assert mode(config, cifar, tape - 1, monkeypatch) == "streamed"
    halves = dataclasses.replace(config, unit_size=5)
    assert mode(halves, cifar, build.build(halves, cifar).held, monkeypatch) == "streamed"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "bp"}, "streamed"),
        ({"method": "local"}, "taped"),
        ({"warmup_method": "local"}, "taped"),
        ({"warmup_method": "dfa"}, "streamed"),
        ({"memory": "taped"}, "taped"),
    ],
    ids=str,
)
def test_on_a_device_without_room(change, expected, digits, monkeypatch):
    assert mode(dataclasses.replace(SMALL, **change), digits, 1, monkeypatch) == expected


def test_memory_of_the_device_is_that_of_its_allocator_where_it_tells(monkeypatch):
    class Device:
        def memory_stats(self):
            return {"bytes_limit": 7}

    assert memory.device_bytes() > 2**28
    monkeypatch.setattr(memory.jax, "local_devices", lambda: [Device()])
    assert memory.device_bytes() == 7


@pytest.mark.long
def test_a_streamed_run_has_the_losses_of_a_taped_one(tmp_path):
    told = {}
    for asked in ("taped", "streamed"):
        folder = tmp_path / asked
        config = dataclasses.replace(
            SMALL, memory=asked, rank_schedule="hybrid", rank_init=1.0, workdir=str(folder)
        )
        assert run(config)["memory"] == asked
        assert json.loads((folder / "config.json").read_text())["config"]["memory"] == asked
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        told[asked] = [json.loads(x)[k] for x in lines for k in ("train_loss", "test_loss")]
    assert told["streamed"] == pytest.approx(told["taped"], rel=1e-4)
    assert told["taped"][2] < 0.9 * told["taped"][0]
