"""Vision transformers: patches as tokens, pre-norm blocks of attention and MLP, one a unit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ssa_jax.models.blocks import CLASSIFIER, FIRST, Residual, at_rank, check_images
from ssa_jax.models.feedforward import Feedforward

Array = jax.Array

# Of the largest images that a size of patches is for; 16 beyond.
_PATCHES = {32: 4, 96: 8}
# Of the layer norms, as in the published weights.
_EPSILON = 1e-6


class Tokens(nnx.Module):
    """A map's positions as a sequence, with learned positions and a class token in front.

    Args:
      positions: number of the map's positions.
      width: channels.
      token: puts a learned token in front of them.
      rngs: the key ``params`` draws both from a normal of deviation 0.02.

    Attributes:
      positions: `nnx.Param` (tokens, width).
      token: `nnx.Param` (width,) or None.
    """

    def __init__(self, positions: int, width: int, *, token: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(0.02)
        self.positions = nnx.Param(init(rngs.params(), (positions + token, width)))
        self.token = nnx.Param(init(rngs.params(), (width,))) if token else None

    def __call__(self, x: Array) -> Array:
        """Maps (batch, H, W, width) to (batch, tokens, width)."""
        y = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.token is not None:
            first = jnp.broadcast_to(
                self.token.get_value()[None, None, :], (x.shape[0], 1, y.shape[2])
            )
            y = jnp.concatenate([first.astype(y.dtype), y], axis=1)
        return y + self.positions.get_value()[None]


def first_token(x: Array) -> Array:
    """The class token: (batch, tokens, width) to (batch, width)."""
    return x[:, 0]


def mean_token(x: Array) -> Array:
    """The mean of all tokens: (batch, tokens, width) to (batch, width)."""
    return jnp.mean(x, axis=1)


def exact_gelu(x: Array) -> Array:
    """The function x Φ(x), by the error function and not by its approximation."""
    return nnx.gelu(x, approximate=False)


def vit_tiny(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch: int | None = None,
    token: bool = True,
    drop_path: float = 0.0,
) -> Feedforward:
    """ViT-Tiny (Dosovitskiy et al. 2021; Touvron et al. 2021, table 1), one block a unit.

    Patches, each mapped to `width` numbers, a class token and learned positions; `depth`
    blocks x + attention(norm(x)), then x + mlp(norm(x)) with a hidden layer of four times
    the width and GELU; a layer norm and a linear classifier of the class token.

    Args:
      input_shape: (height, width, channels), sides that patches divide.
      classes: number of logits.
      rank: initial rank of attention's and the MLP's maps as a fraction of full rank, or None
        for dense layers. The patches' map and the classifier stay dense.
      rngs: the key ``params`` draws all weights, ``dropout`` what is dropped.
      width: channels of a token, which `heads` divides.
      depth: blocks.
      heads: of attention.
      patch: side of a patch; by default 4 for images of at most 32 pixels, 8 of at most 96, and
        16 beyond.
      token: whether there is a class token; else the mean of all tokens is classified.
      drop_path: the chance that an example goes around a branch in training, that of the last
        block; it rises evenly with depth (Huang et al. 2016).

    Raises:
      ValueError: inputs that are no images, too small ones, or of sides that are no multiples of
        the patch.
    """
    patch = patch or _patch(input_shape)
    if any(side % patch for side in input_shape[:2]):
        raise ValueError(f"patches of {patch} pixels do not divide images of shape {input_shape}")
    count = math.prod(side // patch for side in input_shape[:2])
    cut_up = nnx.Conv(
        input_shape[2], width, (patch, patch), strides=patch, padding="VALID", rngs=rngs
    )
    units: list[Any] = [nnx.Sequential(cut_up, Tokens(count, width, token=token, rngs=rngs))]
    rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
    units += [_block(width, heads, rate, rngs) for rate in rates]
    units.append(
        nnx.Sequential(
            nnx.LayerNorm(width, epsilon=_EPSILON, rngs=rngs),
            first_token if token else mean_token,
            nnx.Linear(width, classes, rngs=rngs),
        )
    )
    left = {"units/0/layers/0": FIRST, f"units/{depth + 1}/layers/2": CLASSIFIER}
    return at_rank(Feedforward(units), rank, left)


def vit_small(
    input_shape: tuple[int, int, int],
    classes: int,
    *,
    rank: float | None,
    rngs: nnx.Rngs,
    width: int = 384,
    heads: int = 6,
    **options: Any,
) -> Feedforward:
    """ViT-Small, `vit_tiny` at twice the width and twice the heads; `options` are the others."""
    return vit_tiny(input_shape, classes, rank=rank, rngs=rngs, width=width, heads=heads, **options)


def _patch(input_shape: tuple[int, int, int]) -> int:
    check_images(input_shape, halvings=2)
    return next((p for most, p in _PATCHES.items() if max(input_shape[:2]) <= most), 16)


def _block(width: int, heads: int, drop: float, rngs: nnx.Rngs) -> nnx.Sequential:
    def branch(*layers: Any) -> Residual:
        norm = nnx.LayerNorm(width, epsilon=_EPSILON, rngs=rngs)
        path = [nnx.Dropout(drop, broadcast_dims=(1, 2), rngs=rngs)] if drop else []
        return Residual([norm, *layers, *path], activation=None)

    attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
    hidden = nnx.Linear(width, 4 * width, rngs=rngs)
    return nnx.Sequential(
        branch(attention), branch(hidden, exact_gelu, nnx.Linear(4 * width, width, rngs=rngs))
    )
