"""A Flax NNX network with a factored layer and an orthonormal one.

    python examples/flax_nnx_mlp.py

The factors of `SVDDense` need no mask. The kernel of the `nnx.Linear` is labelled by its path: it
has fewer rows than columns, so its rows are orthonormal. The chain runs on the split parameters,
since `nnx.Optimizer` rebuilds its state without the type of a `Factors`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ssa_jax import factors, transforms
from ssa_jax.factors import linalg
from ssa_jax.layers import SVDDense

Array = jax.Array

CLASSES, FEATURES = 3, 8


class Network(nnx.Module):
    """Embeds by orthonormal rows, mixes by factors of half rank, reads out."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Linear(FEATURES, 32, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        self.mix = SVDDense(32, 32, rank=0.5, rngs=rngs)
        self.read = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps x (batch, features) to logits (batch, classes)."""
        return self.read(nnx.relu(self.mix(nnx.relu(self.embed(x)))))


def data(key: Array, count: int = 512) -> tuple[Array, Array]:
    """Points on noisy shells: the class is the shell of the radius."""
    directions, radii = jax.random.split(key)
    labels = jnp.arange(count) % CLASSES
    x = jax.random.normal(directions, (count, FEATURES))
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    radius = 1 + labels + 0.1 * jax.random.normal(radii, (count,))
    return x * radius[:, None], labels


def main(steps: int = 150) -> dict[str, float]:
    """Trains, and returns accuracy, the kept rank and the drift off the manifolds."""
    model = Network(nnx.Rngs(0))
    mask = transforms.label_paths(lambda path, x: "rows" if "embed/kernel" in path else False)
    chain = optax.chain(
        transforms.add_hoyer(1e-3, mask=mask),
        transforms.scale_by_riemannian_adam(mask=mask),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(2e-2, steps)),
        transforms.truncate_rank(lambda count: 1 - 0.5 * count / steps, mask=mask),
        transforms.retract(mask=mask),
    )
    graph, params = nnx.split(model, nnx.Param)
    state = chain.init(params)
    x, labels = data(jax.random.key(1))

    def loss(params: Any) -> Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(
            nnx.merge(graph, params)(x), labels
        )
        return jnp.mean(entropy)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    nnx.update(model, params)
    held_out, truth = data(jax.random.key(2))
    embed = model.embed.kernel.get_value()
    drift = jnp.maximum(factors.orthogonality_error(params), linalg.orthogonality_error(embed.T))
    return {
        "accuracy": float(jnp.mean(model(held_out).argmax(-1) == truth)),
        "rank": int(jnp.count_nonzero(model.mix.kernel.get_value().s)),
        "drift": float(drift),
    }


if __name__ == "__main__":
    print(main())
