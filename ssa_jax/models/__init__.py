"""Models by name. A model is an ordinary NNX module whose `units` list its units of locality."""

from collections.abc import Callable

from flax import nnx

from ssa_jax.models.feedforward import mlp, smallconv, vgg13

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": mlp,
    "smallconv": smallconv,
    "vgg13": vgg13,
}
