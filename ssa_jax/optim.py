"""The optimiser of a configuration: schedules and names made into one chain."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssa_jax import ranks, transforms

Array = jax.Array

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "momentum": lambda: optax.trace(decay=0.9),
}


class OptimizerConfig(NamedTuple):
    """Settings of the chain.

    Attributes:
      learning_rate: peak of the schedule.
      total_steps: length of training.
      steps_per_epoch: ranks are chosen anew at the end of every epoch.
      optimizer: a name in `OPTIMIZERS`.
      first_rate: rate of the first unit over that of the last; see `scale_by_depth`.
      warmup: share of training over which the rate rises linearly from zero; a cosine takes
        it back to zero.
      clip: largest RMS of one gradient array; local, unlike a global norm.
      hoyer: η, coefficient of the Hoyer term.
      rank_schedule: a name in `ranks.SCHEDULES`.
      rank_floor: lowest rank of the energy rule, as a fraction of the initial one.
      energy: share of Σ s² that the energy rule keeps.
      projection: a name in `linalg.PROJECTIONS`.
      retraction: a name in `linalg.RETRACTIONS`.
      retract_every: steps between retractions.
    """

    learning_rate: float
    total_steps: int
    steps_per_epoch: int
    optimizer: str = "adam"
    first_rate: float = 1.0
    warmup: float = 0.05
    clip: float = 1.0
    hoyer: float = 0.0
    rank_schedule: str = "none"
    rank_floor: float = 0.3
    energy: float = 0.95
    projection: str = "stiefel"
    retraction: str = "newton_schulz"
    retract_every: int = 1


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to zero at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=max(1, round(config.warmup * config.total_steps)),
        decay_steps=max(2, config.total_steps),
    )


def scale_by_depth(first: float) -> optax.GradientTransformation:
    """Multiplies the update of unit i of n by first^(1 - i/(n - 1)): geometric in depth.

    Units far from the output get the least exact signals; a smaller rate trusts them less.
    Expects one update tree a unit, and leaves tangent updates tangent.

    Raises:
      ValueError: `first` not above zero.
    """
    if not first > 0:
        raise ValueError(f"first_rate must be above 0, got {first}")

    def update(updates: Any, params: Any = None) -> Any:
        del params
        last = max(1, len(updates) - 1)
        return tuple(
            jax.tree.map(lambda u, i=i: u * first ** (1 - i / last), unit)
            for i, unit in enumerate(updates)
        )

    return optax.stateless(update)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The chain `transforms.ssa`, whose order is written there, with the settings of a config.

    Raises:
      ValueError: an unknown name or a value out of range, from the transforms.
    """
    schedule = ranks.SCHEDULES[config.rank_schedule]

    def target(count: Array) -> ranks.Target:
        return schedule(jnp.minimum(count / config.total_steps, 1.0), config.energy)

    return transforms.ssa(
        learning_rate(config),
        optimizer=optax.chain(OPTIMIZERS[config.optimizer](), scale_by_depth(config.first_rate)),
        hoyer=lambda count: config.hoyer * target(count).hoyer,
        clip=config.clip,
        target=lambda count: target(count)[:2],
        floor=config.rank_floor,
        truncate_every=config.steps_per_epoch,
        least_rank=ranks.BUCKET,
        metric=config.projection,
        retraction=config.retraction,
        retract_every=config.retract_every,
    )
