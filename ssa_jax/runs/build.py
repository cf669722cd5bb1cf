"""From a config and a data set to everything that a run calls."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ssa_jax import factors
from ssa_jax.data import Images
from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS, FeedbackOptions, Method, Network, blend, relay
from ssa_jax.models import MODELS
from ssa_jax.networks.factorize import factorize, has_factors
from ssa_jax.networks.forward import output_shapes, predict
from ssa_jax.networks.models import Split, split, start
from ssa_jax.networks.units import Unit, group_units, in_precision
from ssa_jax.plugins import find
from ssa_jax.runs import budgets, inputs
from ssa_jax.runs.budgets import BudgetError
from ssa_jax.runs.config import MOST, Config
from ssa_jax.training import costs, memory, optim, ranks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OPTIMIZERS, OptimizerConfig
from ssa_jax.training.ranks import SCHEDULES
from ssa_jax.training.tasks import LOSSES, Task, cross_entropy, from_function
from ssa_jax.training.train import init_state
from ssa_jax.types import TrainState

Array = jax.Array
Tree = Any


# Inputs on which composed paths are measured.
EXAMPLES = 16


class Given(NamedTuple):
    """Objects in place of the names of a config.

    Attributes:
      model: an NNX or a Linen module, or a `networks.models.Functional`.
      method: (network, options) -> Method.
      optimizer: a whole optax optimiser.
      rank_schedule: (share of training, energy, final) -> `ranks.Target`.
      loss: a `Task`, or a function (outputs, targets) -> scalar.
      callbacks: called with the row of each epoch.
    """

    model: Any = None
    method: Any = None
    optimizer: Any = None
    rank_schedule: Any = None
    loss: Any = None
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = ()


NOTHING = Given()


class Built(NamedTuple):
    """A network, its method and optimiser, and the state before the first step.

    `warmup` is at work in the first `warmup_epochs` epochs, on the state that `method` shares;
    `memory` is the mode of the steps of both.
    """

    units: tuple[Unit, ...]
    method: Method
    warmup: Method
    warmup_epochs: int
    memory: str
    optimizer: Any
    weights: LossWeights
    task: Task
    learning_rate: Any
    steps_per_epoch: int
    total_steps: int
    cuts_at: Callable[[int], bool]
    state: TrainState
    merge: Callable[[Any, Any], Any]


class Costs(NamedTuple):
    """Size of a network for inference: stored parameters, and MACs for one image."""

    params: int
    macs: int


def build(config: Config, data: Images, rate_scale: float = 1.0, given: Given = NOTHING) -> Built:
    """Builds a run, its learning rate scaled, with what is given in place of its names.

    Raises:
      ConfigError: settings that do not fit each other or the data.
    """
    steps_per_epoch = data.train_size // config.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--batch_size must be at most {data.train_size}, the number of training "
            f"examples, got {config.batch_size}"
        )
    config = config if config.rank_schedule != "none" else _at_budget(config, data, given)
    every_step = config.epochs * steps_per_epoch
    if every_step > MOST:
        raise ConfigError(
            f"--epochs must be at most {MOST // steps_per_epoch} with {steps_per_epoch} steps in "
            f"each, got {config.epochs}"
        )
    total_steps = min(config.schedule_steps or every_step, every_step)
    if config.warmup_steps >= max(2, total_steps):
        raise ConfigError(
            f"--warmup_steps must be less than {total_steps}, the steps of the schedule, got "
            f"{config.warmup_steps}"
        )
    units, params, mstate, merge = split_model(config, data, given, factorized=config.factorized)
    shapes = output_shapes(units, params, mstate, data.image_shape, data.example.dtype)
    chain = optim.OptimizerConfig(
        learning_rate=config.learning_rate * rate_scale,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        optimizer=_optimizer(config, given),
        first_rate=config.first_rate,
        warmup_steps=config.warmup_steps,
        hoyer=config.hoyer,
        rank_schedule=config.rank_schedule,
        schedule=given.rank_schedule or find("rank_schedule", config.rank_schedule, SCHEDULES),
        rank_target=config.rank_target,
        rank_floor=config.rank_floor,
        rank_cuts=config.rank_cuts,
        rank_exclude=_patterns(config, params),
        energy=config.energy,
        projection=config.projection,
        retraction=config.retraction,
        retract_every=config.retract_every,
    )
    trained, measured = make_tasks(config, given)
    _check_outputs(trained, shapes[-1], data.classes)
    optimizer = optim.make_optimizer(
        _within_budget(config, data, chain, units, params, mstate, given)
    )
    try:
        network = Network(units, shapes, examples(config, data), trained.encode)
        warmup, method = make_methods(config, network, given)
        state = init_state(method, optimizer, params, mstate, jax.random.key(config.seed))
    except ValueError as e:
        raise ConfigError(f"--method={config.method} on --model={config.model}: {e}") from e
    return Built(
        units=units,
        method=method,
        warmup=warmup,
        warmup_epochs=0 if config.warmup_method == "none" else config.warmup_epochs,
        memory=_memory(config, units, method, params, mstate, data),
        optimizer=optimizer,
        weights=LossWeights(config.alpha, config.beta, config.gamma, config.kappa, trained),
        task=measured,
        learning_rate=optim.learning_rate(chain) if isinstance(chain.optimizer, str) else None,
        steps_per_epoch=steps_per_epoch,
        total_steps=chain.total_steps,
        cuts_at=functools.partial(optim.cuts_at, chain),
        state=state,
        merge=merge,
    )


def examples(config: Config, data: Images) -> np.ndarray:
    """The first few training images, normalised, on which a feedback may be measured."""
    # Evenly many, so that their signs balance (see `feedback.composed_paths`).
    number = min(EXAMPLES, config.batch_size)
    return inputs.first_images(data, max(1, number - number % 2))


def make_tasks(config: Config, given: Given = NOTHING) -> tuple[Task, Task]:
    """The task whose loss is descended, and the one that is measured: the same, not smoothed.

    Raises:
      ConfigError: a smoothing of another loss than cross-entropy.
    """
    loss = given.loss or find("loss", config.loss, LOSSES)
    if config.label_smoothing and loss is not cross_entropy:
        raise ConfigError(
            f"--label_smoothing is for --loss=cross_entropy, not --loss={config.loss}"
        )
    if loss is cross_entropy:
        return cross_entropy(config.label_smoothing), cross_entropy()
    if loss in LOSSES.values():
        loss = loss()
    task = loss if isinstance(loss, Task) else from_function(loss)
    return task, task


def _optimizer(config: Config, given: Given) -> Any:
    """A name in `OPTIMIZERS`, or a whole optax optimiser."""
    if given.optimizer is None and config.optimizer in OPTIMIZERS:
        return config.optimizer
    found = given.optimizer or find("optimizer", config.optimizer, OPTIMIZERS)
    if not isinstance(found, optax.GradientTransformation):
        found = found()
    if not isinstance(found, optax.GradientTransformation):
        raise ConfigError(f"--optimizer={config.optimizer} is no optax.GradientTransformation")
    return found


# Losses that compare every output with a target of its own.
_ONE_TO_ONE = ("mean_squared_error", "binary_cross_entropy")


def _check_outputs(task: Task, shape: tuple[int, ...], wanted: int) -> None:
    """Raises ConfigError for a model whose outputs do not fit the targets."""
    given = math.prod(shape)
    if task.classes and shape[-1] < wanted:
        raise ConfigError(
            f"the model gives {shape[-1]} outputs, and the data have {wanted} classes, labels 0 to "
            f"{wanted - 1}; give it an output for each"
        )
    if task.name in _ONE_TO_ONE and given != wanted:
        raise ConfigError(
            f"the model gives {given} outputs for an example, and the data have {wanted} targets; "
            f"{task.name} compares one with one"
        )


def make_methods(config: Config, network: Network, given: Given = NOTHING) -> tuple[Method, Method]:
    """The methods that a config names, of its warm-up and of the rest; one and the same without.

    Blended with local readouts where it asks for them.
    """
    options = FeedbackOptions(
        path=config.feedback,
        update=config.feedback_update,
        every=config.feedback_every,
        rate=config.feedback_rate,
        form=config.feedback_form,
        limit=config.feedback_limit_mib * 2**20,
        lookahead=config.feedback_lookahead,
        rank=config.feedback_rank,
        readout=config.readout,
        readout_update=config.readout_update,
        readout_rate=config.readout_rate,
    )
    method = (given.method or find("method", config.method, METHODS))(network, options)
    if config.method == "ssa" and config.local_weight:
        method = blend(method, METHODS["local"](network, options), config.local_weight)
    warmup = method
    if config.warmup_method != "none":
        warmup = METHODS[config.warmup_method](network, options)
    if config.memory == "streamed":
        memory.require_direct({"method": method, "warmup_method": warmup}, config)
    return (method, method) if warmup is method else relay(warmup, method)


def _memory(
    config: Config, units: tuple[Unit, ...], method: Method, params: Tree, mstate: Tree,
    data: Images,
) -> str:  # fmt: skip
    """The name in `passes.MEMORY_MODES` of a run's steps; of a relay both are direct or neither."""
    if config.memory != "auto":
        return config.memory
    images = batch_shape(config, data)
    return memory.choose(units, method, params, mstate, images, memory.device_bytes())


def batch_shape(config: Config, data: Images) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the inputs of a step on one device."""
    rows = -(-config.batch_size // jax.device_count())
    return jax.ShapeDtypeStruct((rows, *data.image_shape), data.example.dtype)


def make_model(config: Config, data: Images, given: Given = NOTHING, *, factorized: bool) -> Any:
    """The untrained model of a run, on factors at the initial rank or dense.

    One that is given is put on factors by `factorize`, unless it has some, and stays as it is.

    Raises:
      ConfigError: a model that does not fit the data.
    """
    rank = config.rank_init if factorized else None
    if given.model is not None:
        return _given_model(given.model, config, data, rank)
    make = find("model", config.model, MODELS)
    try:
        return make(data.image_shape, data.classes, rank=rank, rngs=nnx.Rngs(config.seed))
    except ValueError as e:
        raise ConfigError(f"--model={config.model} on --dataset={config.dataset}: {e}") from e


def _given_model(model: Any, config: Config, data: Images, rank: float | None) -> Any:
    started = start(model, data.example, config.seed)
    if rank is None or has_factors(started):
        return started
    return factorize(started, rank=rank)


def split_model(config: Config, data: Images, given: Given = NOTHING, *, factorized: bool) -> Split:
    """The units of the model of a run, grouped and in its precision."""
    model = make_model(config, data, given, factorized=factorized)
    apart = split(model, data.example)
    units, params, mstate = group_units(apart.units, apart.params, apart.mstate, config.unit_size)
    units = in_precision(units, jnp.dtype(config.precision))
    return apart._replace(units=units, params=params, mstate=mstate)


def network_costs(units: tuple[Unit, ...], params: Tree, mstate: Tree, data: Images) -> Costs:
    """Costs of a network at its stored ranks."""
    image = data.example

    def logits(p: Tree, m: Tree, x: Array) -> Array:
        return predict(units, p, m, x)

    return Costs(costs.parameters(params), costs.macs(logits, params, mstate, image))


def dense_costs(config: Config, data: Images, given: Given = NOTHING) -> Costs:
    """Costs of the same network without factors."""
    return _costs_of(config, data, given, factorized=False)


def _costs_of(config: Config, data: Images, given: Given, *, factorized: bool) -> Costs:
    """Costs of the untrained network of a config, from shapes alone."""
    built: list[tuple[Unit, ...]] = []

    def shapes() -> tuple[Tree, Tree]:
        units, params, mstate, _ = split_model(config, data, given, factorized=factorized)
        built.append(units)
        return params, mstate

    params, mstate = jax.eval_shape(shapes)
    return network_costs(built[0], params, mstate, data)


def _patterns(config: Config, params: Tree) -> tuple[str, ...]:
    """Of the layers that keep their rank; by itself a first layer that widens.

    What it drops is lost to all that follows, and it holds few of the parameters. A budget is of
    the whole network, which it may cut anywhere.
    """
    if config.rank_exclude == "auto":
        path, first = next(iter(factors.named_leaves(params).items()), ("", None))
        widens = first is not None and first.v.shape[0] < first.u.shape[0]
        return (path,) if widens and not config.rank_budget else ()
    return tuple(p.strip() for p in config.rank_exclude.split(",") if p.strip())


def _at_budget(config: Config, data: Images, given: Given) -> Config:
    """The config with the initial rank at which the whole network fits its budget."""
    if not config.rank_budget:
        return config
    dense = getattr(dense_costs(config, data, given), config.budget_kind)

    def size_at(rank: float) -> int:
        at_rank = dataclasses.replace(config, rank_init=rank)
        return getattr(_costs_of(at_rank, data, given, factorized=True), config.budget_kind)

    try:
        rank = budgets.fitting_fraction(size_at, config.rank_budget, dense)
    except BudgetError as e:
        raise ConfigError(str(e)) from e
    return dataclasses.replace(config, rank_init=rank)


def _within_budget(
    config: Config,
    data: Images,
    chain: OptimizerConfig,
    units: tuple[Unit, ...],
    params: Tree,
    mstate: Tree,
    given: Given,
) -> OptimizerConfig:
    """The settings of the chain with what the budget says of floor, target, energy and costs."""
    kind = config.budget_kind

    def size_of(tree: Tree) -> int:
        return getattr(network_costs(units, tree, mstate, data), kind)

    if not (config.rank_budget or chain.rank_exclude):
        return chain
    try:
        size = budgets.size_by_rank(size_of, params, chain.rank_exclude)
        if not config.rank_budget or config.rank_schedule == "none":
            return chain
        dense = getattr(dense_costs(config, data, given), kind)
        if config.rank_schedule == "adaptive":
            budgets.check_reachable(size, config.rank_budget, dense)
            now = size.at(lambda r: r)
            last = min(config.rank_budget * dense, now)
            ends = (now - size.fixed, last - size.fixed)
            return chain._replace(rank_costs=size.costs, rank_budget=ends)
        floor = budgets.fitting_floor(size, config.rank_budget, dense)
    except BudgetError as e:
        raise ConfigError(str(e)) from e
    if config.rank_schedule == "linear":
        return chain._replace(rank_floor=floor, rank_target=floor)
    period = optim.rank_period(chain) / chain.total_steps
    energy = ranks.energy_to_reach(
        config.rank_schedule, chain.energy, floor, period, chain.rank_target
    )
    return chain._replace(rank_floor=floor, energy=energy)


def rank_fraction(params: Tree) -> float:
    """Mean over the factorised layers of stored rank over full rank; 1 without any."""
    shares = [
        f.rank / factors.full_rank(f.u.shape[0], f.v.shape[0]) for f in factors.leaves(params)
    ]
    return sum(shares) / len(shares) if shares else 1.0
