"""SVD-Space Alignment: structured feedback that follows the weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.methods import composed as cp
from ssa_jax.methods import feedback as fb
from ssa_jax.methods import regression
from ssa_jax.methods import twins as tw
from ssa_jax.methods.base import (
    FeedbackOptions,
    Method,
    Network,
    Through,
    all_direct,
    newest,
    require_choice,
    walking,
)
from ssa_jax.methods.walk import low_rank_walk
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any

PATHS = ("composed", "regression", "sequential", "random")
UPDATES = ("fixed", "mutual", "tracked")


class SSAFeedback(NamedTuple):
    """What the feedback is made of.

    Attributes:
      twins: of all parameters.
      paths: the direct paths D_i; none for sequential feedback.
      examples: on which paths are measured: of composed ones a few inputs, always the same, of
        regressed ones inputs and targets of the last batch; else none.
      gram: of the errors that regressed paths have seen (see `regression.regress`); else none.
    """

    twins: Tree
    paths: Sequence[fb.Path]
    examples: Tree = ()
    gram: Tree = ()


# Of composed paths, evenly many, so that their signs balance (see `composed.composed_paths`).
_COMPOSED_EXAMPLES = 16


def ssa(network: Network, options: FeedbackOptions) -> Method:
    """SVD-Space Alignment (arXiv 2510.25594), feedback as docs/design.md declares it.

    Paths: ``composed`` δ_i = e · D_i, D_i (classes, *shape of h_i) the mean over a few inputs of
    training of what the sequential walk below makes of each logit, refreshed every
    `options.every` steps (see `composed.composed_paths`); ``regression`` the same with D_i the
    regression of the walk's signals on e, over a batch at each refresh and the batches of those
    before (see `regression.regress`); ``sequential`` the error walks down through twins and true
    local derivatives; ``random`` δ_i = e · R_i, R_i fixed, of
    at most the twin's rank. Direct paths (all but ``sequential``) may be kept per channel (see
    `feedback.plan`) and looked ahead from (see `feedback.look_ahead`); a sequential
    signal has gone through all units anyway.

    Twins: ``fixed`` after their independent initialisation; ``mutual`` descend the alignment
    term at `options.rate`; ``tracked`` take the weights' values every `options.every` steps.
    What truncation zeroes in the weights is zeroed in the twins.

    With `options.rank` or `options.energy` below one the sequential walk goes through few of each
    layer's own singular directions instead (see `walk.low_rank_walk`).

    Raises:
      ValueError: an unknown path, update or form, `every` below one, or a rank of feedback that
        does not walk or does not track.
    """
    require_choice("feedback", options.path, PATHS)
    require_choice("feedback_update", options.update, UPDATES)
    require_choice("feedback_form", options.form, fb.FORMS)
    if options.every < 1:
        raise ValueError(f"feedback_every must be at least 1, got {options.every}")
    has_paths = options.path != "sequential"
    if options.rank != 1 or options.energy != 1:
        if has_paths or options.update != "tracked":
            flag = "feedback_rank" if options.rank != 1 else "feedback_energy"
            raise ValueError(
                f"{flag} is of feedback=sequential with feedback_update=tracked, got "
                f"{options.path} and {options.update}"
            )
        return low_rank_walk(network, options)
    units, shapes = network.units, network.shapes
    plan = fb.plan(shapes, options.form if has_paths else "full", options.limit)
    tracked, composed = options.update == "tracked", options.path == "composed"
    regressed = options.path == "regression"
    if regressed and network.targets is None:
        raise ValueError("feedback=regression needs targets, and this network was given none")

    def measured(feedback: SSAFeedback, params: Tree, mstate: Tree) -> SSAFeedback:
        # Twins that were just tracked are the weights.
        twins = None if tracked else feedback.twins
        if composed:
            (inputs,) = feedback.examples
            paths = cp.composed_paths(units, params, twins, mstate, inputs, plan)
            return feedback._replace(paths=paths)
        if regressed:
            inputs, targets = feedback.examples
            paths, gram = regression.regress(
                feedback.paths, feedback.gram, units, params, twins, mstate, inputs,
                lambda outputs: network.error(outputs, targets), plan,
            )  # fmt: skip
            return feedback._replace(paths=paths, gram=gram)
        return feedback

    def init(key: Array, params: Tree, mstate: Tree) -> SSAFeedback:
        key_twins, key_paths = jax.random.split(key)
        twins = jax.tree.map(jnp.copy, params) if tracked else tw.init_twins(key_twins, params)
        if options.path == "random":
            ranks = [min((f.rank for f in factors.leaves(p)), default=None) for p in params]
            return SSAFeedback(twins, fb.random_paths(key_paths, shapes, ranks, plan))
        if composed:
            few = jax.tree.map(lambda x: jnp.asarray(x[:_COMPOSED_EXAMPLES]), network.inputs)
            return measured(SSAFeedback(twins, (), (few,)), params, mstate)
        if regressed:
            seen = jax.tree.map(jnp.asarray, (network.inputs, network.targets))
            paths, gram = regression.empty(shapes, plan)
            return measured(SSAFeedback(twins, paths, seen, gram), params, mstate)
        return SSAFeedback(twins, ())

    def direct(feedback: SSAFeedback, error: Array, batch: Any, i: int) -> Array:
        del batch
        return fb.send(error, feedback.paths[i], shapes[i])

    def signals(
        feedback: SSAFeedback, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        sent = all_direct(direct, len(units))(feedback, params, tape, error, batch)
        return fb.look_ahead(tape, sent, options.lookahead)

    def update(
        feedback: SSAFeedback, before: Tree, after: Tree, tape: Tape, batch: Any
    ) -> SSAFeedback:
        del before, tape
        twins = feedback.twins
        if options.update == "mutual":
            twins = tw.meet(twins, after, options.rate)
        # Whose mean derivative it is hardly matters; errors vanish on what is known by heart.
        examples = newest(feedback.examples, batch) if regressed else feedback.examples
        return feedback._replace(twins=tw.follow_ranks(twins, after), examples=examples)

    def refresh(feedback: SSAFeedback, params: Tree, mstate: Tree) -> SSAFeedback:
        twins = jax.tree.map(jnp.copy, params) if tracked else feedback.twins
        return measured(feedback._replace(twins=twins), params, mstate)

    def down(feedback: SSAFeedback, params: Tree) -> Through:
        return fb.through_twins(units, feedback.twins)

    method = walking(init, down)
    if has_paths:
        ahead, note = options.lookahead, str(plan)
        method = Method(init=init, signals=signals, direct=direct, ahead=ahead, note=note)
    moves = tracked or composed or regressed
    return method._replace(
        update=update,
        refresh=refresh,
        refresh_every=options.every if moves else 0,
        twins=lambda feedback: feedback.twins,
    )
