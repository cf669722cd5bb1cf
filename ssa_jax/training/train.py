"""Training as pure functions: the state, the local gradients, the step, the evaluation."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssa_jax import factors, transforms
from ssa_jax.methods import Method
from ssa_jax.networks.forward import predict
from ssa_jax.networks.units import Unit
from ssa_jax.parallel.mesh import on_host
from ssa_jax.training import losses, unitwise
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.passes import MEMORY_MODES, PREDICTIONS
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Tree = Any


def init_state(
    method: Method,
    optimizer: optax.GradientTransformation,
    params: Tree,
    mstate: Tree,
    key: Array,
) -> TrainState:
    """The state before the first step, made by one program.

    It owns every buffer once, as a state that will be donated must: parameters and model state
    stay the caller's.
    """

    def init(params: Tree, mstate: Tree, key: Array) -> TrainState:
        key, key_feedback = jax.random.split(key)
        feedback = method.init(key_feedback, params, mstate)
        state = TrainState(jnp.int32(0), params, mstate, feedback, optimizer.init(params), key)
        return jax.tree.map(jnp.copy, state)

    return jax.jit(init)(params, mstate, key)


# Guesses of the second accuracy that is measured.
_TOP = 5

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def make_step(
    units: Sequence[Unit],
    method: Method,
    optimizer: optax.GradientTransformation,
    weights: LossWeights,
    on_compile: Callable[[], None] = lambda: None,
    memory: str = "taped",
) -> Step:
    """The jitted training step; its state is donated.

    Args:
      units: the network.
      method: makes the teaching signals.
      optimizer: the whole chain; see `optim`.
      weights: coefficients of the local loss.
      on_compile: called whenever the step is traced, which is once a set of shapes.
      memory: ``"taped"`` or ``"streamed"``: the same step to rounding, see `passes`. A streamed
        step updates each unit as soon as it has its gradient, where `unitwise.split` allows it.

    Returns:
      (state, batch) -> (state, metrics), metrics being ``loss`` and ``accuracy`` at the
      parameters before the step.

    Raises:
      ValueError: an unknown memory mode; when first called, a streamed step of a method whose
        signals need a tape.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}, got {memory!r}")
    run = MEMORY_MODES[memory]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        on_compile()
        found = functools.partial(
            run, units, method, weights, state.params, state.mstate, state.feedback, batch
        )
        chain = unitwise.split(optimizer, state.params) if memory == "streamed" else None
        if chain is None:
            logits, loss, mstate, gradients, tape = found()
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        else:
            take = functools.partial(chain.update, opt_state=state.opt_state)
            logits, loss, mstate, moved, tape = found(take=take)
            params, opt_state = chain.join(moved, state.opt_state)
        feedback = method.update(state.feedback, state.params, params, tape, batch)
        metrics = {"loss": loss, "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch.labels)}
        return TrainState(state.step + 1, params, mstate, feedback, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def make_truncation_losses(
    units: Sequence[Unit], memory: str = "taped"
) -> Callable[[TrainState, Batch], dict[str, Array]]:
    """The jitted measure of what the truncation of the last step does to the loss.

    Args:
      units: the network.
      memory: of the steps; a streamed pass holds one unit at a time here too.

    Returns:
      (state, batch) -> ``loss_before_truncation`` and ``loss_after_truncation``: cross-entropy of
      the batch in training mode at the state's parameters without and with the truncation of the
      step that made them, both NaN where it truncated nothing; empty where the chain never
      truncates.
    """
    logits_of = PREDICTIONS[memory]

    def measure(state: TrainState, batch: Batch) -> dict[str, Array]:
        whole = transforms.restore_dropped(state.params, state.opt_state)
        if whole is None:
            return {}

        def loss(p: Tree) -> Array:
            logits = logits_of(units, p, state.mstate, batch.images)
            return losses.cross_entropy(logits, batch.labels)

        pairs = zip(factors.leaves(whole), factors.leaves(state.params), strict=True)
        cut = jnp.any(jnp.stack([jnp.any(a.s != b.s) for a, b in pairs]))
        nan = jnp.full((), jnp.nan, jnp.result_type(jnp.float32, *jax.tree.leaves(whole)))
        before, after = jax.lax.cond(
            cut, lambda: (loss(whole), loss(state.params)), lambda: (nan, nan)
        )
        return {"loss_before_truncation": before, "loss_after_truncation": after}

    return jax.jit(measure)


def all_finite(tree: Tree) -> bool:
    """Whether every entry of every inexact leaf is finite; on the host, between epochs."""
    leaves = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))
    return all(bool(np.isfinite(on_host(x)).all()) for x in leaves)


def make_refresh(method: Method) -> Callable[[TrainState], TrainState]:
    """The jitted refresh of the method's feedback."""

    def refresh(state: TrainState) -> TrainState:
        return state._replace(feedback=method.refresh(state.feedback, state.params, state.mstate))

    return jax.jit(refresh)


def make_eval(units: Sequence[Unit]) -> Callable[[Tree, Tree, Batch], dict[str, Array]]:
    """The jitted evaluation of one batch: number of examples, correct answers and summed loss.

    Where there are more than five classes also those whose label is among the five largest
    logits. Labels of -1 mark padding and count for nothing.
    """

    def evaluate(params: Tree, mstate: Tree, batch: Batch) -> dict[str, Array]:
        logits = predict(units, params, mstate, batch.images)
        valid = batch.labels >= 0
        loss = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(valid, batch.labels, 0)
        )
        correct = (jnp.argmax(logits, -1) == batch.labels) & valid
        found = {
            "count": jnp.sum(valid),
            "correct": jnp.sum(correct),
            "loss": jnp.sum(jnp.where(valid, loss, 0.0)),
        }
        if logits.shape[-1] > _TOP:
            _, best = jax.lax.top_k(logits, _TOP)
            among = jnp.any(best == batch.labels[:, None], axis=-1) & valid
            found["correct_top5"] = jnp.sum(among)
        return found

    return jax.jit(evaluate)


def true_gradients(units: Sequence[Unit], params: Tree, mstate: Tree, batch: Batch) -> Tree:
    """jax.grad of the mean cross-entropy through the whole network in training mode."""

    def loss(p: Tree) -> Array:
        logits = predict(units, p, mstate, batch.images, train=True)
        return losses.cross_entropy(logits, batch.labels)

    return jax.grad(loss)(params)


def ranks(params: Tree) -> dict[str, int]:
    """Stored rank of every factorised layer by its path."""
    return {name: f.rank for name, f in factors.named_leaves(params).items()}
