"""From a config and a data set to everything that a run calls."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax.data import Images
from ssa_jax.errors import ConfigError
from ssa_jax.methods import Method, Network
from ssa_jax.networks.forward import output_shapes
from ssa_jax.networks.units import Unit
from ssa_jax.plugins import find
from ssa_jax.runs import inputs
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.runs.learning import check_outputs, make_methods, make_tasks, optimizer_of
from ssa_jax.runs.network import split_model
from ssa_jax.runs.rank_budget import at_budget, keeping_rank, within_budget
from ssa_jax.settings import MOST
from ssa_jax.stages.choose import bounds_of
from ssa_jax.training import memory, optim
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.ranks import SCHEDULES
from ssa_jax.training.tasks import Task, output_error
from ssa_jax.training.train import init_state
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Tree = Any


# Training examples on which paths are measured before the first step, and at most at a refresh.
EXAMPLES = 64


class Devices(NamedTuple):
    """What a run's steps are spread over.

    Attributes:
      number: of devices.
      memory: bytes of each.
    """

    number: int
    memory: float


class Built(NamedTuple):
    """A network, its method and optimiser, and the state before the first step.

    `config` is that of the run, with what its network decides (`network.decided`). `warmup` is at
    work before step `takes_over`, on the state that `method` shares; `memory` is the mode of the
    steps of both, `held` the bytes that a tape takes; `bounds` are those of the stages of a step
    that goes over some (see `parallel.pipeline`), else none.
    """

    units: tuple[Unit, ...]
    method: Method
    warmup: Method
    takes_over: int
    memory: str
    held: int
    bounds: tuple[int, ...]
    optimizer: Any
    weights: LossWeights
    task: Task
    learning_rate: Any
    steps_per_epoch: int
    total_steps: int
    cuts_at: Callable[[int], bool]
    state: TrainState
    merge: Callable[[Any, Any], Any]
    config: Config


def build(
    config: Config, data: Images, rate_scale: float = 1.0, given: Given = NOTHING,
    devices: Devices | None = None,
) -> Built:  # fmt: skip
    """Builds a run, its learning rate scaled, with what is given in place of its names.

    Args:
      config: of the run.
      data: what it learns from.
      rate_scale: of its learning rate.
      given: in place of names.
      devices: which its memory follows; those that jax sees where None.

    Raises:
      ConfigError: settings that do not fit each other or the data.
    """
    steps_per_epoch = data.train_size // config.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--batch_size must be at most {data.train_size}, the number of training "
            f"examples, got {config.batch_size}"
        )
    asked = config
    devices = devices or Devices(jax.device_count(), memory.device_bytes())
    if config.rank_schedule == "none":
        config = at_budget(config, data, given)
    if config.epochs * steps_per_epoch > MOST:
        raise ConfigError(
            f"--epochs must be at most {MOST // steps_per_epoch} with {steps_per_epoch} steps in "
            f"each, got {config.epochs}"
        )
    ends = schedule_end(config, steps_per_epoch)
    if config.warmup_steps >= max(2, ends):
        raise ConfigError(
            f"--warmup_steps must be less than {ends}, the steps of the schedule, got "
            f"{config.warmup_steps}"
        )
    apart, config = split_model(config, data, given, factorized=config.factorized)
    units, params, mstate, merge = apart
    # A budget's initial rank follows from the settings anew, and is none of them.
    decided = {n: getattr(config, n) for n in ("unit_size", "feedback_lookahead")}
    shapes = output_shapes(units, params, mstate, data.image_shape, data.example.dtype)
    chain = optim.OptimizerConfig(
        learning_rate=config.learning_rate * rate_scale,
        total_steps=ends,
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer_of(config, given),
        weight_decay=config.weight_decay,
        first_rate=config.first_rate,
        warmup_steps=config.warmup_steps,
        hoyer=config.hoyer,
        rank_schedule=config.rank_schedule,
        schedule=given.rank_schedule or find("rank_schedule", config.rank_schedule, SCHEDULES),
        rank_target=config.rank_target,
        rank_floor=config.rank_floor,
        rank_cuts=config.rank_cuts,
        rank_exclude=keeping_rank(config, params),
        energy=config.energy,
        projection=config.projection,
        retraction=config.retraction,
        retract_every=config.retract_every,
    )
    trained, measured = make_tasks(config, given)
    check_outputs(trained, shapes[-1], data.classes)
    optimizer = optim.make_optimizer(
        within_budget(config, data, chain, units, params, mstate, given)
    )
    try:
        few, targets = inputs.first_examples(data, even(min(EXAMPLES, config.batch_size)))
        network = Network(
            units,
            shapes,
            few,
            encode=trained.encode,
            targets=targets,
            error=lambda outputs, targets: output_error(trained, outputs, targets)[1],
        )
        warmup, method = make_methods(config, network, given)
        state = init_state(method, optimizer, params, mstate, jax.random.key(config.seed))
        weights = LossWeights(config.alpha, config.beta, config.gamma, config.kappa, trained)
        shape = batch_shape(config, data, devices.number)
        held = memory.held_bytes(units, method, params, mstate, shape)
        mode = _memory(config, method, held, devices.memory)
        bounds: tuple[int, ...] = ()
        if config.staged:
            part = example_batch(config, data, devices.number)
            bounds = bounds_of(units, method, optimizer, weights, state, part, config.stages, mode)
    except ValueError as e:
        raise ConfigError(f"--method={config.method} on --model={config.model}: {e}") from e
    warm = config.warmup_until or config.warmup_epochs * steps_per_epoch
    return Built(
        units=units,
        method=method,
        warmup=warmup,
        takes_over=0 if config.warmup_method == "none" else warm,
        memory=mode,
        held=sum(held),
        bounds=bounds,
        optimizer=optimizer,
        weights=weights,
        task=measured,
        learning_rate=optim.learning_rate(chain) if isinstance(chain.optimizer, str) else None,
        steps_per_epoch=steps_per_epoch,
        total_steps=chain.total_steps,
        cuts_at=functools.partial(optim.cuts_at, chain),
        state=state,
        merge=merge,
        config=dataclasses.replace(asked, **decided),
    )


def schedule_end(config: Config, steps_per_epoch: int) -> int:
    """Steps after which the schedules of a run have ended: its last one or `schedule_steps`."""
    every_step = config.epochs * steps_per_epoch
    return min(config.schedule_steps or every_step, every_step)


def even(number: int) -> int:
    """The number or the next smaller even one, so that signs balance; at least one."""
    return max(1, number - number % 2)


def _memory(config: Config, method: Method, held: Sequence[int], device_bytes: float) -> str:
    """The name in `passes.MEMORY_MODES` of a run's steps; of a relay both are direct or neither."""
    if config.memory != "auto":
        return config.memory
    if config.staged:
        # What a stage keeps for later goes through buffers, which takes longer than a forward pass
        # where it was measured (RECORDS.md).
        return "streamed"
    return memory.choose(method, held, device_bytes)


def example_batch(config: Config, data: Images, devices: int) -> Batch:
    """Shapes of the inputs and targets of a pass on one of some devices."""
    images, one = batch_shape(config, data, devices), inputs.first_examples(data, 1)[1]

    def zeros() -> Batch:
        rows = images.shape[0]
        return Batch(
            jnp.zeros(images.shape, images.dtype), jnp.zeros((rows, *one.shape[1:]), one.dtype)
        )

    return jax.eval_shape(zeros)


def batch_shape(config: Config, data: Images, devices: int) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the inputs of a pass on one of some devices."""
    parts = max(1, devices // config.stages) * config.micro_batches
    rows = -(-config.batch_size // parts)
    return jax.ShapeDtypeStruct((rows, *data.image_shape), data.example.dtype)
