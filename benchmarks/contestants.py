"""Contestants of the benchmarks of training: one training step each, ready to be called."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import reference, torch_step
from benchmarks.networks import Case, network, random_batch
from ssa_jax.methods import METHODS, FeedbackOptions, Method, Network
from ssa_jax.networks.forward import output_shapes
from ssa_jax.networks.models import split
from ssa_jax.networks.units import Unit
from ssa_jax.runs.build import EXAMPLES
from ssa_jax.runs.config import Config
from ssa_jax.training import costs, optim, train
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OptimizerConfig
from ssa_jax.types import TrainState

# Hand-written in Flax and optax; the second with this project's convolutions. Times are given
# relative to the second: on a CPU it is the faster one, so the harder to beat.
PLAIN_REFERENCE = "flax bp, XLA convolutions"
REFERENCE = "flax bp"
TORCH = "torch bp"


# Ways that are no method's defaults, by name.
WALK = "walk through 1/4"
_SET = {WALK: ("ssa", FeedbackOptions(path="sequential", rank=1 / 4))}
# Those whose signals walk down, unit by unit.
WALKING = ("bp", "svd_bp", WALK)


class Entry(NamedTuple):
    """A way to train: method or one of `_SET`, rank as a fraction (None: dense), memory mode."""

    method: str
    rank: float | None = None
    memory: str = "taped"


REFERENCES = (Entry(REFERENCE), Entry(PLAIN_REFERENCE))


def peers() -> tuple[Entry, ...]:
    """PyTorch's entry where it is installed."""
    return (Entry(TORCH),) if torch_step.available() else ()


class Contestant(NamedTuple):
    """A training step that has run once.

    Attributes:
      step: does one step and returns when it is done.
      refresh: one refresh of the feedback; None where there is none.
      every: steps between refreshes; 0 without.
      macs: multiply-accumulates of a step, with its share of a refresh; None where the program
        cannot be counted.
      compile_s: seconds of tracing and compiling the step; None of one that is not compiled.
      temp_bytes: temporary arrays of the compiled step; None where the backend does not tell.
    """

    step: Callable[[], Any]
    refresh: Callable[[], Any] | None = None
    every: int = 0
    macs: int | None = None
    compile_s: float | None = None
    temp_bytes: int | None = None


def chain_settings(steps: int = 1000) -> OptimizerConfig:
    """The chain's settings in a run with default flags, that many steps long."""
    config = Config()
    return OptimizerConfig(
        learning_rate=config.learning_rate,
        total_steps=steps,
        steps_per_epoch=steps,
        optimizer=config.optimizer,
        hoyer=config.hoyer,
    )


class Built(NamedTuple):
    """One of our steps before it is compiled."""

    units: tuple[Unit, ...]
    method: Method
    optimizer: Any
    weights: LossWeights
    state: TrainState


def build(case: Case, entry: Entry, settings: OptimizerConfig | None = None) -> Built:
    """A network, its method and chain as default flags make them, and the first state."""
    image = jax.ShapeDtypeStruct((1, *case.input_shape), jnp.float32)
    units, params, mstate, _ = split(network(case, entry.rank), image)
    shapes = output_shapes(units, params, mstate, case.input_shape)
    few = jax.tree.map(lambda x: x[:EXAMPLES], random_batch(case))
    name, options = _SET.get(entry.method, (entry.method, FeedbackOptions()))
    method = METHODS[name](Network(units, shapes, few.images, targets=few.labels), options)
    optimizer = optim.make_optimizer(settings or chain_settings())
    state = train.init_state(method, optimizer, params, mstate, jax.random.key(0))
    return Built(units, method, optimizer, LossWeights(), state)


def build_reference(
    case: Case, entry: Entry, settings: OptimizerConfig | None = None
) -> tuple[reference.Step, reference.State]:
    """The hand-written step of one of `REFERENCES`, with the same chain."""
    settings = settings or chain_settings()
    model = network(case, None)
    if entry.method == PLAIN_REFERENCE:
        model = reference.by_xla(model)
    return reference.make_step(model, optim.learning_rate(settings), settings.clip)


def prepare(case: Case, entry: Entry) -> Contestant:
    """The contestant of an entry, compiled and run once. Its steps go on from one another."""
    if entry.method == TORCH:
        rate = chain_settings().learning_rate
        by_torch = torch_step.make_step(network(case, None), random_batch(case), rate)
        by_torch()
        return Contestant(by_torch)
    if entry in REFERENCES:
        return _compiled(*build_reference(case, entry), random_batch(case))
    built = build(case, entry)
    step = train.make_step(*built[:4], memory=entry.memory)
    contestant = _compiled(step, built.state, random_batch(case))
    if not built.method.refresh_every:
        return contestant
    return _with_refresh(contestant, built)


def _compiled(step: Any, state: Any, batch: Any) -> Contestant:
    macs = costs.macs(step, state, batch)
    start = time.perf_counter()
    program = step.lower(state, batch).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    # The step is donated its state: each call goes on from what the last one left.
    held = [jax.tree.map(jnp.copy, state)]

    def call() -> None:
        held[0], metrics = program(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    call()
    temporary = None if memory is None else memory.temp_size_in_bytes
    return Contestant(call, macs=macs, compile_s=seconds, temp_bytes=temporary)


def _with_refresh(contestant: Contestant, built: Built) -> Contestant:
    refresh: Any = train.make_refresh(built.method)
    every = built.method.refresh_every
    assert contestant.macs is not None
    call = functools.partial(lambda f, s: jax.block_until_ready(f(s)), refresh, built.state)
    call()
    macs = contestant.macs + costs.macs(refresh, built.state) // every
    return contestant._replace(refresh=call, every=every, macs=macs)
