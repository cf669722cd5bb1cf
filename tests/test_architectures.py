"""The architectures that people train: published sizes, what stays dense, and runs of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import IMAGE, make_batch, small_model

import ssa_jax
from ssa_jax.factors import named_leaves
from ssa_jax.models import MODELS
from ssa_jax.models.inverted import divisible
from ssa_jax.networks.factorize import LeftDense, factorize
from ssa_jax.training import costs

# Torchvision's and timm's, of images of 224 pixels and 1000 classes, with the billions of
# multiply-accumulates that they are said to take, as they round them.
PUBLISHED = {
    "mobilenet_v2": (3_504_872, 0.30),
    "mobilenet_v3_small": (2_542_856, 0.06),
    "efficientnet_b0": (5_288_548, 0.39),
    "vit_tiny": (5_717_416, 1.3),
    "vit_small": (22_050_664, 4.6),
}


def inverted(c_in, inner, out, size, side, strides, squeeze=0):
    """Multiply-accumulates of one block, and the side of its output."""
    after = math.ceil(side / strides)
    expand = c_in * inner * side**2 if inner != c_in else 0
    filtered = size**2 * inner * after**2
    return expand + filtered + 2 * inner * squeeze + inner * out * after**2, after


def stages_macs(stages, ratio):
    """Of (expansion, kernel, channels, blocks, stride) with a stem of 32 and an end of 1280."""
    side, c_in, total = 112, 32, 27 * 32 * 112**2
    for expansion, size, out, count, strides in stages:
        for i in range(count):
            squeeze = int(ratio * c_in)
            here = strides if i == 0 else 1
            macs, side = inverted(c_in, expansion * c_in, out, size, side, here, squeeze)
            total, c_in = total + macs, out
    return total + 320 * 1280 * side**2 + 1280 * 1000


def mobilenet_v2_macs():
    return stages_macs(
        [(1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 3, 32, 3, 2), (6, 3, 64, 4, 2), (6, 3, 96, 3, 1),
         (6, 3, 160, 3, 2), (6, 3, 320, 1, 1)], ratio=0)  # fmt: skip


def efficientnet_b0_macs():
    return stages_macs(
        [(1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1),
         (6, 5, 192, 4, 2), (6, 3, 320, 1, 1)], ratio=0.25)  # fmt: skip


def mobilenet_v3_small_macs():
    rows = [  # input, inner, output, kernel, stride, within squeeze-and-excitation
        (16, 16, 16, 3, 2, 8), (16, 72, 24, 3, 2, 0), (24, 88, 24, 3, 1, 0), (24, 96, 40, 5, 2, 24),
        (40, 240, 40, 5, 1, 64), (40, 240, 40, 5, 1, 64), (40, 120, 48, 5, 1, 32),
        (48, 144, 48, 5, 1, 40), (48, 288, 96, 5, 2, 72), (96, 576, 96, 5, 1, 144),
        (96, 576, 96, 5, 1, 144),
    ]  # fmt: skip
    side, total = 112, 27 * 16 * 112**2
    for c_in, inner, out, size, strides, squeeze in rows:
        macs, side = inverted(c_in, inner, out, size, side, strides, squeeze)
        total += macs
    return total + 96 * 576 * 7**2 + 576 * 1024 + 1024 * 1000


def vit_macs(d):
    tokens = 14 * 14 + 1
    maps, products = 12 * d**2 * tokens, 2 * d * tokens**2
    return 16 * 16 * 3 * d * 14**2 + 12 * (maps + products) + 1000 * d


FORMULAS = {
    "mobilenet_v2": mobilenet_v2_macs,
    "mobilenet_v3_small": mobilenet_v3_small_macs,
    "efficientnet_b0": efficientnet_b0_macs,
    "vit_tiny": lambda: vit_macs(192),
    "vit_small": lambda: vit_macs(384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_architectures_have_the_published_size_and_work(name):
    params, billions = PUBLISHED[name]
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    made = []

    def logits(x):
        model = MODELS[name](image.shape[1:], 1000, rank=None, rngs=nnx.Rngs(0))
        made.append(costs.parameters(nnx.state(model, nnx.Param)))
        return model(x)

    macs = costs.macs(logits, image)
    assert made == [params]
    assert macs == FORMULAS[name]()
    assert round(macs / 1e9, 2 if billions < 1 else 1) == billions


def test_widths_are_multiples_of_eight_and_lose_a_tenth_at_most():
    # Of 0.35 times MobileNetV2's stem and first stages, as torchvision rounds them.
    assert [divisible(0.35 * c) for c in (32, 16, 24, 64, 96)] == [16, 8, 8, 24, 32]
    assert all(divisible(c) >= 0.9 * c for c in range(1, 500))


def on_factors(name, rank=0.5):
    """Paths of a model's layers on factors, and what is told of the others."""
    shape = (32, 32, 3)
    with pytest.warns(LeftDense) as told:
        model = nnx.eval_shape(lambda: MODELS[name](shape, 10, rank=rank, rngs=nnx.Rngs(0)))
    paths = named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {path.removesuffix("/kernel") for path in paths}, str(told[0].message)


def test_pointwise_convolutions_are_on_factors_and_the_rest_is_told():
    paths, told = on_factors("mobilenet_v3_small")
    pointwise = {f"units/{i}/body/0/map" for i in range(2, 12)} | {"units/1/body/2/map"}
    assert pointwise <= paths
    assert "units/13/map" in paths
    assert not any("gate" in path for path in paths)
    assert "11 of units/*/body/*/map (depthwise: its factors would hold more" in told
    assert "18 of units/*/body/*/gate/layers/* (squeeze-and-excitation: a bottleneck" in told
    assert "units/0/map (the first layer" in told
    assert "units/14/map (the classifier" in told


def test_maps_of_attention_and_of_the_mlp_are_on_factors():
    paths, told = on_factors("vit_tiny")
    attention = {f"layers/0/body/1/{n}" for n in ("query", "key", "value", "out")}
    block = attention | {"layers/1/body/1", "layers/1/body/3"}
    assert paths == {f"units/{i}/{path}" for i in range(1, 13) for path in block}
    assert told.count("(") == 2


def test_what_is_excluded_for_a_reason_is_told_with_it():
    model = nnx.Sequential(*(nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(4)))
    with pytest.warns(LeftDense, match=r"left dense: 2 of layers/\* \(for a test\)$"):
        made = factorize(model, exclude={"layers/[12]": "for a test"})
    kinds = [type(layer) is nnx.Linear for layer in made.layers]
    assert kinds == [False, True, True, False]


@pytest.mark.parametrize("name", ["efficientnet_b0", "vit_tiny"])
def test_a_dropped_path_leaves_what_goes_around_it(name):
    """Of examples that are dropped everywhere the blocks are the identity."""
    shape = (8, 8, 3)
    options = (
        {"width": 0.5, "stages": ((1, 3, 32, 3, 1),)}
        if name == "efficientnet_b0"
        else {"width": 16, "depth": 2, "heads": 2}
    )
    model = MODELS[name](shape, 3, rank=None, rngs=nnx.Rngs(0), drop_path=0.9999, **options)
    last = model.units[-3 if name == "efficientnet_b0" else -2]
    for _, layer in nnx.iter_modules(last):
        if isinstance(layer, nnx.Dropout):
            layer.rate = 1 - 1e-7
    x = jax.random.normal(jax.random.key(0), (4, 2, 2, 16))
    x = x if name == "efficientnet_b0" else x.reshape(4, 4, 16)
    assert jnp.array_equal(last(x), x)
    last.eval()
    assert not jnp.allclose(last(x), x, atol=1e-2)


def test_without_a_class_token_the_mean_of_all_is_classified():
    images = make_batch(2).images
    make = MODELS["vit_tiny"]
    options = {"width": 16, "depth": 1, "heads": 2, "patch": 2, "token": False}
    model = make(IMAGE, 3, rank=None, rngs=nnx.Rngs(0), **options)
    first, block, last = model.units
    tokens = block(first(images))
    assert tokens.shape == (2, 9, 16)
    norm, _, classifier = last.layers
    assert jnp.allclose(model(images), classifier(norm(tokens).mean(1)), atol=1e-5)
    with pytest.raises(ValueError, match=r"patches of 4 pixels do not divide .* \(6, 6, 2\)"):
        make(IMAGE, 3, rank=None, rngs=nnx.Rngs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "vit_tiny"]
)
@pytest.mark.filterwarnings("ignore:left dense")
def test_a_run_with_falling_ranks_learns(name):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 256)
    model, shape = small_model(name, 3, None)
    images = rng.normal(size=(256, *shape)).astype(np.float32) + labels[:, None, None, None]
    run = ssa_jax.fit(
        model, (images, labels), epochs=4, batch_size=32, rank_schedule="hybrid", rank_init=1.0
    )
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    first, last = (sum(run.history[i]["ranks"].values()) for i in (0, -1))
    assert last < first
