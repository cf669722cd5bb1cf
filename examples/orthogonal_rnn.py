"""An orthogonal recurrent network that remembers its first input, in plain JAX.

    python examples/orthogonal_rnn.py

A recurrent matrix on the orthogonal group neither lets the state die out nor explode, so what
came in first is still there after many steps of noise. The mask names the one leaf that is
orthonormal; the others get plain Adam from the same chain.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssa_jax import transforms
from ssa_jax.factors import linalg

Array = jax.Array

CLASSES, HIDDEN, LENGTH, BATCH = 8, 32, 40, 64


def init(key: Array) -> dict[str, Array]:
    """Parameters: an orthogonal recurrent matrix, an input and an output map."""
    recurrent, enter, leave = jax.random.split(key, 3)
    return {
        "recurrent": jax.random.orthogonal(recurrent, HIDDEN),
        "enter": 0.1 * jax.random.normal(enter, (CLASSES, HIDDEN)),
        "leave": 0.1 * jax.random.normal(leave, (HIDDEN, CLASSES)),
    }


def logits(params: dict[str, Array], inputs: Array) -> Array:
    """What the state (batch, hidden) says after inputs (length, batch, classes)."""

    def step(h: Array, x: Array) -> tuple[Array, None]:
        return h @ params["recurrent"] + x @ params["enter"], None

    h, _ = jax.lax.scan(step, jnp.zeros((inputs.shape[1], HIDDEN)), inputs)
    return h @ params["leave"]


def batch(key: Array) -> tuple[Array, Array]:
    """A class shown once, then noise: inputs (length, batch, classes) and labels (batch,)."""
    first, rest = jax.random.split(key)
    labels = jax.random.randint(first, (BATCH,), 0, CLASSES)
    noise = 0.05 * jax.random.normal(rest, (LENGTH - 1, BATCH, CLASSES))
    return jnp.concatenate([jax.nn.one_hot(labels, CLASSES)[None], noise]), labels


def main(steps: int = 200) -> dict[str, float]:
    """Trains, and returns accuracy and drift off the orthogonal group."""
    params = init(jax.random.key(0))
    mask = {"recurrent": "columns"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        transforms.stiefel_adam(1e-2, mask=mask),
        transforms.orthogonality_drift(mask=mask),
    )
    state = optimizer.init(params)

    def loss(params: Any, inputs: Array, labels: Array) -> tuple[Array, Array]:
        scores = logits(params, inputs)
        entropy = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return jnp.mean(entropy), jnp.mean(scores.argmax(-1) == labels)

    @jax.jit
    def step(params: Any, state: Any, key: Array) -> tuple[Any, Any, Array]:
        (_, accuracy), grads = jax.value_and_grad(loss, has_aux=True)(params, *batch(key))
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, accuracy

    for i in range(steps):
        params, state, accuracy = step(params, state, jax.random.key(i))
    drift = optax.tree.get(state, "drift")
    return {
        "accuracy": float(accuracy),
        "drift": float(drift),
        "largest_stretch": float(jnp.linalg.norm(params["recurrent"], 2)),
        "error": float(linalg.orthogonality_error(params["recurrent"])),
    }


if __name__ == "__main__":
    print(main())
