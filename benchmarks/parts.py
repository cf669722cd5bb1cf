"""Where the time of a direct ssa step goes: its parts as programs of their own."""

from typing import Any

import jax
import optax

from benchmarks.contestants import Entry, build, chain_settings
from benchmarks.networks import Case, random_batch
from experiments.measure.timing import side_by_side
from ssa_jax.networks.forward import forward
from ssa_jax.training import optim, tasks, train
from ssa_jax.training.passes import local_gradients

Tree = Any
Row = dict[str, Any]

ENTRY = Entry("ssa", 0.25)


def profile(case: Case, rounds: int, entry: Entry = ENTRY) -> list[Row]:
    """Milliseconds of the parts of one taped direct step, and their share of the whole step.

    ``step`` is the whole with its share of a refresh. ``forward`` keeps what the gradients need,
    ``signal`` makes all teaching signals, ``update`` the gradients of all units, ``chain`` the
    optimiser and the sum of parameters and updates, ``adam`` what of it plain clip and Adam
    take, ``stiefel`` the rest: projections and retraction. ``refresh`` is a refresh over its
    period. Apart, the parts share nothing and fuse less, so they may add up to more than the
    whole.
    """
    built = build(case, entry)
    units, method, optimizer, weights, state = built
    batch = random_batch(case)

    @jax.jit
    def forward_part(params: Tree, mstate: Tree) -> Any:
        logits, mstate, tape = forward(units, params, mstate, batch.images)
        return tasks.output_error(tasks.CROSS_ENTROPY, logits, batch.labels)[1], mstate, tape

    @jax.jit
    def signal_part(feedback: Tree, error: jax.Array) -> Any:
        assert method.direct is not None
        return [*(method.direct(feedback, error, batch, i) for i in range(len(units) - 1)), error]

    @jax.jit
    def update_part(params: Tree, feedback: Tree, tape: Any, signals: Any) -> Tree:
        return local_gradients(params, method.twins(feedback), tape, signals, weights)

    def chain_part(chain: optax.GradientTransformation) -> Any:
        def run(gradients: Tree, opt_state: Any, params: Tree) -> Any:
            updates, opt_state = chain.update(gradients, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        return jax.jit(run)

    settings = chain_settings()
    adam = optax.chain(
        optax.clip_by_block_rms(settings.clip), optax.adam(optim.learning_rate(settings))
    )
    error, _, tape = forward_part(state.params, state.mstate)
    signals = signal_part(state.feedback, error)
    gradients = update_part(state.params, state.feedback, tape, signals)
    refresh = train.make_refresh(method)
    whole: Any = train.make_step(units, method, optimizer, weights)
    step = jax.jit(lambda s: whole(s, batch))
    calls = {
        "step": (step, (state,)),
        "forward": (forward_part, (state.params, state.mstate)),
        "signal": (signal_part, (state.feedback, error)),
        "update": (update_part, (state.params, state.feedback, tape, signals)),
        "chain": (chain_part(optimizer), (gradients, state.opt_state, state.params)),
        "adam": (chain_part(adam), (gradients, adam.init(state.params), state.params)),
        "refresh": (refresh, (state,)),
    }
    contestants = [
        ((lambda: None), (lambda f=f, a=a: jax.block_until_ready(f(*a)))) for f, a in calls.values()
    ]
    times = side_by_side(contestants, rounds, budget_s=3600.0)
    ms = {name: t.median_ms for name, t in zip(calls, times, strict=True)}
    ms["refresh"] /= method.refresh_every
    ms["step"] += ms["refresh"]
    ms["stiefel"] = max(0.0, ms["chain"] - ms["adam"])
    return [
        {"model": case.model, "part": name, "ms": round(t, 4), "share": round(t / ms["step"], 4)}
        for name, t in ms.items()
    ]
