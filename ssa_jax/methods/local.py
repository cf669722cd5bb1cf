"""Layerwise readouts: every hidden unit has a loss of its own on the labels."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ssa_jax.layers.lowering import conv
from ssa_jax.methods.base import FeedbackOptions, Method, Network, Readouts, require_choice
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any

READOUTS = ("pred", "sim", "predsim")
READOUT_UPDATES = ("learned", "fixed")
# Share of similarity matching in predsim, and most inputs of a pred readout, as in the paper.
_SIM_SHARE = 0.99
_MOST_FEATURES = 2048


class LocalFeedback(NamedTuple):
    """The readouts of the hidden units, and their optimiser's state."""

    readouts: Tree
    opt_state: optax.OptState


def local(network: Network, options: FeedbackOptions) -> Method:
    """δ_i = ∂ℓ_i/∂h_i of a local loss ℓ_i (Nøkland & Eidnes 2019); the last unit gets e.

    ``pred``: ℓ = cross-entropy of a linear readout of h, average-pooled to at most 2048 features.
    ``sim``: ℓ = mean (S(f(h)) - S(y))² over pairs of examples, S the matrix of cosines between
    centred rows, y one-hot, f a linear map (a 3x3 convolution, then the standard deviation over
    positions, for maps). ``predsim``: 0.01 pred + 0.99 sim.

    Readouts are ``learned`` on ℓ by Adam at `options.readout_rate`, or stay ``fixed`` as drawn.

    Raises:
      ValueError: an unknown readout or way to update it.
    """
    require_choice("readout", options.readout, READOUTS)
    require_choice("readout_update", options.readout_update, READOUT_UPDATES)
    classes = network.shapes[-1][0]

    def init(key: Array, i: int) -> Tree:
        return _init_readout(key, _spatial(network.shapes[i]), classes, options.readout)

    def loss(readout: Tree, i: int, h: Array, targets: Array) -> Array:
        del i
        return readout_loss(readout, h, targets)

    return by_readouts(network, options, init, loss)


def by_readouts(
    network: Network,
    options: FeedbackOptions,
    init_one: Callable[[Array, int], Tree],
    loss_one: Callable[[Tree, int, Array, Array], Array],
) -> Method:
    """Signals δ_i = ∂ℓ_i/∂h_i of losses behind a readout each; the last unit gets e.

    Args:
      network: to be trained.
      options: `readout_update` and `readout_rate` are read.
      init_one: (key, i) -> the readout of hidden unit i.
      loss_one: (readout, i, h_i, targets in the outputs' shape) -> ℓ_i, the mean over the batch.
    """
    optimizer = optax.adam(options.readout_rate)

    def drawn(key: Array) -> tuple[Tree, ...]:
        keys = jax.random.split(key, len(network.shapes))
        return tuple(init_one(k, i) for i, k in enumerate(keys[:-1]))

    def init(key: Array, params: Tree, mstate: Tree) -> LocalFeedback:
        del params, mstate
        readouts = drawn(key)
        return LocalFeedback(readouts, optimizer.init(readouts))

    def loss(readout: Tree, i: int, h: Array, outputs: Array, batch: Any) -> Array:
        return loss_one(readout, i, h, network.encode(batch.labels, outputs))

    def losses(readouts: Tree, hidden: Sequence[Array], logits: Array, batch: Any) -> Array:
        # Each unit's loss reads its own output alone, so one gradient of the sum serves all.
        each = (
            loss(r, i, h, logits, batch)
            for i, (r, h) in enumerate(zip(readouts, hidden, strict=True))
        )
        return sum(each, start=jnp.float32(0))

    def signals(
        feedback: LocalFeedback, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        del params
        return (*jax.grad(losses, 1)(feedback.readouts, *_apart(tape), batch), error)

    def update(
        feedback: LocalFeedback, before: Tree, after: Tree, tape: Tape, batch: Any
    ) -> LocalFeedback:
        del before, after
        if options.readout_update == "fixed":
            return feedback
        return move(feedback, jax.grad(losses)(feedback.readouts, *_apart(tape), batch))

    def move(feedback: LocalFeedback, gradients: Sequence[Tree]) -> LocalFeedback:
        if options.readout_update == "fixed":
            return feedback
        updates, opt_state = optimizer.update(gradients, feedback.opt_state)
        return LocalFeedback(optax.apply_updates(feedback.readouts, updates), opt_state)

    sizes = (math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(drawn, jax.random.key(0))))
    note = f"readouts of {sum(sizes):,} parameters beside the network's"
    readouts = Readouts(lambda feedback: feedback.readouts, loss, move)
    return Method(init=init, signals=signals, update=update, readouts=readouts, note=note)


def _apart(tape: Tape) -> tuple[Sequence[Array], Array]:
    """The outputs of the hidden units, and the logits."""
    return tape.outputs[:-1], tape.outputs[-1]


def _init_readout(key: Array, shape: tuple[int, ...], classes: int, kind: str) -> Tree:
    key_pred, key_sim = jax.random.split(key)
    readout = {}
    if kind != "sim":
        d = math.prod(_pooled(shape))
        weight = jax.random.normal(key_pred, (d, classes)) / jnp.sqrt(d)
        readout["pred"] = {"kernel": weight, "bias": jnp.zeros(classes)}
    if kind != "pred":
        kernel = (3, 3) if _is_map(shape) else ()
        c = shape[-1]
        scale = jnp.sqrt(math.prod(kernel) * c)
        readout["sim"] = {"kernel": jax.random.normal(key_sim, (*kernel, c, c)) / scale}
    return readout


def _spatial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape, of tokens (T, C) that of a map one position wide."""
    return (shape[0], 1, shape[1]) if len(shape) == 2 else shape


def _is_map(shape: tuple[int, ...]) -> bool:
    """Whether a unit's output has more than one position."""
    return len(shape) == 3 and shape[0] * shape[1] > 1


def _pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape that a pred readout sees: windows double until few enough features are left."""
    if not _is_map(shape):
        return (math.prod(shape),)
    height, width, channels = shape
    while height * width * channels > _MOST_FEATURES and height * width > 1:
        height, width = max(1, height // 2), max(1, width // 2)
    return height, width, channels


def readout_loss(readout: Tree, h: Array, targets: Array) -> Array:
    """ℓ of one unit's output h (batch, ...) on one-hot targets (batch, classes); see `local`."""
    h = h.reshape(len(h), *_spatial(h.shape[1:]))
    losses = {name: _LOSSES[name](weights, h, targets) for name, weights in readout.items()}
    if len(losses) == 1:
        return losses.popitem()[1]
    return (1 - _SIM_SHARE) * losses["pred"] + _SIM_SHARE * losses["sim"]


def _pred_loss(readout: Tree, h: Array, targets: Array) -> Array:
    shape = h.shape[1:]
    if _is_map(shape):
        height, width, _ = _pooled(shape)
        h = _average(h, shape[0] // height, shape[1] // width)
    logits = h.reshape(len(h), -1) @ readout["kernel"] + readout["bias"][None, :]
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def _average(h: Array, down: int, across: int) -> Array:
    window = (1, down, across, 1)
    return lax.reduce_window(h, 0.0, lax.add, window, window, "VALID") / (down * across)


def _sim_loss(readout: Tree, h: Array, targets: Array) -> Array:
    if _is_map(h.shape[1:]):
        h = conv(h, readout["kernel"], (1, 1), "SAME")
        h = jnp.sqrt(jnp.var(h, axis=(1, 2)) + 1e-6)
    else:
        h = h.reshape(len(h), -1) @ readout["kernel"]
    return jnp.mean(jnp.square(similarity(h) - similarity(targets)))


def similarity(x: Array) -> Array:
    """Cosines between the centred rows of x (batch, d), (batch, batch)."""
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    unit = centred * lax.rsqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) + 1e-8)
    return unit @ unit.T


_LOSSES = {"pred": _pred_loss, "sim": _sim_loss}
