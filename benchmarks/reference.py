"""Backpropagation as a user of Flax and optax would write it, for comparison with our steps.

The same modules, differentiated as one: none of this project's units, methods or steps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from ssa_jax.types import Batch

Array = jax.Array
Tree = Any
State = tuple[Tree, Tree, optax.OptState]
Step = Callable[[State, Batch], tuple[State, dict[str, Array]]]


def by_xla(model: nnx.Module) -> nnx.Module:
    """The model with every `nnx.Conv` as Flax makes it: XLA's own convolution."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = lax.conv_general_dilated
    return model


def make_step(
    model: nnx.Module, learning_rate: optax.ScalarOrSchedule, clip: float
) -> tuple[Step, State]:
    """A jitted training step that is donated its state, and the state before the first one.

    Mean cross-entropy, Adam, and optax's clip of each gradient array by its RMS.

    Args:
      model: any NNX module from images to logits.
      learning_rate: a number or a schedule.
      clip: largest RMS.

    Returns:
      step: (state, batch) -> (state, metrics), metrics being ``loss`` and ``accuracy``.
      state: (parameters, the rest of the model's state, the optimiser's).
    """
    optimizer = optax.chain(optax.clip_by_block_rms(clip), optax.adam(learning_rate))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)  # type: ignore[misc]

    def loss_of(params: Tree, rest: Tree, batch: Batch) -> tuple[Array, tuple[Array, Tree]]:
        module: Any = nnx.merge(graph, params, rest, copy=True)
        logits = module(batch.images)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(losses), (logits, nnx.split(module, nnx.Param, ...)[2])  # type: ignore[misc]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        params, rest, opt_state = state
        (loss, (logits, rest)), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, rest, batch
        )
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == batch.labels)
        return (params, rest, opt_state), {"loss": loss, "accuracy": accuracy}

    return jax.jit(step, donate_argnums=0), (params, rest, optimizer.init(params))
