"""What a budget of a config says of its ranks."""

import dataclasses
from typing import Any

from ssa_jax import factors
from ssa_jax.data import Images
from ssa_jax.errors import ConfigError
from ssa_jax.networks.units import Unit
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import Given
from ssa_jax.runs.network import costs_of, dense_costs, network_costs
from ssa_jax.training import budgets, optim, ranks
from ssa_jax.training.budgets import BudgetError
from ssa_jax.training.optim import OptimizerConfig

Tree = Any


def keeping_rank(config: Config, params: Tree) -> tuple[str, ...]:
    """Of the layers that keep their rank; by itself a first layer that widens.

    What it drops is lost to all that follows, and it holds few of the parameters. A budget is of
    the whole network, which it may cut anywhere.
    """
    if config.rank_exclude == "auto":
        path, first = next(iter(factors.named_leaves(params).items()), ("", None))
        widens = first is not None and first.v.shape[0] < first.u.shape[0]
        return (path,) if widens and not config.rank_budget else ()
    return tuple(p.strip() for p in config.rank_exclude.split(",") if p.strip())


def at_budget(config: Config, data: Images, given: Given) -> Config:
    """The config with the initial rank at which the whole network fits its budget."""
    if not config.rank_budget:
        return config
    dense = getattr(dense_costs(config, data, given), config.budget_kind)

    def size_at(rank: float) -> int:
        at_rank = dataclasses.replace(config, rank_init=rank)
        return getattr(costs_of(at_rank, data, given, factorized=True), config.budget_kind)

    try:
        rank = budgets.fitting_fraction(size_at, config.rank_budget, dense)
    except BudgetError as e:
        raise ConfigError(str(e)) from e
    return dataclasses.replace(config, rank_init=rank)


def within_budget(
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

    # By itself a layer is named that there is.
    named = config.rank_exclude != "auto" and chain.rank_exclude
    if not (config.rank_budget or named):
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
