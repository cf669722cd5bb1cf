"""SVD-Space Alignment: structured feedback that follows the weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax import feedback as fb
from ssa_jax.forward import Tape
from ssa_jax.methods.base import FeedbackOptions, Method, Network

Array = jax.Array
Tree = Any

PATHS = ("composed", "sequential", "random")
UPDATES = ("fixed", "mutual", "tracked")


class SSAFeedback(NamedTuple):
    """Twins of all parameters, and the direct paths D_i (empty for sequential feedback)."""

    twins: Tree
    paths: Sequence[Array]


def ssa(network: Network, options: FeedbackOptions) -> Method:
    """SVD-Space Alignment (arXiv 2510.25594), feedback as docs/design.md declares it.

    Paths: ``composed`` δ_i = e · D_i, D_i the twins' linear path from the logits down to h_i
    (classes, *shape of h_i); ``sequential`` the error walks down through twins and true local
    derivatives; ``random`` δ_i = e · R_i, R_i fixed, of at most the twin's rank.

    Twins: ``fixed`` after their independent initialisation; ``mutual`` descend the alignment
    term at `options.rate`; ``tracked`` take the weights' values every `options.every` steps.

    Raises:
      ValueError: an unknown path or update, or `every` below one.
    """
    if options.path not in PATHS:
        raise ValueError(f"feedback must be one of {', '.join(PATHS)}, got {options.path!r}")
    if options.update not in UPDATES:
        raise ValueError(
            f"feedback_update must be one of {', '.join(UPDATES)}, got {options.update!r}"
        )
    if options.every < 1:
        raise ValueError(f"feedback_every must be at least 1, got {options.every}")
    units, shapes = network

    def paths_of(twins: Tree, mstate: Tree) -> Sequence[Array]:
        if options.path == "composed":
            return fb.composed_paths(units, twins, mstate, shapes)
        return ()

    def init(key: Array, params: Tree, mstate: Tree) -> SSAFeedback:
        key_twins, key_paths = jax.random.split(key)
        if options.update == "tracked":
            twins = jax.tree.map(jnp.copy, params)
        else:
            twins = fb.init_twins(key_twins, params)
        if options.path == "random":
            ranks = [min((f.rank for f in factors.leaves(p)), default=None) for p in params]
            return SSAFeedback(twins, fb.random_paths(key_paths, shapes, ranks))
        return SSAFeedback(twins, paths_of(twins, mstate))

    def signals(
        feedback: SSAFeedback, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        del batch
        if options.path == "sequential":
            return fb.walk(units, params, feedback.twins, tape, error)
        return fb.send(error, feedback.paths)

    def update(feedback: SSAFeedback, params: Tree) -> SSAFeedback:
        if options.update != "mutual":
            return feedback
        return feedback._replace(twins=fb.meet(feedback.twins, params, options.rate))

    def refresh(feedback: SSAFeedback, params: Tree, mstate: Tree) -> SSAFeedback:
        tracked = options.update == "tracked"
        twins = jax.tree.map(jnp.copy, params) if tracked else feedback.twins
        if options.path == "composed":
            return SSAFeedback(twins, paths_of(twins, mstate))
        return feedback._replace(twins=twins)

    return Method(
        init=init,
        signals=signals,
        update=update,
        refresh=refresh,
        refresh_every=0 if options.update == "fixed" else options.every,
        twins=lambda feedback: feedback.twins,
    )
