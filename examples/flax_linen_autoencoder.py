"""A Flax Linen autoencoder whose encoder is a point of the Stiefel manifold.

    python examples/flax_linen_autoencoder.py

With orthonormal columns the linear autoencoder x -> b + (x - b) E Eᵀ has its optimum in closed
form: E spans the leading principal components. `optax.partition` gives E to Riemannian momentum
and the bias to Adam.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

from ssa_jax import transforms
from ssa_jax.factors import linalg

Array = jax.Array

FEATURES, CODE, COUNT = 12, 3, 256


class Autoencoder(nn.Module):
    """Tied weights: the decoder is the encoder's transpose."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Reconstructs x (batch, features)."""
        encoder = self.param("encoder", nn.initializers.orthogonal(), (FEATURES, CODE))
        bias = self.param("bias", nn.initializers.zeros, (FEATURES,))
        center = jnp.broadcast_to(bias, x.shape)
        return center + (x - center) @ encoder @ encoder.T


def data(key: Array) -> Array:
    """Points (count, features) with three strong directions, off the origin."""
    shift, turn, points = jax.random.split(key, 3)
    spread = jnp.concatenate([jnp.array([4.0, 3.0, 2.0]), 0.3 * jnp.ones(FEATURES - CODE)])
    x = spread[None, :] * jax.random.normal(points, (COUNT, FEATURES))
    return x @ jax.random.orthogonal(turn, FEATURES) + jax.random.normal(shift, (1, FEATURES))


def main(steps: int = 300) -> dict[str, float]:
    """Trains, and returns the excess loss and angle to the principal components."""
    x = data(jax.random.key(0))
    model = Autoencoder()
    rate = optax.cosine_decay_schedule(0.05, steps)
    optimizer = optax.partition(
        {
            "stiefel": transforms.stiefel_sgd(rate, 0.9, mask={"params": {"encoder": "columns"}}),
            "euclidean": optax.adam(rate),
        },
        {"params": {"encoder": "stiefel", "bias": "euclidean"}},
    )
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(1), x), tx=optimizer
    )

    def loss(params: Any) -> Array:
        return jnp.mean(jnp.square(model.apply(params, x) - x))

    @jax.jit
    def step(state: TrainState) -> TrainState:
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(steps):
        state = step(state)
    encoder = state.params["params"]["encoder"]
    values, vectors = jnp.linalg.eigh(jnp.cov(x.T, bias=True))
    angles = linalg.principal_angles(encoder, vectors[:, -CODE:])
    return {
        "excess_loss": float(loss(state.params) - jnp.sum(values[:-CODE]) / FEATURES),
        "largest_angle": float(jnp.max(angles)),
        "drift": float(linalg.orthogonality_error(encoder)),
    }


if __name__ == "__main__":
    print(main())
