"""A mesh of devices trains what one device trains, and one device is left alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from ssa_jax import data as data_lib
from ssa_jax.errors import ConfigError
from ssa_jax.factors import Factors
from ssa_jax.parallel import mesh, processes
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.compiling import Compiling
from ssa_jax.parallel.mesh import AXIS, ONE_DEVICE, Layout, from_first, make_layout, on_host
from ssa_jax.runs import build
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.run import run
from ssa_jax.runs.trainer import Trainer
from ssa_jax.training import train
from ssa_jax.training.dispatch import make_dispatch

TESTS = Path(__file__).parent
EIGHT = Layout(AbstractMesh((8,), (AXIS,)), shard_factors=True)


def devices_process(*args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, TESTS / args[0], *args[1:]],
        env=env, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_one_device_has_no_mesh_and_programs_stay_as_they_are():
    assert make_layout(shard_factors=True) is ONE_DEVICE
    tree = {"a": jax.numpy.ones((4, 2)), "key": jax.random.key(0)}
    for put in (ONE_DEVICE.place, ONE_DEVICE.keep, ONE_DEVICE.whole, ONE_DEVICE.rows):
        assert put(tree)["a"] is tree["a"]
        assert put(tree)["key"] is tree["key"]
    assert ONE_DEVICE.returning(ONE_DEVICE.keep, run) is run


def test_rows_of_one_device_are_those_of_the_process():
    rows = {"a": np.arange(6).reshape(3, 2)}
    with jax.transfer_guard("disallow"):
        placed = ONE_DEVICE.place_rows(rows)
    assert isinstance(placed["a"], jax.Array)
    assert np.array_equal(placed["a"], rows["a"])


def test_one_device_runs_the_plain_step_without_any_mesh():
    config = Config(dataset="digits", model="mlp", batch_size=128, epochs=1)
    data = data_lib.load(config.dataset)
    built = build.build(config, data)
    trainer = Trainer(config, data, built, Compiling(), make_layout())
    feed = trainer.loader.epoch(trainer.state.key, 0, config.batch_size)
    step = train.make_step(*built[:2], built.optimizer, built.weights)
    plain = make_dispatch(step, trainer.loader.batch_at, 1).lower(trainer.state, feed).as_text()
    assert trainer.programs.steps.programs[1].lower(trainer.state, feed).as_text() == plain
    assert f'"{AXIS}"' not in plain


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((512, 32), (AXIS,)),
        ((8, 8), (AXIS,)),
        ((30, 8), ()),
        # As a moment that a factor shares has it.
        ((), ()),
    ],
)
def test_factors_in_parts_are_cut_along_the_axis_that_keeps_its_length(shape, spec):
    x = np.zeros(shape)
    tree = {"layer": Factors(x, np.zeros(8), x), "dense": x}

    def specs(layout, **kwargs):
        return jax.tree.map(lambda s: tuple(s.spec), layout.shardings(tree, **kwargs))

    assert specs(EIGHT) == {"layer": Factors(spec, (), spec), "dense": ()}
    for everywhere in (
        specs(EIGHT, whole=True), specs(EIGHT._replace(shard_factors=False))
    ):  # fmt: skip
        assert everywhere == {"layer": Factors((), (), ()), "dense": ()}


def test_a_batch_that_the_devices_do_not_divide_is_refused(monkeypatch):
    assert processes.layout(Config(batch_size=101)) is ONE_DEVICE
    monkeypatch.setattr(mesh, "make_layout", lambda shard_factors: EIGHT)
    with pytest.raises(ConfigError, match=r"^--batch_size must be a multiple of 8, .* got 100$"):
        processes.layout(Config(batch_size=100))
    assert processes.layout(Config(batch_size=104)) is EIGHT


def test_where_a_run_runs_is_no_part_of_what_it_is():
    elsewhere = dataclasses.replace(
        Config(), shard_params=True, coordinator_address="a:1", num_processes=2, process_id=1,
        distributed=True,
    )  # fmt: skip
    assert identity(elsewhere) == identity(Config())


def test_one_process_tells_itself():
    assert from_first("runs/größe") == "runs/größe"
    key = jax.random.key(3)
    assert np.array_equal(on_host(key), np.asarray(jax.random.key_data(key)))


HLO = """
  %a = f32[10]{0} all-reduce(%x), channel_id=1, to_apply=%sum
  %b = (f32[48,32]{1,0}, bf16[2,3]{1,0}) all-reduce(%x, %y), channel_id=2, to_apply=%sum
  %c = f32[16,4]{1,0:T(8,128)} all-gather(%x), channel_id=3, dimensions={0}
  %d = f32[] all-reduce-start(%x), channel_id=4
  %e = f32[] all-reduce-done(%d)
  %f = f32[10]{0} add(%a, %a), metadata={op_name="all-reduce(x)"}
"""


def test_collectives_are_read_off_a_program():
    found = collectives(HLO)
    assert [c.kind for c in found] == ["all-reduce", "all-reduce", "all-gather", "all-reduce"]
    assert [c.bytes for c in found] == [40, 4 * 48 * 32 + 12, 256, 4]
    assert found[1].arrays == (("f32", (48, 32)), ("bf16", (2, 3)))


SIZES = {"smallconv": 16, "vgg13": 32, "resnet32": 8}
NARROW_SIZE = 8


def test_a_step_makes_one_sum_over_the_devices_whatever_the_method():
    sent = devices_process("sums_on_devices.py")
    # Of regression the labels of some examples too, which are whole numbers.
    assert sent.pop("regression") == {"all-reduce": 2}
    assert set(sent) == {"bp", "svd_bp", "direct", "one ahead"}
    assert all(kinds == {"all-reduce": 1} for kinds in sent.values())


def trains_what_one_device_trains(model, method, dtype, rank, bound):
    size = str(SIZES.get(model, NARROW_SIZE))
    falling = method == "ssa" and rank != "constant"
    found = devices_process("mesh_on_devices.py", model, method, size, dtype, str(rank))
    for name, result in found.items():
        assert result["losses"] < bound, (name, result)
        assert result["state"] < bound, (name, result)
        assert result["compiles"][0] == result["compiles"][1], (name, result)
        assert result["compacted"] == falling, (name, result)
        assert (result["spread"] > 0) == (name == "parts"), (name, result)
    assert ("parts" in found) == falling


@pytest.mark.long
@pytest.mark.parametrize("method", ["bp", "dfa", "ssa"])
@pytest.mark.parametrize("model", SIZES)
def test_eight_devices_train_what_one_trains(model, method):
    """In float64: the same sums in another order, and nothing else.

    In float32 a rectifier whose input rounds to either side of zero sends the training of deep
    networks another way within ten steps, on eight devices as on one whose parameters are changed
    in their last place.
    """
    trains_what_one_device_trains(model, method, "float64", rank=0.25, bound=1e-12)


@pytest.mark.long
@pytest.mark.parametrize(("model", "bound"), [("mobilenet_v2", 1e-12), ("vit_tiny", 1e-6)])
def test_eight_devices_train_other_architectures_as_one_does(model, bound):
    """Depthwise convolutions; attention, whose softmax JAX computes in float32 even in float64."""
    trains_what_one_device_trains(model, "ssa", "float64", rank=1.0, bound=bound)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "method"), [("smallconv", "bp"), ("smallconv", "ssa"), ("resnet32", "dfa")]
)
def test_eight_devices_train_what_one_trains_to_the_rounding_of_float32(model, method):
    trains_what_one_device_trains(model, method, "float32", rank=1.0, bound=1e-4)


@pytest.mark.long
def test_batch_norms_of_each_devices_rows_wait_for_no_other_device():
    found = devices_process("statistics_on_devices.py")
    assert found["apart"] < 1e-12
    assert found["otherwise"] > 1e-4
    assert found["kinds"] == ["all-reduce"]
    # One sum of gradients, and one of running statistics and metrics.
    assert found["sums"][0] <= 2 < found["sums"][1]


def test_statistics_of_devices_need_batch_norms():
    config = Config(dataset="digits", model="mlp", batch_statistics="device")
    with pytest.raises(ConfigError, match="--model=mlp has none"):
        build.build(config, data_lib.load("digits"))
