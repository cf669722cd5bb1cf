"""What closes the gap between direct SSA and backpropagation on the same factors.

    python -m experiments.studies.gap
    python -m experiments.studies.gap --quick --dataset=digits --model=mlp

The reference is `svd_bp`; `bp` is that of the dense network. Some variants walk through a few of
each layer's singular directions, one learns behind auxiliary networks; some are `svd_bp` by other
optimisers, or with gradients that come some steps late, as in a pipeline that is always full, where
no unit waits for another; every other one is direct SSA with one thing changed: how often the path
follows the weights, how fine it is, how far a unit's gradient reaches, what is added to the signal,
what comes before, and how the weights are moved.

Muon orthogonalises the momentum of every matrix (`optax.contrib.muon`), Stiefel-Muon that of U and
V, kept tangent (`ssa_jax.transforms.scale_by_stiefel_muon`); all else goes by Adam.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.show import variants
from experiments.show.variants import Column
from experiments.studies import program, study
from experiments.studies.study import Study, Variant
from experiments.studies.trials import Trial
from ssa_jax import transforms
from ssa_jax.factors import Factors, is_factors
from ssa_jax.runs import inputs
from ssa_jax.runs.build import schedule_end
from ssa_jax.runs.given import NOTHING, PREFIX, Given
from ssa_jax.training import optim

# Over Adam's rate, of momentum and of the matrices of both Muons.
FASTER = 10


def late(steps: int) -> optax.GradientTransformation:
    """Hands on the updates of `steps` steps before, zeros at first."""

    def init(params: optax.Params) -> tuple[optax.Updates, ...]:
        return tuple(optax.tree.zeros_like(params) for _ in range(steps))

    def update(
        updates: optax.Updates, state: tuple[optax.Updates, ...], params: optax.Params | None = None
    ) -> tuple[optax.Updates, tuple[optax.Updates, ...]]:
        del params
        held = (updates, *state)
        return held[-1], held[:-1]

    return optax.GradientTransformation(init, update)


def _stiefel_muon(rate: optax.Schedule) -> optax.GradientTransformation:
    muon, adam = transforms.scale_by_stiefel_muon(), optax.scale_by_adam()

    def init(params: optax.Params) -> tuple[optax.OptState, optax.OptState]:
        return muon.init(params), adam.init(params)

    def update(
        updates: optax.Updates, state: tuple[optax.OptState, optax.OptState], params: Any = None
    ) -> tuple[optax.Updates, tuple[optax.OptState, optax.OptState]]:
        turned, of_muon = muon.update(updates, state[0], params)
        rest, of_adam = adam.update(updates, state[1], params)

        def both(a: Any, b: Any) -> Any:
            return Factors(FASTER * a.u, b.s, FASTER * a.v) if is_factors(a) else b

        return jax.tree.map(both, turned, rest, is_leaf=is_factors), (of_muon, of_adam)

    scaled = optax.GradientTransformation(init, update)
    return optax.chain(scaled, optax.scale_by_learning_rate(rate))


def _muon(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(lambda count: FASTER * rate(count), adam_learning_rate=rate)


def _momentum(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(lambda count: FASTER * rate(count), momentum=0.9)


OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "momentum": _momentum,
    "muon": _muon,
    "stiefel_muon": _stiefel_muon,
}

LABELS = {"adam": "Adam", "momentum": "momentum", "muon": "Muon", "stiefel_muon": "Stiefel-Muon"}
DELAYS = {0: "", 1: ", a step late", 4: ", four steps late"}
# Optimiser of a variant, and by how many steps its gradients are late.
LATE = {
    f"svd_bp_{name}" + f"_late_{steps}" * bool(steps): (name, steps)
    for name in OPTIMIZERS
    for steps in ((1, 4) if name == "adam" else (0, 1))
}


def given(trial: Trial) -> Given:
    """The optimiser of a variant of `LATE`, its rate that of a run: warm-up and cosine."""
    if trial.variant not in LATE:
        return NOTHING
    config, (name, steps) = trial.config, LATE[trial.variant]
    epoch = inputs.of_run(config, study.load(config)).train_size // config.batch_size
    total = schedule_end(config, epoch)
    rate = optim.learning_rate(
        optim.OptimizerConfig(config.learning_rate, total, epoch, warmup_steps=config.warmup_steps)
    )
    return Given(optimizer=optax.chain(late(steps), OPTIMIZERS[name](rate)))


def _late(variant: str) -> Variant:
    name, steps = LATE[variant]
    changes = {"method": "svd_bp", "optimizer": f"{PREFIX}:{variant}"}
    return Variant(variant, f"svd_bp by {LABELS[name]}{DELAYS[steps]}", changes)


def _direct(name: str, label: str, **changes: Any) -> Variant:
    return Variant(name, label, {"method": "ssa", "feedback_lookahead": 0, **changes})


def _walk(name: str, share: str, rank: float, note: str = "", **changes: Any) -> Variant:
    walked = {"method": "ssa", "feedback": "sequential", "feedback_rank": rank}
    return Variant(
        name, f"walking through {share} of each layer's directions{note}", walked | changes
    )


# Neighbours in a unit, in words.
JOINED = {
    "joined": (2, "two"),
    "joined_4": (4, "four"),
    "joined_5": (5, "five"),
    "joined_6": (6, "six"),
    "joined_7": (7, "seven"),
    "joined_8": (8, "eight"),
    "joined_9": (9, "nine"),
    "joined_11": (11, "eleven"),
    "joined_14": (14, "fourteen"),
}
EXACT = {"warmup_method": "svd_bp", "warmup_until": 20}
VARIANTS = (
    Variant("bp", "bp", {"method": "bp"}),
    Variant("svd_bp", "svd_bp", {"method": "svd_bp"}),
    _walk("walk_half", "half", 1 / 2),
    _walk("walk_quarter", "a quarter", 1 / 4),
    _walk("walk_eighth", "an eighth", 1 / 8),
    _walk("walk_quarter_error", "a quarter", 1 / 4, ", by the error", feedback_basis="error"),
    _walk("walk_eighth_error", "an eighth", 1 / 8, ", by the error", feedback_basis="error"),
    _walk(
        "walk_eighth_warm",
        "an eighth",
        1 / 8,
        ", by the error, after 20 exact steps",
        feedback_basis="error",
        **EXACT,
    ),
    Variant(
        "walk_energy",
        "walking through 0.8 of the error's energy, after 20 exact steps",
        {
            "method": "ssa",
            "feedback": "sequential",
            "feedback_basis": "error",
            "feedback_energy": 0.8,
            **EXACT,
        },
    ),
    _walk("walk_eighth_exact_first", "an eighth", 1 / 8, ", after 20 exact steps", **EXACT),
    Variant("auglocal", "auxiliary networks", {"method": "auglocal", "factorize": "on"}),
    _direct("direct", "ssa direct"),
    _direct("every_1", "path follows in every step", feedback_every=1),
    _direct("every_100", "path follows every 100 steps", feedback_every=100),
    _direct("channel", "path per channel", feedback_form="channel"),
    _direct("lookahead_1", "one unit ahead", feedback_lookahead=1),
    _direct(
        "lookahead_1_every_2",
        "one unit ahead, path follows every 2 steps",
        feedback_lookahead=1,
        feedback_every=2,
    ),
    _direct("lookahead_2", "two units ahead", feedback_lookahead=2),
    _direct("regression", "paths by regression", feedback="regression"),
    _direct(
        "regression_ahead",
        "paths by regression, one unit ahead",
        feedback="regression",
        feedback_lookahead=1,
    ),
    _direct("warm_steps", "after 20 steps of svd_bp", **EXACT),
    _direct(
        "regression_warm",
        "paths by regression, one unit ahead, after 20 steps of svd_bp",
        feedback="regression",
        feedback_lookahead=1,
        **EXACT,
    ),
    *(
        _direct(name, f"{word} neighbours a unit", unit_size=size)
        for name, (size, word) in JOINED.items()
    ),
    _direct(
        "joined_4_regression",
        "four neighbours a unit, paths by regression, after 20 steps of svd_bp",
        unit_size=4,
        feedback="regression",
        **EXACT,
    ),
    _direct("readout", "and a local readout (0.1)", local_weight=0.1),
    _direct("cosine", "and the cosine term (0.1)", kappa=0.1),
    _direct("smoothing", "label smoothing (0.1)", label_smoothing=0.1),
    _direct("slow_first", "rate of the first unit a quarter", first_rate=0.25),
    _direct("warm_bp", "after an epoch of svd_bp", warmup_method="svd_bp"),
    _direct("warm_local", "after an epoch of local readouts", warmup_method="local"),
    _direct("horizontal", "horizontal projection", projection="horizontal"),
    _direct("momentum", "momentum (rate 0.01) for Adam", optimizer="momentum", learning_rate=0.01),
    _direct("momentum_fast", "momentum (rate 0.1)", optimizer="momentum", learning_rate=0.1),
    *map(_late, LATE),
)

STUDY = Study(
    "gap",
    VARIANTS,
    variants.always(
        Column("test accuracy", variants.accuracy),
        Column("train loss", variants.train_loss),
        Column("gradient angle", variants.hidden_angle),
        Column("signal angle", variants.angle("signal_angles")),
        variants.PARAMETERS,
    ),
    "Angles are to the true gradient and the true signal, means over hidden units after the last "
    "epoch; the train loss of label smoothing is against smoothed targets.",
    given=given,
)

if __name__ == "__main__":
    program.run(STUDY)
