"""A streamed step is a taped one to rounding, in the memory of one unit, on any platform."""

from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import apart, as_on_an_accelerator, make_batch, make_method, max_difference, split

from ssa_jax import transforms
from ssa_jax.factors import linalg
from ssa_jax.methods import METHODS, relay
from ssa_jax.models.blocks import Plain, batch_norm, conv, dense
from ssa_jax.models.feedforward import Feedforward
from ssa_jax.networks.forward import after
from ssa_jax.training import optim
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OptimizerConfig
from ssa_jax.training.train import init_state, make_refresh, make_step
from ssa_jax.types import Batch

WEIGHTS = LossWeights(alpha=1.0, beta=1e-3, gamma=1e-3, kappa=0.1)
DIRECT = {
    "dfa": {},
    "drtp": {},
    "ssa": {},
    "ssa, per channel": {"form": "channel"},
    # Of two directions.
    "ssa, low rank": {"form": "low_rank", "limit": 900},
    "ssa, mutual": {"update": "mutual"},
    "ssa, regression": {"path": "regression", "lookahead": 1},
    "ssa, random": {"path": "random", "update": "fixed"},
    **{f"ssa, {n} ahead": {"lookahead": n} for n in (1, 2, 9)},
}
WALKING = {
    **{name: {} for name in ("bp", "svd_bp", "fa", "usf", "frsf", "brsf", "kp")},
    "ssa, sequential": {"path": "sequential", "update": "mutual"},
    "ssa, walk": {"path": "sequential", "rank": 0.5},
}
STREAMED = DIRECT | WALKING
TAPED_ONLY = {name: {} for name in METHODS if name not in (*STREAMED,)}


def chain(schedule="none", optimizer="adam"):
    config = OptimizerConfig(
        learning_rate=1e-2, total_steps=6, steps_per_epoch=2, hoyer=1e-3, rank_schedule=schedule,
        optimizer=optimizer,
    )  # fmt: skip
    return optim.make_optimizer(config)


def trained(name, options, memory, optimizer, steps=3, network="conv"):
    """State and metrics after some steps with a refresh in between."""
    units, params, mstate = split(network, rank=0.8)
    method = make_method(name.split(",")[0], units, params, mstate, **options)
    state = init_state(method, optimizer, jax.tree.map(jnp.copy, params), mstate, jax.random.key(1))
    step, refresh = (
        make_step(units, method, optimizer, WEIGHTS, memory=memory),
        make_refresh(method),
    )
    for i in range(steps):
        state, metrics = step(state, make_batch(seed=i))
        state = refresh(state) if i == 1 else state
    return state._replace(key=jax.random.key_data(state.key)), metrics


@pytest.mark.parametrize(
    ("name", "network"),
    [
        pytest.param("ssa", "conv", marks=pytest.mark.slow),
        ("ssa, 1 ahead", "conv"),
        ("svd_bp", "residual"),
        ("ssa, walk", "conv"),
        ("dfa", "vit"),
        pytest.param("ssa, 1 ahead", "vit", marks=pytest.mark.slow),
        pytest.param("ssa, 1 ahead", "inverted", marks=pytest.mark.slow),
        pytest.param("ssa", "residual", marks=pytest.mark.long),
        *(
            pytest.param(n, "conv", marks=pytest.mark.long)
            for n in STREAMED
            if n not in ("ssa", "ssa, 1 ahead", "ssa, walk")
        ),
    ],
)
def test_streamed_equals_taped(name, network):
    # A key's bias has no gradient but rounding, which Adam would blow up to a whole step.
    optimizer = chain("hybrid", "momentum" if network == "vit" else "adam")
    ours, theirs = (
        trained(name, STREAMED[name], memory, optimizer, network=network)
        for memory in ("streamed", "taped")
    )
    assert max_difference(ours, theirs) < 2e-5
    # And it moved on: the state after one step is far from both.
    start, _ = trained(name, STREAMED[name], "taped", chain("hybrid"), steps=1, network=network)
    assert max_difference(ours[0].params, start.params) > 1e-3


@pytest.mark.parametrize(
    ("name", "network", "memory"),
    [
        ("ssa, 1 ahead", "conv", "taped"),
        pytest.param("ssa, 1 ahead", "conv", "streamed", marks=pytest.mark.slow),
        pytest.param("svd_bp", "residual", "taped", marks=pytest.mark.slow),
        pytest.param("ssa, 1 ahead", "vit", "taped", marks=pytest.mark.slow),
        pytest.param("ssa, 1 ahead", "inverted", "streamed", marks=pytest.mark.slow),
    ],
)
def test_what_is_compiled_for_an_accelerator_makes_the_same_steps(name, network, memory):
    """There is none here: its forms of all operations run on this platform."""

    def steps():
        optimizer = chain("hybrid", "momentum")
        return trained(name, STREAMED[name], memory, optimizer, network=network)

    ours = steps()
    with (
        linalg.traced_for("cuda"),
        mock.patch.object(jax.lax, "platform_dependent", side_effect=as_on_an_accelerator) as forms,
    ):
        theirs = steps()
    assert forms.called
    assert max_difference(ours, theirs) < 2e-5


@pytest.mark.long
def test_a_chain_that_looks_at_all_units_together_streams_too():
    def clipped():
        return optax.chain(optax.clip_by_global_norm(1e-2), transforms.ssa(1e-2))

    states = [trained("ssa", {}, memory, clipped())[0] for memory in ("streamed", "taped")]
    assert max_difference(*states) < 2e-5


@pytest.mark.parametrize("name", TAPED_ONLY)
def test_a_method_that_reads_the_tape_cannot_stream(name):
    with pytest.raises(ValueError, match="need the error alone or walk down"):
        trained(name, TAPED_ONLY[name], "streamed", chain(), steps=1)


def test_a_relay_streams_only_if_neither_of_its_updates_reads_the_tape():
    units, params, mstate = split("conv", rank=0.8)
    ssa, dfa, local = (make_method(name, units, params, mstate) for name in ("ssa", "dfa", "local"))
    assert all(method.direct for method in relay(dfa, ssa))
    assert not any(method.direct for method in relay(local, ssa))
    first, then = relay(make_method("svd_bp", units, params, mstate), ssa)
    assert first.down
    assert then.direct


def test_unknown_memory_mode():
    units, params, mstate = split("conv")
    method = make_method("dfa", units, params, mstate)
    with pytest.raises(ValueError, match="memory must be one of taped, streamed, got 'tape'"):
        make_step(units, method, optax.sgd(1e-2), LossWeights(), memory="tape")


def compiled(depth, memory, rank=0.5, width=16, size=16, batch=32, name="ssa"):
    """The compiled step of a deep convolutional network of equal units."""
    rngs = nnx.Rngs(0)
    first = [Plain(conv(3, width, 3, rank=None, rngs=rngs), activation=nnx.relu)]
    units = [
        Plain(conv(width, width, 3, rank=rank, rngs=rngs), norm=batch_norm(width, rngs),
              activation=nnx.relu)
        for _ in range(depth)
    ]  # fmt: skip
    last = Plain(dense(width, 10, rank=None, rngs=rngs), average=True, flatten=True)
    units, params, mstate = apart(Feedforward([*first, *units, last]), (size, size, 3))
    method = make_method(name, units, params, mstate, shape=(size, size, 3))
    optimizer = optax.sgd(1e-2)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    images = Batch(jnp.zeros((batch, size, size, 3)), jnp.zeros(batch, jnp.int32))
    step = make_step(units, method, optimizer, LossWeights(), memory=memory)
    program = step.lower(state, images).compile()
    return program, 4 * batch * size * size * width


def maps_held(depth, memory, name="ssa"):
    """Temporary memory of the step in maps of one unit."""
    program, one_map = compiled(depth, memory, name=name)
    return program.memory_analysis().temp_size_in_bytes / one_map


@pytest.mark.long
def test_memory_is_flat_in_depth_when_streamed():
    shallow, deep = (maps_held(depth, "streamed") for depth in (4, 12))
    # Less than an eighth of one map a unit: nothing is kept of the units passed.
    assert deep < shallow + 1
    assert maps_held(12, "taped") - maps_held(4, "taped") > 8


@pytest.mark.long
def test_memory_grows_as_the_root_of_depth_where_a_streamed_signal_walks_down():
    # Of 5 and 17 units 3 and 5 are a segment.
    shallow, deep = (maps_held(depth, "streamed", "svd_bp") for depth in (3, 15))
    taped = [maps_held(depth, "taped", "svd_bp") for depth in (3, 15)]
    assert deep - shallow < 0.5 * (taped[1] - taped[0])


def held_beside_the_state(depth, memory, optimizer, width=128):
    """Temporary memory of a step of equal dense units, in parameters of one of them."""
    rngs, shape = nnx.Rngs(0), (width, 1, 1)
    units = [
        Plain(dense(width, width, rank=0.5, rngs=rngs), activation=nnx.relu, flatten=True)
        for _ in range(depth)
    ]
    last = Plain(dense(width, 10, rank=None, rngs=rngs), flatten=True)
    units, params, mstate = apart(Feedforward([*units, last]), shape)
    method = make_method("ssa", units, params, mstate, shape=shape)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    step = make_step(units, method, optimizer, WEIGHTS, memory=memory)
    program = step.lower(state, make_batch(8, shape=shape, classes=10)).compile()
    one_unit = sum(x.nbytes for x in jax.tree.leaves(params[0]))
    return program.memory_analysis().temp_size_in_bytes / one_unit


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["none", "linear"])
def test_what_a_streamed_step_holds_of_parameters_is_flat_in_depth(schedule):
    shallow, deep = (held_beside_the_state(d, "streamed", chain(schedule)) for d in (4, 12))
    assert deep < 1.2 * shallow
    assert held_beside_the_state(12, "taped", chain(schedule)) > deep + 8


@pytest.mark.long
def test_a_chain_that_couples_units_holds_all_gradients():
    coupled = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    shallow, deep = (held_beside_the_state(d, "streamed", coupled) for d in (4, 12))
    assert deep - shallow > 8


def test_the_two_forward_passes_are_not_merged():
    flops = {
        memory: compiled(4, memory)[0].cost_analysis()["flops"] for memory in ("streamed", "taped")
    }
    # Four pairs of rank 24 from and to 48 numbers, at 16 x 16 positions of 32 images.
    forward = 2 * 4 * (16 * 16) * 32 * (2 * 24 * 48)
    assert flops["streamed"] > flops["taped"] + 0.8 * forward


def test_what_waits_costs_sums_on_the_cpu_alone():
    def lowered(platform):
        wait = jax.jit(after).trace(jnp.ones(3), jnp.ones(5))
        return wait.lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.reduce" in lowered("cpu")
    for platform in ("cuda", "tpu"):
        assert "stablehlo.optimization_barrier" in lowered(platform)
        assert "stablehlo.reduce" not in lowered(platform)
    assert jnp.array_equal(after(jnp.arange(3.0), jnp.ones(5)), jnp.arange(3.0))
