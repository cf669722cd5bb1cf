"""Local losses behind auxiliary networks that are drawn from the layers above."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ssa_jax.layers.lowering import conv
from ssa_jax.methods.base import FeedbackOptions, Method, Network
from ssa_jax.methods.local import by_readouts

Array = jax.Array
Tree = Any
Shape = tuple[int, ...]


def auglocal(network: Network, options: FeedbackOptions) -> Method:
    """δ_i = ∂ℓ_i/∂h_i, ℓ_i the cross-entropy of an auxiliary network on h_i; the last unit gets e.

    The auxiliary network of unit i is made of layers like d_i of the units above it, drawn evenly
    (the last of them always), and a linear classifier of their output's mean over positions. A
    layer takes the shape of its unit's output: a 3x3 convolution with the stride that leads there,
    or a linear map, then a batch norm by the statistics of the batch and a ReLU. d_i falls linearly
    from `options.aux_depth` at the first unit to none at the last hidden one. All of them learn
    by Adam at `options.readout_rate`, on ℓ_i alone, and are no part of the trained network
    (AugLocal: Ma, Wu, Si and Tan, ICLR 2024, sections 4.1 and 4.2).

    Raises:
      ValueError: `options.aux_depth` below zero.
    """
    if options.aux_depth < 0:
        raise ValueError(f"aux_depth must be at least 0, got {options.aux_depth}")
    classes = math.prod(network.shapes[-1])
    hidden = network.shapes[:-1]

    def init(key: Array, i: int) -> Tree:
        above = drawn(i, len(hidden), options.aux_depth)
        keys = jax.random.split(key, len(above) + 1)
        layers, shape = [], hidden[i]
        for k, j in zip(keys, above, strict=False):
            layers.append(_init_layer(k, shape, hidden[j]))
            shape = hidden[j]
        kernel = jax.random.normal(keys[-1], (shape[-1], classes)) / jnp.sqrt(shape[-1])
        return {"layers": layers, "kernel": kernel, "bias": jnp.zeros(classes)}

    def loss(readout: Tree, i: int, h: Array, targets: Array) -> Array:
        above = drawn(i, len(hidden), options.aux_depth)
        for layer, j in zip(readout["layers"], above, strict=True):
            h = _layer(layer, h, hidden[j])
        logits = _pooled(h) @ readout["kernel"] + readout["bias"][None]
        return jnp.mean(optax.softmax_cross_entropy(logits, targets.reshape(logits.shape)))

    return by_readouts(network, options, init, loss)


def drawn(i: int, hidden: int, depth: int) -> tuple[int, ...]:
    """Which of the hidden units above unit i its auxiliary network takes after.

    round(depth · (hidden - 1 - i) / (hidden - 1)) of them, at even distances, up to the last.
    """
    above = hidden - 1 - i
    count = min(above, round(depth * above / max(1, hidden - 1)))
    return tuple(i + -(-above * n // count) for n in range(1, count + 1))


def _is_map(shape: Shape) -> bool:
    return len(shape) == 3


def _init_layer(key: Array, below: Shape, above: Shape) -> Tree:
    window = (3, 3) if _is_map(below) and _is_map(above) else ()
    inputs = below[-1]
    scale = math.sqrt(2 / (math.prod(window) * inputs))
    kernel = scale * jax.random.normal(key, (*window, inputs, above[-1]))
    return {"kernel": kernel, "scale": jnp.ones(above[-1]), "bias": jnp.zeros(above[-1])}


def _layer(layer: Tree, h: Array, above: Shape) -> Array:
    if layer["kernel"].ndim == 4:
        strides = (-(-h.shape[1] // above[0]), -(-h.shape[2] // above[1]))
        h = conv(h, layer["kernel"], strides, "SAME")
    else:
        h = (h if h.ndim == 3 and len(above) == 2 else _pooled(h)) @ layer["kernel"]
    axes = tuple(range(h.ndim - 1))
    scale, bias = (layer[n].reshape((1,) * len(axes) + (-1,)) for n in ("scale", "bias"))
    centred = h - jnp.mean(h, axes, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + 1e-5)
    return jax.nn.relu(normed * scale + bias)


def _pooled(h: Array) -> Array:
    """The mean over all positions, (batch, channels)."""
    return jnp.mean(h, tuple(range(1, h.ndim - 1))) if h.ndim > 2 else h
