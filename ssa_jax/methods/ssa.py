"""SVD-Space Alignment: structured feedback that follows the weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.methods import feedback as fb
from ssa_jax.methods import twins as tw
from ssa_jax.methods.base import (
    FeedbackOptions,
    Method,
    Network,
    all_direct,
    require_choice,
)
from ssa_jax.methods.walk import low_rank_walk
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any

PATHS = ("composed", "sequential", "random")
UPDATES = ("fixed", "mutual", "tracked")


class SSAFeedback(NamedTuple):
    """What the feedback is made of.

    Attributes:
      twins: of all parameters.
      paths: the direct paths D_i; none for sequential feedback.
      inputs: of the last batch, the few on which composed paths are measured; else none.
    """

    twins: Tree
    paths: Sequence[Array]
    inputs: Tree


def ssa(network: Network, options: FeedbackOptions) -> Method:
    """SVD-Space Alignment (arXiv 2510.25594), feedback as docs/design.md declares it.

    Paths: ``composed`` δ_i = e · D_i, D_i (classes, *shape of h_i) the mean over a few inputs of
    the last batch of what the sequential walk below makes of each logit, refreshed every
    `options.every` steps (see `feedback.composed_paths`); ``sequential`` the error
    walks down through twins and true local derivatives; ``random`` δ_i = e · R_i, R_i fixed, of
    at most the twin's rank. Direct paths (the first and the last) may be kept per channel (see
    `feedback.plan`) and looked ahead from (see `feedback.look_ahead`); a sequential
    signal has gone through all units anyway.

    Twins: ``fixed`` after their independent initialisation; ``mutual`` descend the alignment
    term at `options.rate`; ``tracked`` take the weights' values every `options.every` steps.
    What truncation zeroes in the weights is zeroed in the twins.

    With `options.rank` below one the sequential walk goes through that share of each layer's own
    singular directions instead (see `walk.low_rank_walk`).

    Raises:
      ValueError: an unknown path, update or form, `every` below one, or a rank of feedback that
        does not walk or does not track.
    """
    require_choice("feedback", options.path, PATHS)
    require_choice("feedback_update", options.update, UPDATES)
    if options.every < 1:
        raise ValueError(f"feedback_every must be at least 1, got {options.every}")
    has_paths = options.path != "sequential"
    if options.rank != 1:
        if has_paths or options.update != "tracked":
            raise ValueError(
                "feedback_rank is of feedback=sequential with feedback_update=tracked, got "
                f"{options.path} and {options.update}"
            )
        return low_rank_walk(network, options)
    units, shapes, examples = network.units, network.shapes, network.inputs
    plan = fb.plan(shapes, options.form, options.limit)
    tracked, composed = options.update == "tracked", options.path == "composed"

    def paths_of(params: Tree, twins: Tree, mstate: Tree, inputs: Tree) -> Sequence[Array]:
        if not composed:
            return ()
        # Twins that were just tracked are the weights.
        return fb.composed_paths(units, params, None if tracked else twins, mstate, inputs, plan)

    def init(key: Array, params: Tree, mstate: Tree) -> SSAFeedback:
        key_twins, key_paths = jax.random.split(key)
        twins = jax.tree.map(jnp.copy, params) if tracked else tw.init_twins(key_twins, params)
        if options.path == "random":
            ranks = [min((f.rank for f in factors.leaves(p)), default=None) for p in params]
            return SSAFeedback(twins, fb.random_paths(key_paths, shapes, ranks, plan), ())
        inputs = examples if composed else ()
        return SSAFeedback(twins, paths_of(params, twins, mstate, inputs), inputs)

    def direct(feedback: SSAFeedback, error: Array, batch: Any, i: int) -> Array:
        del batch
        return fb.send(error, feedback.paths[i], shapes[i])

    def signals(
        feedback: SSAFeedback, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        if not has_paths:
            return fb.walk(units, params, feedback.twins, tape, error)
        sent = all_direct(direct, len(units))(feedback, params, tape, error, batch)
        return fb.look_ahead(tape, sent, options.lookahead)

    def update(
        feedback: SSAFeedback, before: Tree, after: Tree, tape: Tape, batch: Any
    ) -> SSAFeedback:
        del before, tape
        twins = feedback.twins
        if options.update == "mutual":
            twins = tw.meet(twins, after, options.rate)
        inputs = feedback.inputs
        if composed:
            inputs = jax.tree.map(lambda x, old: x[: len(old)], batch.images, inputs)
        return feedback._replace(twins=tw.follow_ranks(twins, after), inputs=inputs)

    def refresh(feedback: SSAFeedback, params: Tree, mstate: Tree) -> SSAFeedback:
        twins = jax.tree.map(jnp.copy, params) if tracked else feedback.twins
        if composed:
            paths = paths_of(params, twins, mstate, feedback.inputs)
            return feedback._replace(twins=twins, paths=paths)
        return feedback._replace(twins=twins)

    moves = tracked or composed
    return Method(
        init=init,
        signals=signals,
        update=update,
        refresh=refresh,
        refresh_every=options.every if moves else 0,
        twins=lambda feedback: feedback.twins,
        direct=direct if has_paths else None,
        ahead=options.lookahead if has_paths else 0,
        note=str(plan) if has_paths else "",
    )
