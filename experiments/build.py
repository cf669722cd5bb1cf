"""From a config and a data set to everything that a run calls."""

from typing import Any, NamedTuple

import jax
from flax import nnx

from experiments.config import Config, ConfigError
from ssa_jax import costs, factors, optim
from ssa_jax.data import Dataset
from ssa_jax.forward import output_shapes, predict
from ssa_jax.losses import LossWeights
from ssa_jax.methods import METHODS, FeedbackOptions, Method, Network, blend
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import add_mean_slopes
from ssa_jax.train import TrainState, init_state
from ssa_jax.units import Unit, group_units, split_units

Array = jax.Array
Tree = Any


class Built(NamedTuple):
    """A network, its method and optimiser, and the state before the first step."""

    units: tuple[Unit, ...]
    method: Method
    optimizer: Any
    weights: LossWeights
    learning_rate: Any
    steps_per_epoch: int
    state: TrainState


class Costs(NamedTuple):
    """Size of a network for inference: stored parameters, and MACs for one image."""

    params: int
    macs: int


def build(config: Config, data: Dataset) -> Built:
    """Builds a run.

    Raises:
      ConfigError: settings that do not fit each other or the data.
    """
    steps_per_epoch = len(data.train_labels) // config.batch_size
    if not steps_per_epoch:
        raise ConfigError(
            f"--batch_size must be at most {len(data.train_labels)}, the number of training "
            f"examples, got {config.batch_size}"
        )
    units, params, mstate = _split(config, data, factorized=config.factorized)
    shapes = output_shapes(units, params, mstate, data.image_shape)
    chain = optim.OptimizerConfig(
        learning_rate=config.learning_rate,
        total_steps=config.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        optimizer=config.optimizer,
        hoyer=config.hoyer,
        rank_schedule=config.rank_schedule,
        rank_floor=config.rank_floor,
        energy=config.energy,
        projection=config.projection,
        retraction=config.retraction,
        retract_every=config.retract_every,
    )
    optimizer = optim.make_optimizer(chain)
    try:
        method = make_method(config, Network(units, shapes))
        state = init_state(method, optimizer, params, mstate, jax.random.key(config.seed))
    except ValueError as e:
        raise ConfigError(f"--method={config.method} on --model={config.model}: {e}") from e
    return Built(
        units=units,
        method=method,
        optimizer=optimizer,
        weights=LossWeights(
            config.alpha, config.beta, config.gamma, config.kappa, config.label_smoothing
        ),
        learning_rate=optim.learning_rate(chain),
        steps_per_epoch=steps_per_epoch,
        state=state,
    )


def make_method(config: Config, network: Network) -> Method:
    """The method that a config names, blended with local readouts where it asks for them."""
    options = FeedbackOptions(
        path=config.feedback,
        update=config.feedback_update,
        every=config.feedback_every,
        rate=config.feedback_rate,
        form=config.feedback_form,
        limit=config.feedback_limit_mib * 2**20,
        lookahead=config.feedback_lookahead,
        readout=config.readout,
        readout_update=config.readout_update,
        readout_rate=config.readout_rate,
    )
    method = METHODS[config.method](network, options)
    if config.method == "ssa" and config.local_weight:
        return blend(method, METHODS["local"](network, options), config.local_weight)
    return method


def make_model(config: Config, data: Dataset, *, factorized: bool) -> nnx.Module:
    """The untrained model that a config names, on factors at the initial rank or dense.

    Raises:
      ConfigError: a model that does not fit the data.
    """
    rank = config.rank_init if factorized else None
    try:
        model = MODELS[config.model](
            data.image_shape, data.classes, rank=rank, rngs=nnx.Rngs(config.seed)
        )
    except ValueError as e:
        raise ConfigError(f"--model={config.model} on --dataset={config.dataset}: {e}") from e
    if config.mean_gates:
        add_mean_slopes(model)
    return model


def _split(
    config: Config, data: Dataset, *, factorized: bool
) -> tuple[tuple[Unit, ...], Tree, Tree]:
    model = make_model(config, data, factorized=factorized)
    return group_units(*split_units(model), config.unit_size)


def network_costs(units: tuple[Unit, ...], params: Tree, mstate: Tree, data: Dataset) -> Costs:
    """Costs of a network at its stored ranks."""
    image = jax.ShapeDtypeStruct((1, *data.image_shape), "float32")

    def logits(p: Tree, m: Tree, x: Array) -> Array:
        return predict(units, p, m, x)

    return Costs(costs.parameters(params), costs.macs(logits, params, mstate, image))


def dense_costs(config: Config, data: Dataset) -> Costs:
    """Costs of the same network without factors."""
    return network_costs(*_split(config, data, factorized=False), data)


def rank_fraction(params: Tree) -> float:
    """Mean over the factorised layers of stored rank over full rank; 1 without any."""
    shares = [
        f.rank / factors.full_rank(f.u.shape[0], f.v.shape[0]) for f in factors.leaves(params)
    ]
    return sum(shares) / len(shares) if shares else 1.0
