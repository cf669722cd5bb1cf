"""What outputs are for: losses of outputs and targets, and what is measured beside them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Tree = Any
# (outputs, targets) -> one value an example, (batch,).
PerExample = Callable[[Array, Array], Array]


class Task(NamedTuple):
    """A loss of outputs (batch, ...) and targets (batch, ...), and measures of its kind.

    Attributes:
      name: of the loss.
      loss: of each example; training descends its mean, and the error that methods send down is
        the gradient of that mean by the outputs.
      metrics: by name; one named ``accuracy`` is a share of right answers, by which the best
        checkpoint is chosen. Without it the least loss chooses.
      encode: (targets, outputs) -> targets in the shape of the outputs, for methods that send
        targets instead of the error.
      classes: whether targets are whole numbers in [0, classes).
    """

    name: str
    loss: PerExample
    metrics: Mapping[str, PerExample] = {}
    encode: Callable[[Array, Array], Array] = lambda targets, outputs: targets.reshape(
        outputs.shape
    ).astype(outputs.dtype)
    classes: bool = False


def mean_loss(task: Task, outputs: Array, targets: Array) -> Array:
    """The mean of the loss over the batch."""
    return jnp.mean(task.loss(outputs, targets))


def output_error(task: Task, outputs: Array, targets: Array) -> tuple[Array, Array]:
    """The mean loss, and its gradient by the outputs: the error e, of their shape."""
    return jax.value_and_grad(lambda y: mean_loss(task, y, targets))(outputs)


def cross_entropy(smoothing: float = 0.0) -> Task:
    """Softmax cross-entropy of logits (batch, classes) and labels (batch,) or distributions.

    Targets are (1 - smoothing) onehot + smoothing/classes (Szegedy et al. 2016); distributions
    (batch, classes) are smoothed alike, and their right answer is the likeliest class. Of more
    than five classes `top5_accuracy` counts labels among the five largest logits.

    Args:
      smoothing: in [0, 1).
    """

    def loss(logits: Array, targets: Array) -> Array:
        if not smoothing and targets.ndim < logits.ndim:
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        wanted = _distributions(targets, logits)
        if smoothing:
            wanted = optax.smooth_labels(wanted, smoothing)
        return optax.softmax_cross_entropy(logits, wanted)

    def accuracy(logits: Array, targets: Array) -> Array:
        return jnp.argmax(logits, -1) == _labels(targets, logits)

    return Task("cross_entropy", loss, {"accuracy": accuracy}, _distributions, classes=True)


def _distributions(targets: Array, logits: Array) -> Array:
    if targets.ndim == logits.ndim:
        return targets.astype(logits.dtype)
    return jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)


def _labels(targets: Array, logits: Array) -> Array:
    return jnp.argmax(targets, -1) if targets.ndim == logits.ndim else targets


def top5_accuracy(logits: Array, targets: Array) -> Array:
    """Whether the label is among the five largest logits, (batch,)."""
    _, best = jax.lax.top_k(logits, 5)
    return jnp.any(best == _labels(targets, logits)[:, None], axis=-1)


def binary_cross_entropy() -> Task:
    """Sigmoid cross-entropy of several labels at once, targets 0 or 1 of the outputs' shape.

    The mean over the labels of an example; accuracy is the share of labels on the right side.
    """

    def loss(logits: Array, targets: Array) -> Array:
        targets = targets.reshape(logits.shape).astype(logits.dtype)
        return _mean(optax.sigmoid_binary_cross_entropy(logits, targets))

    def accuracy(logits: Array, targets: Array) -> Array:
        right = (logits > 0) == (targets.reshape(logits.shape) > 0.5)
        return _mean(right.astype(logits.dtype))

    return Task("binary_cross_entropy", loss, {"accuracy": accuracy})


def mean_squared_error() -> Task:
    """The mean over an example's outputs of (output - target)²; targets of the outputs' shape."""

    def loss(outputs: Array, targets: Array) -> Array:
        return _mean(jnp.square(outputs - targets.reshape(outputs.shape)))

    def absolute(outputs: Array, targets: Array) -> Array:
        return _mean(jnp.abs(outputs - targets.reshape(outputs.shape)))

    return Task("mean_squared_error", loss, {"mean_absolute_error": absolute})


def _mean(x: Array) -> Array:
    """Over all axes but the first."""
    return jnp.mean(x.reshape(len(x), -1), axis=1)


def from_function(loss: Callable[[Array, Array], Array], name: str = "") -> Task:
    """A task of a function (outputs, targets) -> scalar or (batch,), the mean over the batch.

    A scalar function is called on one example at a time, each a batch of one.
    """

    def each(outputs: Array, targets: Array) -> Array:
        shape = jax.eval_shape(loss, outputs, targets).shape
        if shape == (len(outputs),):
            return loss(outputs, targets)
        if shape:
            raise ValueError(
                f"a loss must give a scalar or one value an example, ({len(outputs)},); got an "
                f"array of shape {shape}"
            )
        return jax.vmap(lambda y, t: loss(y[None], t[None]))(outputs, targets)

    return Task(name or getattr(loss, "__name__", "loss"), each)


CROSS_ENTROPY = cross_entropy()
LOSSES: dict[str, Callable[[], Task]] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mean_squared_error": mean_squared_error,
}
