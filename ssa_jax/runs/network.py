"""The network that a config names: its units, and what it costs."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax import factors
from ssa_jax.data import Images
from ssa_jax.errors import ConfigError
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import BatchNorm
from ssa_jax.networks import worth
from ssa_jax.networks.factorize import factorize, has_factors, tell_left
from ssa_jax.networks.forward import predict
from ssa_jax.networks.models import Functional, Split, split, start, without_factors
from ssa_jax.networks.units import Unit, group_units, in_precision
from ssa_jax.plugins import find
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.training import costs, train
from ssa_jax.types import TrainState

Array = jax.Array
Tree = Any

# Direct SSA on more hidden units than DEEP joins the last UPPER of them to one, and all below them
# to another, see docs/research.md.
DEEP = 8
UPPER = 2


class Costs(NamedTuple):
    """Size of a network for inference: stored parameters, and MACs for one image."""

    params: int
    macs: int


def make_model(config: Config, data: Images, given: Given = NOTHING, *, factorized: bool) -> Any:
    """The untrained model of a run, on factors at the initial rank or dense.

    One that is given, or comes dense from outside, is put on factors by `factorize`, unless it has
    some or is a plain function, and stays as it is.

    Raises:
      ConfigError: a model that does not fit the data.
    """
    rank = config.rank_init if factorized else None
    if given.model is not None:
        return _given_model(given.model, config, data, rank)
    make = find("model", config.model, MODELS)
    options = _options(config, make)

    def at(rank: float | None) -> Any:
        rngs = nnx.Rngs(config.seed)
        return make(data.image_shape, data.classes, rank=rank, rngs=rngs, **options)

    try:
        model = start(at(rank), data.example, config.seed)
        if rank is None:
            return model
        if isinstance(model, Functional):
            if not has_factors(model):
                tell_left({config.model: "a plain function; `factors.from_dense` makes factors"})
            return model
        if not has_factors(model):
            return _given_model(model, config, data, rank)
        return _where_it_pays(model, lambda: at(None), config)
    except ValueError as e:
        raise ConfigError(f"--model={config.model} on --dataset={config.dataset}: {e}") from e


def _options(config: Config, make: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that not every model takes."""
    if not config.drop_path:
        return {}
    taken = inspect.signature(make).parameters
    if "drop_path" not in taken and "options" not in taken:
        raise ConfigError(f"--drop_path is for vision transformers and efficientnet_b0, not for "
                          f"{config.model}")  # fmt: skip
    return {"drop_path": config.drop_path}


def _given_model(model: Any, config: Config, data: Images, rank: float | None) -> Any:
    started = start(model, data.example, config.seed)
    if rank is None or has_factors(started):
        return started
    return factorize(started, rank=rank, lowest=rank * least_share(config))


def _where_it_pays(model: Any, dense: Callable[[], Any], config: Config) -> Any:
    """The model on factors, without those that would make layers dearer for all of the run."""
    share = least_share(config)
    if not share or not isinstance(model, nnx.Module):
        return model
    model, reasons = worth.dense_where_dearer(model, dense, share)
    if reasons and not has_factors(model):
        raise ValueError(
            f"on factors every layer is dearer than dense at --rank_init={config.rank_init:g}: "
            "lower it, let ranks fall (--rank_schedule), or take --factorize=all"
        )
    tell_left(reasons)
    return model


def least_share(config: Config) -> float:
    """The share of its initial rank to which a layer may fall; 0 where no layer is judged by it.

    None is where the run has exact factors that stay, whose purpose is not to save, or a
    budget, which is a size for the whole network.
    """
    exact = config.rank_schedule == "none" and config.rank_init == 1
    if exact or config.rank_budget or config.factorize == "all":
        return 0.0
    if config.rank_schedule == "none":
        return 1.0
    target = config.rank_target if config.rank_schedule == "linear" else 0.0
    return max(target, config.rank_floor)


def split_model(
    config: Config, data: Images, given: Given = NOTHING, *, factorized: bool
) -> tuple[Split, Config]:
    """The units of the model of a run, grouped and in its precision, and the config `decided`."""
    model = make_model(config, data, given, factorized=factorized)
    if config.batch_statistics == "device":
        _by_device(config, model)
    apart = split(model, data.example)
    config = decided(config, len(apart.units) - 1)
    size = config.unit_size or 1
    units, params, mstate = group_units(apart.units, apart.params, apart.mstate, size)
    units = in_precision(units, jnp.dtype(config.precision))
    return apart._replace(units=units, params=params, mstate=mstate), config


def decided(config: Config, hidden: int) -> Config:
    """The config with what its network of `hidden` units decides: how far gradients are exact.

    Direct SSA in more than `DEEP` hidden units joins the last `UPPER` of them to one, and all
    below them to another. Where units are not joined a direct signal looks one ahead.
    """
    size, ahead = config.unit_size, config.feedback_lookahead
    if size is None:
        direct = config.method == "ssa" and config.feedback != "sequential"
        size = hidden - UPPER if direct and ahead is None and hidden > DEEP else 1
    if ahead is None:
        ahead = 0 if size > 1 else 1
    return dataclasses.replace(config, unit_size=size, feedback_lookahead=ahead)


def _by_device(config: Config, model: Any) -> None:
    """Makes the batch norms of a model take each device's rows by themselves.

    Over stages they do so anyway.
    """
    modules = nnx.iter_modules(model) if isinstance(model, nnx.Module) else ()
    norms = [module for _, module in modules if isinstance(module, BatchNorm)]
    if not norms:
        raise ConfigError(
            f"--batch_statistics=device is for batch norms of ssa_jax.models, and "
            f"--model={config.model} has none"
        )
    for norm in norms:
        norm.by_device = not config.staged


def network_costs(units: tuple[Unit, ...], params: Tree, mstate: Tree, data: Images) -> Costs:
    """Costs of a network at its stored ranks."""
    image = data.example

    def logits(p: Tree, m: Tree, x: Array) -> Array:
        return predict(units, p, m, x)

    return Costs(costs.parameters(params), costs.macs(logits, params, mstate, image))


def dense_costs(config: Config, data: Images, given: Given = NOTHING) -> Costs:
    """Costs of the same network without factors; of a plain function on them as it is."""
    return costs_of(config, data, given, factorized=False)


def costs_of(config: Config, data: Images, given: Given, *, factorized: bool) -> Costs:
    """Costs of the untrained network of a config, from shapes alone."""
    built: list[tuple[Unit, ...]] = []

    def shapes() -> tuple[Tree, Tree]:
        model = given.model
        if not factorized and model is not None and has_factors(model):
            model = without_factors(model)
        whole = given._replace(model=model)
        apart, _ = split_model(config, data, whole, factorized=factorized)
        built.append(apart.units)
        return apart.params, apart.mstate

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
