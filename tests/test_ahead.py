"""Programs compiled for devices that are not here, and the plan of a run on them."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from benchmarks import aot, aot_page
from ssa_jax.errors import ConfigError
from ssa_jax.factors import named_leaves
from ssa_jax.parallel import ahead
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.mesh import AXIS, Layout
from ssa_jax.runs import plan
from ssa_jax.runs.build import Devices, build
from ssa_jax.runs.config import Config
from ssa_jax.runs.fitted import Described
from ssa_jax.training import train
from ssa_jax.types import Batch

ROOT = Path(__file__).parent.parent
DIGITS = Described((8, 8, 1), 10, 1_400, "float32", None)
INSTALLED = {
    "h100": importlib.util.find_spec("jax_plugins.xla_cuda12") is not None
    if importlib.util.find_spec("jax_plugins")
    else False,
    "v5e:2x2": importlib.util.find_spec("libtpu") is not None,
}


def here():
    """A target that is this machine's own CPU, for what needs no other compiler."""
    mesh = jax.sharding.Mesh(jax.devices()[:1], (AXIS,))
    return ahead.Target("here", Layout(mesh), "cpu", ahead.Rates(1e9, 1e10, 1e10), {})


@pytest.mark.parametrize("name", ["a100", "h100:2", "h100x0", "h100x", "v5e", "", "v5p:"])
def test_an_unknown_target_is_told_with_those_there_are(name):
    with pytest.raises(ConfigError, match="a target is h100, v5e:AxB or v5p:AxBxC, got"):
        ahead.target(name)


@pytest.mark.parametrize(("name", "extra"), [("h100", "aot-cuda"), ("v5e:2x2", "aot-tpu")])
def test_a_compiler_that_is_missing_is_named(name, extra):
    if INSTALLED[name]:
        pytest.skip(f"the compiler for {name} is installed here")
    with pytest.raises(ConfigError, match=rf"pip install '\.\[{extra}\]', and the device is not"):
        ahead.target(name)


def test_a_program_is_counted():
    x = jnp.ones((8, 8))

    def looping(x):
        return jax.lax.while_loop(lambda c: jnp.sum(c) < 1e3, lambda c: c @ c, x)

    plain = ahead.compiled(jax.jit(lambda x: x @ x), ahead.shaped((x,), here()), here())
    looped = ahead.compiled(jax.jit(looping), ahead.shaped((x,), here()), here())
    assert (plain.loops, plain.conditionals, plain.collectives) == (0, 0, 0)
    assert plain.kernels >= 1
    assert looped.loops == 1
    assert (plain.products, looped.products) == (1, 1)

    def three(x, y):
        return (x @ x) @ (x @ x), y @ x

    # Of one shape and another: equal products are one, whatever they multiply.
    args = ahead.shaped((x, jnp.ones((3, 8))), here())
    assert ahead.compiled(jax.jit(three), args, here()).products == 2
    assert plain.bytes >= 2 * x.nbytes


def test_collectives_are_read_through_tiled_layouts():
    hlo = (
        "  %a = (f32[8,128]{1,0:T(8,128)}, bf16[16]{0:T(512)S(1)}) all-reduce(%x, %y), "
        "replica_groups={{0,1}}\n  %b = f32[4]{0:T(128)} all-gather(%z), dimensions={0}\n"
    )
    found = collectives(hlo)
    assert [c.kind for c in found] == ["all-reduce", "all-gather"]
    assert [c.bytes for c in found] == [4 * 8 * 128 + 2 * 16, 16]


def test_the_step_of_ssa_has_no_loop_and_no_conditional_that_backpropagation_has_not():
    def programs(method, schedule):
        config = Config(
            model="mlp", dataset="digits", method=method, rank_schedule=schedule, batch_size=32
        )
        built = build(config, DIGITS)
        made = plan.planned(built, DIGITS.example, 32, here())
        return {p.program: p for p in made}, sum(x.nbytes for x in jax.tree.leaves(built.state))

    (bp, _), (ssa, state) = programs("bp", "none"), programs("ssa", "hybrid")
    assert bp.keys() == {"initialisation", "step", "evaluation"}
    # Ranks that fall are sliced by a program of the state alone: the old one and the new.
    assert ssa.keys() == bp.keys() | {"refresh", "compaction"}
    assert ssa["compaction"].macs == 0
    assert state < ssa["compaction"].compiled.bytes < 2.1 * state
    # A platform may run a gather of its own in a loop, in both alike.
    assert ssa["step"].compiled.loops == bp["step"].compiled.loops
    assert ssa["step"].compiled.conditionals == bp["step"].compiled.conditionals == 0
    for found in (bp, ssa):
        assert found["step"].macs > found["evaluation"].macs > 0
        assert found["step"].best_s > 0


def test_what_is_counted_is_the_form_that_the_target_takes(monkeypatch):
    """A pair of convolutions here, on an accelerator the one kernel, of more products."""
    monkeypatch.setattr(ahead, "compiled", lambda *args: ahead.TooLarge(0.0, 0.0, None))
    data = Described((16, 16, 3), 10, 1_400, "float32", None)
    built = build(Config(rank_init=0.25, batch_size=32, memory="taped"), data)

    def macs(platform):
        made = plan.planned(built, data.example, 32, here()._replace(platform=platform))
        return next(p.macs for p in made if p.program == "step")

    assert macs("tpu") > macs("cpu") > 0


def test_a_step_of_the_default_has_neither_before_it_is_compiled():
    built = build(Config(model="mlp", dataset="digits", rank_schedule="hybrid"), DIGITS)
    step = train.make_step(built.units, built.method, built.optimizer, built.weights)
    batch = Batch(jnp.zeros((32, 8, 8, 1)), jnp.zeros(32, jnp.int32))
    program = str(jax.make_jaxpr(step)(built.state, batch))
    assert "while[" not in program
    # A choice by platform is made when the program is lowered.
    assert program.count("cond[") == program.count("branches_platforms=(('cpu',), None)")


def test_the_plan_says_what_does_not_fit_and_what_does_not_divide(monkeypatch):
    small = here()._replace(rates=ahead.Rates(1e3, 1e10, 1e10))
    monkeypatch.setattr(ahead, "target", lambda name, stages: small)
    config = Config(model="mlp", dataset="digits", batch_size=32)
    text = list(plan.lines(config, DIGITS, "here"))
    assert len(text) == 4
    assert all("DOES NOT FIT" in line for line in text if line.startswith("step"))

    class Two(Layout):
        devices = 3

    built = build(config, DIGITS)
    with pytest.raises(ConfigError, match="must be a multiple of the 3 devices of here, got 32"):
        next(plan.planned(built, DIGITS.example, 32, small._replace(layout=Two(None))))


def test_a_plan_keeps_a_tape_where_the_target_has_room_for_its_share_of_the_batch(monkeypatch):
    """By the memory and the number of the target's devices, not of those that plan."""
    monkeypatch.setattr(ahead, "compiled", lambda *args: ahead.TooLarge(0.0, 0.0, None))
    config = Config(model="mlp", dataset="digits", batch_size=512)
    whole, share = (build(config, DIGITS, devices=Devices(n, 1e12)).held for n in (1, 4))
    assert share < whole / 2

    class Four(Layout):
        devices = 4

    def step(memory, layout):
        target = here()._replace(rates=ahead.Rates(memory, 1e10, 1e10), layout=layout)
        monkeypatch.setattr(ahead, "target", lambda name, stages: target)
        return next(line for line in plan.lines(config, DIGITS, "here") if line.startswith("step"))

    one, four = here().layout, Four(here().layout.mesh)
    assert not step(2.1 * whole, one).endswith("streamed")
    assert step(1.9 * whole, one).endswith("streamed")
    assert not step(2.1 * share, four).endswith("streamed")
    assert step(1.9 * share, four).endswith("streamed")


@pytest.mark.parametrize("parts", [False, True])
def test_a_plan_puts_factors_where_the_run_does(parts, monkeypatch):
    seen = []

    def record(program, args, where):
        seen.append(args[0])
        return ahead.TooLarge(0.0, 0.0, None)

    monkeypatch.setattr(ahead, "compiled", record)
    monkeypatch.setattr(ahead, "target", lambda name, stages: here())
    config = Config(model="mlp", dataset="digits", batch_size=32, shard_params=parts)
    list(plan.lines(config, DIGITS, "here"))
    # Of the initialisation, whose first argument are the parameters.
    factors = named_leaves(seen[0])
    assert factors
    for f in factors.values():
        spread = PartitionSpec(AXIS) if parts else PartitionSpec()
        assert (f.u.sharding.spec, f.v.sharding.spec) == (spread, spread)
        assert f.s.sharding.spec == PartitionSpec()


REFUSALS = {
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (53.67G) exceeds available HBM (15.75G).": 53.67 * 2**30,
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.5M of 15.48G hbm.":
        512.5 * 2**20,
    "RESOURCE_EXHAUSTED: no more is said": None,
}  # fmt: skip


def donates(text):
    """Whether the text of a program, such as that of a step, gives away an argument."""
    return "jax.buffer_donor" in text or "tf.aliasing_output" in text


def refuse(monkeypatch, message, which=lambda text: True):
    """Makes the compiler refuse programs of whose text that holds."""
    compiles = jax.stages.Lowered.compile

    def compile(self, **options):
        if which(self.as_text()):
            raise jax.errors.JaxRuntimeError(message)
        return compiles(self, **options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)


@pytest.mark.parametrize("message", REFUSALS)
def test_a_program_that_is_refused_for_want_of_memory_says_what_it_asks_for(monkeypatch, message):
    refuse(monkeypatch, message)
    x = ahead.shaped((jnp.ones((8, 8)),), here())
    found = ahead.compiled(jax.jit(lambda x: x @ x), x, here())
    assert isinstance(found, ahead.TooLarge)
    assert found.bytes == (None if REFUSALS[message] is None else round(REFUSALS[message]))


def test_a_compiler_that_fails_for_another_reason_is_heard(monkeypatch):
    refuse(monkeypatch, "INTERNAL: a fault")
    x = ahead.shaped((jnp.ones((8, 8)),), here())
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        ahead.compiled(jax.jit(lambda x: x @ x), x, here())


def test_the_plan_of_a_step_that_is_refused_goes_on_with_the_other_programs(monkeypatch):
    monkeypatch.setattr(ahead, "target", lambda name, stages: here())
    config = Config(model="mlp", dataset="digits", method="bp", batch_size=32)
    refuse(monkeypatch, next(iter(REFUSALS)), donates)
    text = dict(line.split(": ", 1) for line in plan.lines(config, DIGITS, "here"))
    assert text["step"] == "DOES NOT FIT: the compiler asks for 53.67 GiB, of 1 a device"
    assert text["evaluation"].startswith("fits in")


def test_a_refused_program_is_a_row_and_a_line_of_the_page(monkeypatch):
    monkeypatch.setattr(ahead, "target", lambda name: here())
    refuse(monkeypatch, next(iter(REFUSALS)), donates)
    args = argparse.Namespace(
        quick=True, imagenet=False, models=[], target=["here"], batch=[32]
    )  # fmt: skip
    rows = [row for part in aot.measure(args) for row in part]
    refused = [row for row in rows if row["refused"]]
    assert [row["program"] for row in refused] == ["step"] * 3
    assert all(row["bytes"] == round(53.67 * 2**30) for row in refused)
    assert rows[-1]["program"] == "compaction"
    page = aot_page.aot({"rows": rows, "hardware": "", "versions": {}, "commit": ""})
    assert page.count(f"asks for {53.67 * 1024:.0f}: does not fit") == 3
    assert "the compiler refuses" in page
    assert "statistics by device" not in page
    by_device = {"rows": [row | {"statistics": "device"} for row in rows]}
    page = aot_page.aot({"hardware": "", "versions": {}, "commit": ""} | by_device)
    assert page.count(", statistics by device") == len(rows)


@pytest.mark.parametrize(("model", "normed"), [("mlp", False), ("smallconv", True)])
def test_batch_norms_are_counted_by_device_where_there_are_some(model, normed, monkeypatch):
    class Four(Layout):
        devices = 4

    several = here()._replace(layout=Four(here().layout.mesh))
    monkeypatch.setattr(ahead, "target", lambda name: several)
    monkeypatch.setattr(ahead, "compiled", lambda *args: ahead.TooLarge(0.0, 0.0, None))
    args = argparse.Namespace(
        quick=False, imagenet=False, models=[model], target=["here"], batch=[32]
    )  # fmt: skip
    steps = [r for part in aot.measure(args) for r in part if r["program"] == "step"]
    found = [r["method"] for r in steps if r["statistics"] == "device"]
    assert found == (["bp", "ssa"] if normed else [])
    assert {r["method"] for r in steps} == {"bp", "svd_bp", "ssa"}


def test_a_plan_trains_nothing_and_says_in_a_line_what_is_missing():
    if INSTALLED["h100"]:
        pytest.skip("the compiler for h100 is installed here")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cifar", "--dataset=digits", "--plan=h100"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install '.[aot-cuda]'" in done.stderr
    assert "epoch" not in done.stdout


# Tests keep what they compile, and what is for other devices cannot be loaded here.
UNREADABLE = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")


@UNREADABLE
@pytest.mark.slow
@pytest.mark.parametrize("name", ["h100", "v5e:2x2"])
def test_a_run_is_planned_for_a_device_that_is_not_here(name):
    if not INSTALLED[name]:
        pytest.skip(f"the compiler for {name} is not installed here")
    config = Config(model="mlp", dataset="digits", batch_size=32)
    text = list(plan.lines(config, DIGITS, name))
    assert [line.split(":")[0] for line in text] == [
        "initialisation", "step", "refresh", "evaluation",
    ]  # fmt: skip
    assert all("fits in" in line for line in text)


@UNREADABLE
@pytest.mark.slow
def test_several_gpus_sum_once_and_stack_what_is_whole_on_each():
    if not INSTALLED["h100"]:
        pytest.skip("the compiler for h100 is not installed here")
    config = Config(model="mlp", dataset="digits", batch_size=32)

    def step(name, shard_factors=False):
        where = ahead.target(name)
        where = where._replace(layout=where.layout._replace(shard_factors=shard_factors))
        made = plan.planned(build(config, DIGITS), DIGITS.example, 32, where)
        return next(p.compiled for p in made if p.program == "step")

    one, two, parts = step("h100"), step("h100x2"), step("h100x2", shard_factors=True)
    assert (one.collectives, two.collectives) == (0, 1)
    assert two.products == one.products
    assert two.kernels < 1.3 * one.kernels < parts.kernels
