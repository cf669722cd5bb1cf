"""Small networks and batches that the tests share."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ssa_jax.layers import Pool
from ssa_jax.methods import METHODS, FeedbackOptions, Method, Network
from ssa_jax.methods.base import all_down
from ssa_jax.methods.feedback import through_twins
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import (
    Plain,
    Residual,
    batch_norm,
    conv,
    dense,
)
from ssa_jax.models.efficientnet import B0, efficientnet_b0
from ssa_jax.models.feedforward import Feedforward
from ssa_jax.models.mobilenet import V2, V3_SMALL
from ssa_jax.models.vit import vit_tiny
from ssa_jax.networks import models
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.networks.forward import output_shapes, visited
from ssa_jax.training import tasks
from ssa_jax.types import Batch

IMAGE = (6, 6, 2)
CLASSES = 5


def tiny_conv(rank=None, seed=0):
    """Conv with norm and pooling, a strided conv, a hidden layer, a classifier."""
    rngs = nnx.Rngs(seed)
    return Feedforward(
        [
            Plain(conv(2, 6, 3, rank=rank, rngs=rngs), norm=batch_norm(6, rngs),
                  activation=nnx.relu, pool=Pool(2, 2)),
            Plain(conv(6, 8, 3, rank=rank, rngs=rngs, strides=2), norm=batch_norm(8, rngs),
                  activation=nnx.relu),
            Plain(dense(32, 7, rank=rank, rngs=rngs), activation=nnx.relu, flatten=True),
            Plain(dense(7, CLASSES, rank=None, rngs=rngs), flatten=True),
        ]
    )  # fmt: skip


def tiny_residual(rank=None, seed=0, split=False):
    """A stem, a block with identity skip, a strided block with projection, a classifier."""
    rngs = nnx.Rngs(seed)

    def plain(c_in, c_out, size=3, strides=1, activation=None):
        return Plain(conv(c_in, c_out, size, rank=rank, rngs=rngs, strides=strides),
                     norm=batch_norm(c_out, rngs), activation=activation)  # fmt: skip

    def block(first, last, shortcut=None):
        return Residual([first, last], shortcut=shortcut, cuts=split)

    return Feedforward(
        [
            plain(2, 4, activation=nnx.relu),
            block(plain(4, 4, activation=nnx.relu), plain(4, 4)),
            block(plain(4, 6, strides=2, activation=nnx.relu), plain(6, 6),
                   plain(4, 6, size=1, strides=2)),
            Plain(dense(54, CLASSES, rank=None, rngs=rngs), flatten=True),
        ]
    )  # fmt: skip


def tiny_split_residual(rank=None, seed=0):
    """`tiny_residual` with each convolution of a block a unit of its own."""
    return tiny_residual(rank, seed, split=True)


def tiny_linear(rank=None, seed=0):
    """A network that is linear in training mode: no norm, no activation, no max pooling."""
    rngs = nnx.Rngs(seed)
    return Feedforward(
        [
            Plain(conv(2, 4, 3, rank=rank, rngs=rngs)),
            Plain(conv(4, 5, 3, rank=rank, rngs=rngs, strides=2)),
            Plain(dense(45, 8, rank=rank, rngs=rngs), flatten=True),
            Plain(dense(8, CLASSES, rank=None, rngs=rngs), flatten=True),
        ]
    )


NETWORKS = {
    "conv": tiny_conv,
    "residual": tiny_residual,
    "split_residual": tiny_split_residual,
    "linear": tiny_linear,
}


def tiny_inverted(rank=None, seed=0):
    """Two inverted residual blocks with squeeze-and-excitation, one of them with a skip."""
    options = {"width": 0.5, "stages": ((2, 3, 32, 1, 1), (2, 5, 32, 1, 1))}
    return efficientnet_b0(IMAGE, CLASSES, rank=rank, rngs=nnx.Rngs(seed), **options)


def tiny_vit(rank=None, seed=0):
    """Patches and a class token, two blocks of attention and MLP."""
    options = {"width": 16, "depth": 2, "heads": 2, "patch": 2}
    return vit_tiny(IMAGE, CLASSES, rank=rank, rngs=nnx.Rngs(seed), **options)


# The architectures that are made of other layers too.
EVERY = NETWORKS | {"inverted": tiny_inverted, "vit": tiny_vit}


# Models that would take a test too long at their width and depth: images and options of theirs.
# The stem of a residual network pools larger ones than 32 pixels.
NARROW = {
    **{n: ((33, 33, 3), {"width": 8, "blocks": (1, 1)}) for n in ("resnet18", "resnet50")},
    "mobilenet_v2": ((8, 8, 3), {"width": 0.5, "stages": V2[:2]}),
    "mobilenet_v3_small": ((8, 8, 3), {"width": 0.25, "blocks": V3_SMALL[:3:2] + V3_SMALL[4:5]}),
    "efficientnet_b0": ((8, 8, 3), {"width": 0.5, "stages": B0[:2]}),
    **{n: ((8, 8, 3), {"width": 16, "depth": 2, "heads": 2}) for n in ("vit_tiny", "vit_small")},
}


def small_model(name, classes, rank, shape=(32, 32, 3), **options):
    """A model of the registry and the shape of its images, at a size that a test can afford."""
    shape, options = NARROW.get(name, (shape, options))
    with warnings.catch_warnings(action="ignore", category=LeftDense):
        return MODELS[name](shape, classes, rank=rank, rngs=nnx.Rngs(0), **options), shape


def make_batch(n=8, seed=0, shape=IMAGE, classes=CLASSES):
    key_x, key_y = jax.random.split(jax.random.key(seed))
    images = jax.random.normal(key_x, (n, *shape))
    return Batch(images, jax.random.randint(key_y, (n,), 0, classes))


def output_error(logits, labels):
    """Cross-entropy and its gradient."""
    return tasks.output_error(tasks.CROSS_ENTROPY, logits, labels)


def apart(model, shape=IMAGE):
    """Units, parameters and state of a model on images of a shape."""
    found = models.split(model, jax.ShapeDtypeStruct((1, *shape), "float32"))
    return found.units, found.params, found.mstate


def split(name="conv", rank=None, seed=0):
    with warnings.catch_warnings(action="ignore", category=LeftDense):
        return apart(EVERY[name](rank, seed))


def make_method(name, units, params, mstate, shape=IMAGE, **options) -> Method:
    shapes = output_shapes(units, params, mstate, shape)
    few = make_batch(4, 9, shape)
    network = Network(units, shapes, few.images, targets=few.labels)
    return METHODS[name](network, FeedbackOptions(**options))


def unpadded(table):
    """A table without the spaces that make its columns as wide as their widest entry."""
    return re.sub(r" +", " ", table)


def max_difference(a, b):
    """Largest absolute difference between two trees of one structure, of any number type."""
    return max(
        float(jnp.max(jnp.abs(x.astype(float) - y.astype(float)), initial=0))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def first(cases, n):
    """The cases of a parametrisation, all but the first n of them slow."""
    cases = list(cases)
    rest = [case if isinstance(case, tuple) else (case,) for case in cases[n:]]
    return [*cases[:n], *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]


def walk(units, params, twins, tape, error):
    """The signals of all units that a walk through twins makes of an error."""
    through = through_twins(units, twins)
    above = visited(tape, params)[1:]
    return all_down([functools.partial(through, unit) for unit in above], error)


def as_on_an_accelerator(*args, cpu, default):
    """For `jax.lax.platform_dependent`: the form for every platform but a CPU, run on this one."""
    del cpu
    return default(*args)
