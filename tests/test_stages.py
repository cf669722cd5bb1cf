"""Stages of units on devices learn what one device learns from the same micro-batches."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_batch, make_method, split
from staged_steps import run
from test_processes import assert_same_curve, end_one_of_two, ended, rows, start, start_two

import ssa_jax
from ssa_jax.data import Dataset
from ssa_jax.errors import ConfigError
from ssa_jax.networks.units import Unit
from ssa_jax.parallel import buffers, processes
from ssa_jax.parallel.mesh import STAGE
from ssa_jax.parallel.pipeline import partition
from ssa_jax.runs import build
from ssa_jax.runs.config import Config, identity
from ssa_jax.stages import work
from ssa_jax.stages.choose import check_shared
from ssa_jax.stages.owners import dependencies, owners
from ssa_jax.training import optim, train

TESTS = Path(__file__).parent


def cost_of(costs, bounds):
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))


def test_no_partition_into_neighbours_has_a_cheaper_costliest_stage():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 9))
        stages = int(rng.integers(1, n + 1))
        costs = rng.integers(0, 20, n).tolist()
        found = partition(costs, stages)
        assert (found[0], found[-1], len(found)) == (0, n, stages + 1)
        assert all(a < b for a, b in itertools.pairwise(found))
        inner = itertools.combinations(range(1, n), stages - 1)
        assert cost_of(costs, found) == min(cost_of(costs, (0, *cut, n)) for cut in inner)


def test_more_stages_than_units_are_refused():
    with pytest.raises(ValueError, match=r"^3 units cannot be cut into 4 stages"):
        partition([1, 1, 1], 4)


def test_unequal_lists_of_arrays_come_out_of_buffers_as_they_went_in():
    lists = [
        [jnp.arange(6.0).reshape(2, 3), jnp.int32(7), jax.random.key(3)],
        [jnp.ones((4, 4)), jnp.array([True, False])],
        [],
    ]
    size = buffers.sizes(lists)
    assert size == {"float32": 16, "int32": 1, "uint32": 2, "bool": 2}
    for arrays in lists:
        packed = buffers.pack(arrays, size)
        assert {name: len(x) for name, x in packed.items()} == size
        for a, b in zip(arrays, buffers.unpack(packed, arrays), strict=True):
            assert a.dtype == b.dtype
            assert jnp.array_equal(a, b)


def test_equal_programs_of_stages_are_there_once():
    a, b = jnp.arange(3.0), jnp.arange(3.0) + 1
    branches = [lambda x: 2 * x, lambda x: 2 * x, lambda x: x * a, lambda x: x * b]

    def on_any(x):
        return work.on_stage(branches, None, x)

    program = jax.make_jaxpr(on_any, axis_env=[(STAGE, 4)])(a)
    (switch,) = (eqn for eqn in program.eqns if eqn.primitive.name == "cond")
    # Those of other arrays are others.
    assert len(switch.params["branches"]) == 3
    found = jax.vmap(on_any, in_axes=None, axis_size=4, axis_name=STAGE)(b)
    np.testing.assert_array_equal(found, [2 * b, 2 * b, a * b, b * b])


def test_what_is_made_of_what_is_seen_through_programs_within_programs():
    @jax.jit
    def apart(a, b, c):
        return jax.nn.relu(a) + b, c

    assert dependencies(lambda a, b, c: apart(a, b, c), 1.0, 2.0, 3.0) == [{0, 1}, {2}]


def found_owners(name, groups, **options):
    units, params, mstate = split("linear", rank=0.5)
    method = make_method(name, units, params, mstate, **options)
    optimizer = optim.make_optimizer(optim.OptimizerConfig(0.01, 10, 5))
    state = jax.eval_shape(
        lambda: train.init_state(method, optimizer, params, mstate, jax.random.key(0))
    )
    batch = jax.eval_shape(make_batch)
    outputs = jax.ShapeDtypeStruct((8, 5), jnp.float32)
    return state, owners(method, optimizer, groups, state, batch, outputs)


def paths_of(tree, numbers):
    named = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return {named[k] for k in numbers}


def test_a_stage_has_the_paths_twins_and_moments_of_its_units_and_no_others():
    state, own = found_owners("ssa", [[0, 1], [2, 3]])
    first, second = (paths_of(state.feedback, numbers) for numbers in own.feedback)
    assert {".paths[0]", ".paths[1]"} <= first
    assert ".paths[2]" in second
    assert all(name.startswith((".twins[0]", ".twins[1]", ".paths[")) for name in first)
    assert paths_of(state.feedback, own.common) == {".examples[0]"}
    kept = [paths_of(state.opt_state, numbers) for numbers in own.opt_state]
    both = kept[0] & kept[1]
    # Counts alone.
    assert both
    assert all(x.shape == () for path, x in named_leaves(state.opt_state) if path in both)
    assert kept[0] | kept[1] == {path for path, _ in named_leaves(state.opt_state)}


def named_leaves(tree):
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), x) for path, x in found]


def test_a_stage_has_the_readouts_of_its_units_and_their_moments():
    state, own = found_owners("local", [[0], [1, 2, 3]])
    first, second = (paths_of(state.feedback, numbers) for numbers in own.feedback)
    assert any(".mu[0]" in name for name in first)
    assert not any("[1]['" in name or "[2]['" in name for name in first)
    assert any(".nu[2]" in name for name in second)
    assert all("count" in name for name in paths_of(state.feedback, own.common))


@pytest.mark.parametrize("case", ["chain:ssa:1:4", "chain:ssa:1:4:taped", "linear:local:1:2"])
def test_one_stage_learns_what_a_step_learns_by_micro_batches_in_turn(case):
    found = run(case, "float32")
    assert found["exact"]
    assert found["losses"] < 1e-5
    assert found["state"] < 1e-5 < found["moved"]


def on_devices(dtype, *cases):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(
        [sys.executable, TESTS / "stages_on_devices.py", dtype, *cases],
        env=env, cwd=TESTS.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_stages_learn_what_one_device_learns():
    (found,) = on_devices("float64", "chain:ssa:4:2").values()
    assert found["exact"]
    # In every tick what goes up, and the outputs; then gradients over the rows of stages.
    assert found["sent"]["collective-permute"] == 1
    assert set(found["sent"]) <= {"collective-permute", "all-reduce"}
    assert found["losses"] < 1e-12
    assert found["state"] < 1e-12 < found["moved"]
    assert found["held"] < 0.4


# Layer norms compute in float32 whatever they are given.
BOUNDS = {"vit": 1e-6}


@pytest.mark.long
@pytest.mark.parametrize(
    "case",
    [
        "chain:ssa:8:1", "chain:ssa:8:16", "chain:mutual:4:2", "chain:regression:4:2",
        "chain:dfa:4:4", "chain:drtp:2:2", "conv:local:4:2:taped", "conv:auglocal:2:2",
        "vgg13:ssa:4:2", "vgg13:dfa:2:2:taped", "resnet32:dfa:8:2", "resnet32:ssa:4:2:taped",
        "vit:ssa:2:4", "vit:ssa:4:1:taped",
    ],
)  # fmt: skip
def test_stages_of_any_network_learn_what_one_device_learns(case):
    """In float64: the same sums in another order. Unequal stages, two and more devices a batch."""
    (found,) = on_devices("float64", case).values()
    assert found["exact"]
    bound = BOUNDS.get(case.split(":")[0], 1e-11)
    assert found["losses"] < bound
    assert found["state"] < bound < found["moved"]


@pytest.mark.long
def test_stages_learn_what_one_device_learns_to_the_rounding_of_float32():
    for found in on_devices("float32", "chain:ssa:8:4", "chain:local:4:2").values():
        assert found["losses"] < 1e-5
        assert found["state"] < 1e-4 < found["moved"]


def noise():
    images = np.zeros((64, 6, 6, 1), np.uint8)
    labels = np.arange(64, dtype=np.int32) % 10
    return Dataset(images, labels, images, labels, 10, 0, False)


DIRECT = Config(
    model="mlp", feedback_lookahead=0, stages=2, micro_batches=2, batch_size=16, epochs=1
)


def built(**settings):
    return build.build(dataclasses.replace(DIRECT, **settings), noise())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "bp"}, "signals that are made of the output error alone"),
        ({"method": "svd_bp"}, "give one of these, or --stages=1 --micro_batches=1"),
        ({"feedback": "sequential"}, "another --feedback than sequential"),
        ({"feedback_lookahead": 1}, "ssa with --feedback_lookahead=0"),
        ({"local_weight": 0.1}, "without --local_weight"),
        ({"rank_schedule": "stable_rank"}, "--rank_schedule=adaptive and stable_rank look at all"),
        ({"stages": 4}, "--stages must be at most 3, the number of units, got 4"),
        (
            {"stages": 3, "unit_size": 2},
            "must be at most 2, the number of units, got 3; where units are joined a smaller",
        ),
    ],
)
def test_what_cannot_learn_apart_is_refused_with_what_to_do(settings, message):
    with pytest.raises(ConfigError, match=message):
        built(**settings)


def test_units_that_share_parameters_must_lie_in_one_stage():
    shared = Unit(None, None, shared=frozenset(["kernel"]))
    units = [shared, Unit(None, None), shared]
    check_shared(units, (0, 3))
    with pytest.raises(ValueError, match="share kernel; give fewer --stages, or a larger"):
        check_shared(units, (0, 2, 3))


def test_stages_of_a_run_have_about_equal_work():
    found = built()
    assert found.memory == "streamed"
    # A layer of 512 x 512 after one of 36 x 512, and before the classifier.
    assert found.bounds == (0, 1, 3)
    assert built(stages=1, micro_batches=1).bounds == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": 3}, r"^--stages must divide 4, the number of devices, got 3$"),
        ({"batch_size": 100, "micro_batches": 8}, r"multiple of 16, --micro_batches for each of 2"),
        ({"shard_params": True}, r"^--shard_params is not for --stages=2$"),
        (
            {"stages": 1, "warmup_method": "bp"},
            r"^--warmup_method=bp is not for --micro_batches=2$",
        ),
    ],
)
def test_a_run_whose_devices_or_batch_do_not_fit_is_refused(settings, message, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    stub = processes.mesh.ONE_DEVICE._replace()
    monkeypatch.setattr(
        processes.mesh, "make_staged_layout", lambda stages: Rows(4 // stages, stub)
    )
    with pytest.raises(ConfigError, match=message):
        processes.layout(dataclasses.replace(DIRECT, **settings))


class Rows:
    """A layout of so many devices that share a batch."""

    def __init__(self, devices, layout):
        self.devices, self.layout = devices, layout


def test_the_number_of_stages_is_no_part_of_what_a_run_is_but_micro_batches_are():
    other = dataclasses.replace(DIRECT, stages=4)
    assert identity(other) == identity(DIRECT)
    assert identity(dataclasses.replace(DIRECT, micro_batches=4)) != identity(DIRECT)


@pytest.mark.slow
def test_fit_takes_micro_batches():
    data = noise()
    run = ssa_jax.fit(
        "mlp", data, method="dfa", epochs=1, batch_size=16, micro_batches=2, compile_cache="off"
    )
    (row,) = run.history
    assert np.isfinite(row["train_loss"])
    assert run.built.bounds == (0, 3)


FLAGS = ("--dataset=digits", "--model=mlp", "--batch_size=128", "--rank_schedule=hybrid",
         "--rank_init=1.0", "--rank_target=0.3", "--feedback_lookahead=0", "--micro_batches=4",
         "--epochs=2")  # fmt: skip
CURVE = ("train_loss", "test_loss", "angle_hidden", "ranks")


def curve(folder):
    return [[row.get(name) for name in CURVE] for row in rows(folder)]


@pytest.mark.long
def test_a_run_over_stages_resumes_bit_for_bit_and_from_another_number_of_stages(tmp_path):
    ended(start(tmp_path / "whole", *FLAGS, "--stages=2", devices=2))
    for name, stages in (("same", 2), ("other", 1)):
        ended(start(tmp_path / name, *FLAGS, "--stages=2", "--max_steps=17", devices=2))
        again = (f"--stages={stages}", "--resume")
        ended(start(tmp_path / name, *FLAGS, *again, devices=stages))
    assert curve(tmp_path / "same") == curve(tmp_path / "whole")
    for mine, theirs in zip(curve(tmp_path / "other"), curve(tmp_path / "whole"), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=1e-5)
        assert mine[3] == theirs[3]


@pytest.mark.long
def test_stages_on_two_processes_learn_what_those_of_one_do(tmp_path):
    ended(start(tmp_path / "one", *FLAGS, "--stages=2", devices=4))
    for process in start_two(tmp_path / "two", *FLAGS, "--stages=2", devices=2):
        ended(process)
    for mine, theirs in zip(curve(tmp_path / "two"), curve(tmp_path / "one"), strict=True):
        assert mine[:2] == pytest.approx(theirs[:2], rel=2e-3)


@pytest.mark.long
def test_a_stage_that_dies_ends_the_run_whose_checkpoint_is_whole(tmp_path):
    folder = tmp_path / "run"
    flags = ("--dataset=digits", "--model=mlp", "--batch_size=64", "--method=dfa",
             "--save_every=5", "--micro_batches=2")  # fmt: skip
    # A process a stage.
    err, code, seconds = end_one_of_two(folder, 1, signal.SIGKILL, (*flags, "--stages=2"))
    assert code == processes.EXIT_LOST, err
    assert processes.LOST in err
    assert seconds < 60
    done = len(rows(folder))
    to = ("--epochs=100", f"--max_steps={22 * (done + 1)}")
    ended(start(folder, *flags, *to, "--stages=2", "--resume", devices=2))
    ended(start(tmp_path / "one", *flags, *to))
    assert len(rows(folder)) == done + 1
    assert_same_curve(folder, tmp_path / "one")
