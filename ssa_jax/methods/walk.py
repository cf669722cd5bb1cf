"""Sequential feedback of low rank: the error walks down through a few singular directions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax import factors
from ssa_jax.factors import PAYS, Factors, bucket, is_factors, path_name
from ssa_jax.factors.one_by_one import eigh
from ssa_jax.methods import feedback as fb
from ssa_jax.methods.base import (
    FeedbackOptions,
    Method,
    Network,
    Resize,
    Through,
    newest,
    require_choice,
    walking,
)
from ssa_jax.networks.units import Unit, expect

Array = jax.Array
Tree = Any

BASES = ("spectrum", "error")
# Whose error is measured, at most.
_EXAMPLES = 32
# Weight of what is believed of it without any.
_PRIOR = 1e-2
_TINY = 1e-30


class WalkFeedback(NamedTuple):
    """What a walk through few directions keeps.

    Attributes:
      passed: of every unit, by layer, what of the error passes it (see `factors.WithFeedback`).
      examples: inputs and targets of the last batch on whose error it is measured; else none.
    """

    passed: Tree
    examples: Tree = ()


def directions(rank: int, share: float) -> int:
    """How many of a layer's singular directions a share of them is: rounded up, at least one."""
    return math.ceil(share * rank - 1e-9)


def low_rank_walk(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i with W_q for W)ᵀ δ_i, W_q of rank q in the span of W.

    W = U diag(s) Vᵀ passes to its input V c, c = diag(s) Uᵀ δ being r coefficients. Uᵀ δ the
    gradient of V takes in any case, so what the signal costs is the product of q coefficients with
    as many columns (d_in, q) alone. (A convolution that is run as one kernel has no Uᵀ δ, and takes
    both thin products.) q is `options.rank` of the layer's stored rank, rounded up. Which q, by
    `options.basis`, is found every `options.every` steps and after a compaction:

    ``spectrum``: those of largest |s|. W_qᵀ is then the best approximation of Wᵀ of that rank.
    ``error``: P Pᵀ c, with P (r, q) the q leading eigenvectors of C = Σ c cᵀ in an exact backward
    pass of a few examples of the last batch (see `moments`, `principal`): one product with P more.
    As V is orthonormal, no other channel of rank q brings them a signal nearer to Wᵀ δ in the mean
    square.

    With `options.energy` below one q is at most that many, and after every epoch the fewest whose
    directions hold that share of the error's energy, tr(Pᵀ C P) / tr C, the directions being found
    from one half of the examples and C from the other. The cosine between what comes to a layer
    and what passes it is then the root of that share. Until the first epoch has ended, or a method
    before this one, q is `options.rank` of all: with all of them the start is exact. q is rounded
    up to what the hardware computes anyway, and stays until a layer needs more or it is worth it.

    The values are always those of the present weights. Everything else on the way, dense layers
    among it, passes the error exactly. All directions are backpropagation.

    Raises:
      ValueError: an unknown basis, a share or energy outside (0, 1], the error's directions in a
        network without targets, an energy with another basis; at init, a model without factors,
        and an energy of fewer than two examples.
    """
    share, energy, by_error = options.rank, options.energy, options.basis == "error"
    require_choice("feedback_basis", options.basis, BASES)
    for flag, value in {"feedback_rank": share, "feedback_energy": energy}.items():
        if not 0 < value <= 1:
            raise ValueError(f"{flag} must lie in (0, 1], got {value}")
    if energy < 1 and not by_error:
        raise ValueError("feedback_energy is the error's: give feedback_basis=error")
    if by_error and network.targets is None:
        raise ValueError("feedback_basis=error needs targets, and this network was given none")

    def measured(params: Tree, mstate: Tree, examples: Tree) -> Tree:
        inputs, targets = examples
        return moments(network.units, params, mstate, inputs, lambda y: network.error(y, targets))

    def most(params: Tree) -> Tree:
        return of_factors(lambda f: directions(f.rank, share), params)

    def passed(params: Tree, mstate: Tree, examples: Tree, widths: Tree) -> Tree:
        if not by_error:
            all_factors = of_factors(lambda f: f, params)
            return jax.tree.map(factors.leading, all_factors, widths, is_leaf=is_factors)
        spectra = of_factors(lambda f: f.s, params)
        return jax.tree.map(principal, measured(params, mstate, examples), spectra, widths)

    def init(key: Array, params: Tree, mstate: Tree) -> WalkFeedback:
        del key
        if not factors.leaves(params):
            raise ValueError("feedback_rank is a share of factors' rank, and this model has none")
        seen = (network.inputs, network.targets) if by_error else ()
        examples = jax.tree.map(lambda x: jnp.asarray(x[:_EXAMPLES]), seen)
        if energy < 1 and len(jax.tree.leaves(examples)[0]) < 2:
            raise ValueError("feedback_energy needs a batch of at least two, to measure by halves")
        return WalkFeedback(passed(params, mstate, examples, most(params)), examples)

    def down(feedback: WalkFeedback, params: Tree) -> Through:
        # All of them in their own order are the weights, to the last bit.
        twins = tuple(
            unit | {n: p for n, p in of_unit.items() if p.shape[-1] < unit[n].rank}
            for unit, of_unit in zip(params, feedback.passed, strict=True)
        )
        return fb.through_twins(network.units, twins)

    def update(
        feedback: WalkFeedback, before: Tree, after: Tree, tape: Any, batch: Any
    ) -> WalkFeedback:
        del before, after, tape
        return feedback._replace(examples=newest(feedback.examples, batch))

    def refresh(feedback: WalkFeedback, params: Tree, mstate: Tree) -> WalkFeedback:
        # Ranks may have fallen below what passed.
        widths = jax.tree.map(min, most(params), widths_of(feedback))
        return feedback._replace(passed=passed(params, mstate, feedback.examples, widths))

    def sizes(feedback: WalkFeedback, params: Tree, mstate: Tree) -> Tree:
        seen = measured(params, mstate, jax.tree.map(lambda x: x[::2], feedback.examples))
        others = measured(params, mstate, jax.tree.map(lambda x: x[1::2], feedback.examples))
        spectra = of_factors(lambda f: f.s, params)
        return jax.tree.map(functools.partial(holding, energy), seen, others, spectra)

    def to(feedback: WalkFeedback, sizes: Tree) -> WalkFeedback:
        def width(p: Array, n: int) -> int:
            return bucket(n, directions(len(p), share))

        wanted, now = jax.tree.map(width, feedback.passed, sizes), widths_of(feedback)
        needs = any(jax.tree.leaves(jax.tree.map(lambda a, b: a > b, wanted, now)))
        if not needs and sum(jax.tree.leaves(wanted)) > PAYS * sum(jax.tree.leaves(now)):
            return feedback
        resized = jax.tree.map(
            lambda p, n: jnp.zeros((len(p), n), p.dtype), feedback.passed, wanted
        )
        return feedback._replace(passed=resized)

    note = f"walking through {share:g} of each layer's singular directions"
    if energy < 1:
        note = f"walking through what holds {energy:g} of the error's energy" + (
            f", at most {share:g} of each layer's singular directions" if share < 1 else ""
        )
    elif by_error:
        note += ", those of the error"
    return walking(init, down)._replace(
        update=update,
        refresh=refresh,
        refresh_every=options.every,
        resize=Resize(sizes, to) if energy < 1 else None,
        note=note,
        tell=lambda feedback: {"directions": by_layer(widths_of(feedback))},
    )


def widths_of(feedback: WalkFeedback) -> Tree:
    """How many directions pass every layer, by unit and layer."""
    return jax.tree.map(lambda p: p.shape[-1], feedback.passed)


def by_layer(widths: Tree) -> dict[str, int]:
    """The same by the layers' paths, as ranks are told."""
    named = jax.tree_util.tree_leaves_with_path(widths)
    return {path_name(path): n for path, n in named}


def holding(energy: float, seen: Array, others: Array, s: Array) -> Array:
    """The fewest directions of `principal` that hold a share of the energy of other examples.

    Args:
      energy: share of tr C.
      seen: moments (r, r) from which the directions are found.
      others: moments C (r, r), of which they hold tr(Pᵀ C P); of none, all are needed.
      s: singular values (r,).
    """
    found = principal(seen, s, len(s))[:, ::-1]
    held = jnp.cumsum(jnp.sum(found * (others @ found), 0))
    few = 1 + jnp.sum(held < energy * held[-1])
    return jnp.where(held[-1] > 0, jnp.minimum(few, len(s)), len(s))


def principal(moments: Array, s: Array, n: int) -> Array:
    """The n leading eigenvectors (r, n) of moments (r, r) and a little of diag(s²).

    That is what c = diag(s) Uᵀ δ has of a δ that may be anything: where the examples say nothing,
    as of a layer that is met by fewer of them than its rank, the directions are those of largest
    |s|, and not what rounding makes them.
    """
    both = moments, jnp.diag(jnp.square(s))
    seen, of_any = (m / jnp.maximum(jnp.trace(m), _TINY) for m in both)
    return eigh(seen + _PRIOR * of_any)[1][:, -n:]


def of_factors(fn: Callable[[Factors], Any], params: Tree) -> Tree:
    """What a function makes of the factors of every unit, by layer."""
    return tuple({n: fn(f) for n, f in unit.items() if is_factors(f)} for unit in params)


def moments(
    units: Sequence[Unit], params: Tree, mstate: Tree, x: Tree, error: Callable[[Array], Array]
) -> Tree:
    """How the true signals lie among the singular directions of every layer.

    Args:
      units: n units.
      params: their parameters.
      mstate: model state.
      x: inputs of the model.
      error: outputs (batch, ...) -> e of the same shape.

    Returns:
      Of every unit, by layer, (r, r): Σ c cᵀ over examples and positions, up to a factor of the
      layer, with c = diag(s) Uᵀ δ and δ what a backward pass in training mode brings to its output.
    """
    # What passes is all of c, and its own cotangent is what is looked for.
    whole = of_factors(lambda f: jnp.eye(f.rank, dtype=f.s.dtype), params)
    twins = tuple(unit | of_unit for unit, of_unit in zip(params, whole, strict=True))
    expect(units, params, twins)
    pullbacks = []
    for i, unit in enumerate(units):

        def apply(whole: Tree, x: Tree, i: int = i, unit: Unit = unit) -> Array:
            return unit.walk(params[i], params[i] | whole, mstate[i], x)

        x, pullback = jax.vjp(apply, whole[i], x)
        pullbacks.append(pullback)
    found: list[Tree] = []
    signal = error(x)
    for pullback in reversed(pullbacks):
        of_unit, signal = pullback(signal)
        found.insert(0, of_unit)
    return tuple(found)
