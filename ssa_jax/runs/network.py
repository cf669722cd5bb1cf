"""The network that a config names: its units, and what it costs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax import factors
from ssa_jax.data import Images
from ssa_jax.errors import ConfigError
from ssa_jax.models import MODELS
from ssa_jax.networks.factorize import factorize, has_factors
from ssa_jax.networks.forward import predict
from ssa_jax.networks.models import Split, split, start
from ssa_jax.networks.units import Unit, group_units, in_precision
from ssa_jax.plugins import find
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.training import costs, train
from ssa_jax.types import TrainState

Array = jax.Array
Tree = Any


class Costs(NamedTuple):
    """Size of a network for inference: stored parameters, and MACs for one image."""

    params: int
    macs: int


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
    return costs_of(config, data, given, factorized=False)


def costs_of(config: Config, data: Images, given: Given, *, factorized: bool) -> Costs:
    """Costs of the untrained network of a config, from shapes alone."""
    built: list[tuple[Unit, ...]] = []

    def shapes() -> tuple[Tree, Tree]:
        units, params, mstate, _ = split_model(config, data, given, factorized=factorized)
        built.append(units)
        return params, mstate

    params, mstate = jax.eval_shape(shapes)
    return network_costs(built[0], params, mstate, data)


def rank_fraction(params: Tree) -> float:
    """Mean over the factorised layers of stored rank over full rank; 1 without any."""
    shares = [
        f.rank / factors.full_rank(f.u.shape[0], f.v.shape[0]) for f in factors.leaves(params)
    ]
    return sum(shares) / len(shares) if shares else 1.0


Row = dict[str, Any]


def sizes(units: Sequence[Unit], state: TrainState, data: Images, dense: Costs) -> Row:
    """Steps, classes, ranks and costs of a state, the latter also relative to the dense network."""
    size = network_costs(tuple(units), state.params, state.mstate, data)
    return {
        "steps": int(state.step),
        "classes": data.classes,
        "params": size.params,
        "params_ratio": size.params / dense.params,
        "macs": size.macs,
        "macs_ratio": size.macs / dense.macs,
        "ranks": train.ranks(state.params),
        "rank_fraction": rank_fraction(state.params),
    }
