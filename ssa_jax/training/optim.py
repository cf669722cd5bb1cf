"""The optimiser of a configuration: schedules and names made into one chain."""

import fnmatch
import math
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssa_jax import transforms
from ssa_jax.factors import Factors, is_factors
from ssa_jax.training import ranks
from ssa_jax.training.unitwise import Alone
from ssa_jax.transforms.selection import path_name

Array = jax.Array

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "momentum": lambda: optax.trace(decay=0.9),
}
# Periods of the energy rule in a run, half of which lie where the schedules cut: a rule that is
# applied often enough empties any spectrum.
MOST_CUTS = 10
# Steps between choices of adaptive ranks, as in AdaLoRA; fewer in a short run.
CHOOSE_EVERY = 10


class OptimizerConfig(NamedTuple):
    """Settings of the chain.

    Attributes:
      learning_rate: peak of the schedule.
      total_steps: length of training.
      steps_per_epoch: the energy rule cuts in the first step of an epoch.
      optimizer: a name in `OPTIMIZERS`, or a whole optax optimiser, which has a rate of its own:
        `learning_rate` is not used then.
      weight_decay: λ of kernels W ← (1 - rate λ) W, apart from the gradient, and of s of factors.
      first_rate: rate of the first unit over that of the last; see `scale_by_depth`.
      warmup: share of training over which the rate rises from zero; a cosine takes it back.
      warmup_steps: the same in steps; 0 for the share.
      clip: largest RMS of one gradient array; local, unlike a global norm.
      hoyer: η, coefficient of the Hoyer term.
      rank_schedule: a name in `ranks.SCHEDULES`, or one of another package.
      schedule: (share of training, energy, final) -> `ranks.Target`; None: that of the name.
      rank_floor: lowest rank of any rule but `adaptive`, as a fraction of the initial one.
      rank_target: what the linear phase leaves of the initial rank, not less than the floor.
      rank_cuts: how often the energy rule cuts, spread over training; 0 for once an epoch, in
        long runs once in several, `MOST_CUTS` in all.
      rank_exclude: patterns of the paths of layers that keep their rank.
      rank_costs: of one singular direction of each layer, by path; for `adaptive`.
      rank_budget: for the sum of those costs, at the start and at the end; for `adaptive`.
      energy: share of Σ s² that the energy rule keeps.
      projection: a name in `retractions.PROJECTIONS`.
      retraction: a name in `retractions.RETRACTIONS`.
      retract_every: steps between retractions.
    """

    learning_rate: float
    total_steps: int
    steps_per_epoch: int
    optimizer: str | optax.GradientTransformation = "adam"
    weight_decay: float = 0.0
    first_rate: float = 1.0
    warmup: float = 0.05
    warmup_steps: int = 0
    clip: float = 1.0
    hoyer: float = 0.0
    rank_schedule: str = "none"
    schedule: Callable[..., ranks.Target] | None = None
    rank_floor: float = 0.3
    rank_target: float = ranks.LINEAR_TARGET
    rank_cuts: int = 0
    rank_exclude: tuple[str, ...] = ()
    rank_costs: Mapping[str, float] = types.MappingProxyType({})
    rank_budget: tuple[float, float] = (0.0, 0.0)
    energy: float = 0.95
    projection: str = "stiefel"
    retraction: str = "series"
    retract_every: int = 1


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to zero at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps or max(1, round(config.warmup * config.total_steps)),
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


def decayed(params: Any) -> Any:
    """True for what weight decay shrinks: s of factors, other arrays of two axes or more."""
    kinds = Factors(False, True, False)  # type: ignore[arg-type]
    return jax.tree.map(
        lambda x: kinds if is_factors(x) else x.ndim > 1, params, is_leaf=is_factors
    )


def excluded(patterns: Sequence[str], path: str) -> bool:
    """Whether a layer's path fits one of the patterns, as a shell matches file names."""
    return any(fnmatch.fnmatchcase(path, p) for p in patterns)


def rank_period(config: OptimizerConfig) -> int:
    """Steps between cuts of the energy rule and looks at the stable rank."""
    if not config.rank_cuts:
        # Whole epochs: a cut has one to recover in before it is measured.
        return config.steps_per_epoch * max(
            1, math.ceil(config.total_steps / config.steps_per_epoch / MOST_CUTS)
        )
    return max(1, config.total_steps // config.rank_cuts)


def choice_period(config: OptimizerConfig) -> int:
    """Steps between choices of `adaptive` ranks."""
    return max(1, min(CHOOSE_EVERY, config.total_steps // 50))


def cuts_at(config: OptimizerConfig, step: int) -> bool:
    """Whether a truncation of this step is one to measure: one a period of the rule that has it."""
    into_period = step % rank_period(config)
    if config.rank_schedule == "none":
        return False
    if config.rank_schedule == "adaptive":
        every = choice_period(config)
        return (step + 1) % every == 0 and into_period < every
    return into_period == 0


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The chain `transforms.ssa`, whose order is written there, with the settings of a config.

    Raises:
      ValueError: an unknown name or a value out of range, from the transforms.
    """
    schedule = config.schedule or ranks.SCHEDULES[config.rank_schedule]
    final = max(config.rank_target, config.rank_floor)

    def target(count: Array) -> ranks.Target:
        return schedule(_fraction(config, count), config.energy, final)

    sparse = config.hoyer != 0 and schedule not in ranks.WITHOUT_HOYER
    whole = not isinstance(config.optimizer, str)
    adaptive = config.optimizer if whole else OPTIMIZERS[config.optimizer]()
    if config.weight_decay:
        adaptive = optax.chain(adaptive, optax.add_decayed_weights(config.weight_decay, decayed))
    if config.first_rate != 1:
        adaptive = optax.chain(adaptive, scale_by_depth(config.first_rate))
    chain = transforms.ssa(
        # The updates of a whole optimiser have their sign and length.
        -1.0 if whole else learning_rate(config),
        optimizer=adaptive,
        hoyer=(lambda count: config.hoyer * target(count).hoyer) if sparse else 0.0,
        clip=config.clip,
        target=1.0 if schedule is ranks.none else lambda count: target(count)[:2],
        floor=config.rank_floor,
        truncate_every=rank_period(config),
        least_rank=ranks.LEAST,
        metric=config.projection,
        retraction=config.retraction,
        retract_every=config.retract_every,
        rank_mask=_rank_mask(config),
    )
    rule = RULES.get(config.rank_schedule)
    # Those rules share out ranks, or wait, over all units; all else here treats every array alone.
    alone = rule is None and (not whole or isinstance(config.optimizer, Alone))
    return _quietly(chain if rule is None else rule(config, chain), alone)


def _quietly(chain: optax.GradientTransformation, alone: bool) -> optax.GradientTransformation:
    """The chain, of which a network without factors is no mistake: it is that of all methods."""

    def init(params: optax.Params) -> optax.OptState:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", transforms.NothingToActOn)
            return chain.init(params)

    kind = Alone if alone else optax.GradientTransformationExtraArgs
    return kind(init, optax.with_extra_args_support(chain).update)


def _fraction(config: OptimizerConfig, count: Array) -> Array:
    return jnp.minimum(count / config.total_steps, 1.0)


def _rank_mask(config: OptimizerConfig) -> Callable[[Any], Any]:
    def mask(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: is_factors(x) and not excluded(config.rank_exclude, path_name(path)),
            params,
            is_leaf=is_factors,
        )

    return mask


def _stable_rank(
    config: OptimizerConfig, chain: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Truncates once, when the stable ranks have settled."""
    rule = transforms.truncate_stable_rank(
        every=rank_period(config),
        floor=config.rank_floor,
        least=ranks.LEAST,
        mask=_rank_mask(config),
    )
    # Truncation changes s alone, so it may follow the retraction of U and V.
    return optax.chain(chain, rule)


def _adaptive(
    config: OptimizerConfig, chain: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Shares out a budget that falls from the first to the last one."""
    first, last = config.rank_budget

    def budget(count: Array) -> Array:
        return last + (first - last) * ranks.annealed(_fraction(config, count))

    return transforms.adapt_rank(
        chain,
        budget,
        cost=lambda path, f: config.rank_costs[path],
        every=choice_period(config),
        until=int(ranks.REST_PHASE * config.total_steps),
        least=ranks.LEAST,
        mask=_rank_mask(config),
    )


RULES = {"stable_rank": _stable_rank, "adaptive": _adaptive}
