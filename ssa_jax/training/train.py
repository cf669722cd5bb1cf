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
from ssa_jax.networks.units import Unit, first_copies, sum_shared
from ssa_jax.parallel.mesh import on_host
from ssa_jax.training import unitwise
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.passes import MEMORY_MODES, PREDICTIONS
from ssa_jax.training.tasks import CROSS_ENTROPY, Task, mean_loss, top5_accuracy
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Tree = Any


def init_state(
    method: Method, optimizer: optax.GradientTransformation, params: Tree, mstate: Tree, key: Array
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
      (state, batch) -> (state, metrics): ``loss`` and the means of the task's metrics, such as
      ``accuracy``, at the parameters before the step.

    Raises:
      ValueError: an unknown memory mode; when first called, a streamed step of a method whose
        signals need a tape.
    """
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory must be one of {', '.join(MEMORY_MODES)}, got {memory!r}")
    run = MEMORY_MODES[memory]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        on_compile()
        take_pass = functools.partial(
            run, units, method, weights, state.params, state.mstate, state.feedback, batch
        )
        streamed = memory == "streamed" and not any(unit.shared for unit in units)
        chain = unitwise.split(optimizer, state.params) if streamed else None
        if chain is None:
            logits, loss, mstate, gradients, tape = take_pass()
            gradients = sum_shared(units, gradients)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = first_copies(units, optax.apply_updates(state.params, updates))
        else:
            take = functools.partial(chain.update, opt_state=state.opt_state)
            logits, loss, mstate, moved, tape = take_pass(take=take)
            params, opt_state = chain.join(moved, state.opt_state)
        feedback = method.update(state.feedback, state.params, params, tape, batch)
        metrics = {"loss": loss, **measured(weights.task, logits, batch.labels)}
        return TrainState(state.step + 1, params, mstate, feedback, opt_state, state.key), metrics

    return jax.jit(step, donate_argnums=0)


def measured(task: Task, outputs: Array, targets: Array) -> dict[str, Array]:
    """The means of a task's metrics over a batch."""
    return {name: jnp.mean(metric(outputs, targets)) for name, metric in task.metrics.items()}


def make_truncation_losses(
    units: Sequence[Unit], memory: str = "taped", task: Task = CROSS_ENTROPY
) -> Callable[[TrainState, Batch], dict[str, Array]]:
    """The jitted measure of what the truncation of the last step does to the loss.

    Args:
      units: the network.
      memory: of the steps; a streamed pass holds one unit at a time here too.
      task: whose loss is measured.

    Returns:
      (state, batch) -> ``loss_before_truncation`` and ``loss_after_truncation``: mean loss of
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
            return mean_loss(task, logits, batch.labels)

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


def resized(method: Method, state: TrainState) -> TrainState:
    """The state with its feedback in the shapes that it asks for; the same one where it stays."""
    if method.resize is None:
        return state
    wanted = jax.jit(method.resize.sizes)(state.feedback, state.params, state.mstate)
    sizes = jax.tree.map(lambda n: int(on_host(n)), wanted)
    feedback = method.resize.to(state.feedback, sizes)
    return state if feedback is state.feedback else state._replace(feedback=feedback)


def make_eval(
    units: Sequence[Unit], task: Task = CROSS_ENTROPY
) -> Callable[[Tree, Tree, Batch], dict[str, Array]]:
    """The jitted evaluation of one batch: number of examples, and sums of the loss and metrics.

    Of more than five classes also those whose label is among the five largest logits. Examples
    of weight zero, and labels of -1 where there are no weights, are padding and count for nothing.

    Args:
      units: the network.
      task: its loss and metrics.
    """

    def evaluate(params: Tree, mstate: Tree, batch: Batch) -> dict[str, Array]:
        outputs = predict(units, params, mstate, batch.images)
        targets = batch.labels
        counts = targets >= 0 if batch.weight is None else batch.weight > 0
        measures = {"loss": task.loss, **task.metrics}
        if task.classes:
            targets = jnp.where(counts, targets, 0) if targets.ndim == 1 else targets
            if outputs.shape[-1] > _TOP:
                measures["top5_accuracy"] = top5_accuracy
        sums = {
            name: jnp.sum(jnp.where(counts, measure(outputs, targets), 0.0))
            for name, measure in measures.items()
        }
        return {"count": jnp.sum(counts), **sums}

    return jax.jit(evaluate)


def true_gradients(
    units: Sequence[Unit], params: Tree, mstate: Tree, batch: Batch, task: Task = CROSS_ENTROPY
) -> Tree:
    """jax.grad of the mean loss through the whole network in training mode."""

    def loss(p: Tree) -> Array:
        logits = predict(units, p, mstate, batch.images, train=True)
        return mean_loss(task, logits, batch.labels)

    return jax.grad(loss)(params)


def ranks(params: Tree) -> dict[str, int]:
    """Stored rank of every factorised layer by its path."""
    return {name: f.rank for name, f in factors.named_leaves(params).items()}
