"""Units: the NNX model and its pure functions are the same network."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import IMAGE, NETWORKS, apart, first, make_batch, max_difference, split

from ssa_jax.models import MODELS
from ssa_jax.networks import models
from ssa_jax.networks.cut import CutError
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.networks.forward import forward, output_shapes, predict
from ssa_jax.networks.units import group_units


@pytest.mark.parametrize("rank", [None, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_units_in_order_are_the_model(name, rank):
    model = NETWORKS[name](rank)
    units, params, mstate = apart(model)
    x = make_batch().images
    model.eval()
    assert jnp.allclose(predict(units, params, mstate, x), model(x), atol=1e-5)
    model.train()
    logits, new_state, _ = forward(units, params, mstate, x)
    assert jnp.allclose(logits, model(x), atol=1e-5)
    # The model's own statistics moved by the same pass.
    _, _, moved = apart(model)
    if jax.tree.leaves(moved):
        assert max_difference(moved, new_state) < 1e-5


def test_evaluation_leaves_the_statistics_and_training_moves_them():
    units, params, mstate = split("conv")
    x = make_batch().images
    _, after = units[0].apply(params[0], mstate[0], x, train=False)
    assert max_difference(after, mstate[0]) == 0
    _, after = units[0].apply(params[0], mstate[0], x, train=True)
    assert max_difference(after, mstate[0]) > 1e-3


@pytest.mark.parametrize("name", first(NETWORKS, 1))
def test_walk_keeps_the_value_and_swaps_the_derivative(name):
    units, params, mstate = split(name, 0.5)
    _, twins, _ = split(name, 0.5, seed=7)
    _, _, tape = forward(units, params, mstate, make_batch().images)
    for i, unit in enumerate(units):
        x, cotangent = tape.inputs[i], jnp.cos(tape.outputs[i])
        value, own = jax.vjp(lambda x, u=unit, i=i: u.walk(params[i], params[i], mstate[i], x), x)
        assert jnp.allclose(value, tape.outputs[i], atol=1e-6)
        true = tape.pullbacks[i](cotangent)[1]
        assert jnp.allclose(own(cotangent)[0], true, atol=1e-5)
        value, other = jax.vjp(lambda x, u=unit, i=i: u.walk(params[i], twins[i], mstate[i], x), x)
        assert jnp.allclose(value, tape.outputs[i], atol=1e-6)
        assert not jnp.allclose(other(cotangent)[0], true, atol=1e-3)


def test_merged_model_is_an_ordinary_module():
    model = NETWORKS["conv"](0.5)
    x = make_batch().images
    units, params, mstate, merge = models.split(model, x)
    params = jax.tree.map(lambda p: p + 0.1, params)
    merged = merge(params, mstate)
    assert type(merged) is type(model)
    assert jnp.allclose(merged(x), predict(units, params, mstate, x), atol=1e-5)


def test_sliced_factors_run_through_the_same_unit():
    units, params, mstate = split("conv", 0.5)
    name = "units/0/map/kernel"
    f = params[0][name]
    f = f._replace(s=f.s.at[2:].set(0))
    cut = jax.tree.map(lambda x: x[..., :2], f)
    x = make_batch().images
    whole, small = (
        units[0].apply({**params[0], name: k}, mstate[0], x, train=False)[0] for k in (f, cut)
    )
    assert jnp.allclose(whole, small, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_joined_units_are_the_same_network(size):
    units, params, mstate = split("residual", 0.5)
    joined, p, m = group_units(units, params, mstate, size)
    x = make_batch().images
    assert [len(jax.tree.leaves(q)) for q in (p, m)] == [
        len(jax.tree.leaves(q)) for q in (params, mstate)
    ]
    assert len(joined) == {1: 4, 2: 3, 3: 2, 9: 2}[size]
    logits, state, tape = forward(units, params, mstate, x)
    logits_joined, state_joined, tape_joined = forward(joined, p, m, x)
    assert jnp.array_equal(logits, logits_joined)
    assert max_difference(state, state_joined) == 0
    # From the input up, every so many units; the classifier stays alone.
    expected = [tape.outputs[i] for i in {1: (0, 1, 2), 2: (1, 2), 3: (2,), 9: (2,)}[size]]
    assert max_difference(list(tape_joined.outputs[:-1]), expected) == 0


def test_a_joined_unit_has_its_members_walk():
    units, params, mstate = split("conv", 0.5)
    _, twins, _ = split("conv", 0.5, seed=7)
    joined, p, m = group_units(units, params, mstate, 3)
    _, t, _ = group_units(units, twins, mstate, 3)
    x = make_batch().images
    value, pullback = jax.vjp(lambda x: joined[0].walk(p[0], t[0], m[0], x), x)
    z, _ = joined[0].apply(p[0], m[0], x, train=True)
    assert jnp.allclose(value, z, atol=1e-6)

    def in_turn(x):
        for i in range(3):
            x = units[i].walk(params[i], twins[i], mstate[i], x)
        return x

    cotangent = jnp.cos(value)
    assert jnp.allclose(pullback(cotangent)[0], jax.vjp(in_turn, x)[1](cotangent)[0], atol=1e-6)


def test_units_cannot_be_joined_by_none():
    with pytest.raises(ValueError, match="unit_size must be at least 1"):
        group_units(*split("conv"), 0)


def test_a_model_without_a_cut_is_refused():
    with pytest.raises(CutError, match="the model has no cut"):
        apart(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), (2,))


def split_of(name, shape, rank):
    """Units of a model, and the shapes of its trees: no weights are drawn."""
    units = []

    def trees():
        with warnings.catch_warnings(action="ignore", category=LeftDense):
            model = MODELS[name](shape, 10, rank=rank, rngs=nnx.Rngs(0))
        split = apart(model, shape)
        units.extend(split[0])
        return split[1:]

    params, mstate = jax.eval_shape(trees)
    return tuple(units), params, mstate


def maps(*stages):
    """Shapes of square maps: side, how many of them, channels."""
    return [(side, side, width) for side, count, width in stages for _ in range(count)]


def imagenet(side, width, blocks, expansion):
    """Shapes of the stem and of the blocks of a residual network whose first maps have a side."""
    stages = [
        [(side // 2**i, side // 2**i, width * 2**i * expansion)] * n for i, n in enumerate(blocks)
    ]
    return [(side, side, width), *itertools.chain(*stages)]


@pytest.mark.parametrize(
    ("name", "size", "side"), [("resnet18", 33, 9), ("resnet18", 64, 16), ("resnet50", 224, 56)]
)
def test_the_stem_quarters_what_is_larger_than_32_pixels(name, size, side):
    units, params, mstate = split_of(name, (size, size, 3), None)
    stem, *_, last, logits = output_shapes(units, params, mstate, (size, size, 3))
    assert stem == (side, side, 64)
    assert last[0] == -(-side // 8)
    assert logits == (10,)
    assert params[0]["units/0/map/kernel"].shape == (7, 7, 3, 64)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("name", ["vgg11", "vgg13"])
def test_vgg_takes_the_sizes_of_imagenet(name, size):
    units, params, mstate = split_of(name, (size, size, 3), 0.25)
    assert output_shapes(units, params, mstate, (size, size, 3))[-2] == (size // 32,) * 2 + (512,)


@pytest.mark.parametrize("rank", [None, 0.25])
@pytest.mark.parametrize(
    "name",
    # Of their families one is enough.
    [
        pytest.param(m, marks=pytest.mark.slow) if m in ("efficientnet_b0", "vit_small") else m
        for m in MODELS
    ],
)
def test_models_have_their_shapes_and_a_dense_classifier(name, rank):
    shape = (32, 32, 3)
    units, params, mstate = split_of(name, shape, rank)
    shapes = output_shapes(units, params, mstate, shape)
    assert shapes[-1] == (10,)
    resnet = [(32, 32, 16)] * 6 + [(16, 16, 32)] * 5 + [(8, 8, 64)] * 5
    expected = {
        "mlp": [(512,), (512,)],
        "smallconv": [(16, 16, 32), (8, 8, 64), (4, 4, 128), (512,)],
        "vgg11": [(16, 16, 64), (8, 8, 128), (8, 8, 256), (4, 4, 256), (4, 4, 512),
                  (2, 2, 512), (2, 2, 512), (1, 1, 512)],
        "vgg13": [(32, 32, 64), (16, 16, 64), (16, 16, 128), (8, 8, 128), (8, 8, 256),
                  (4, 4, 256), (4, 4, 512), (2, 2, 512), (2, 2, 512), (1, 1, 512)],
        "resnet32": resnet,
        "resnet32_conv": [resnet[0], *[shape for h, w, c in resnet[1:]
                                       for shape in ((h, w, 2 * c), (h, w, c))]],
        "resnet32_identity": resnet,
        "plain32": resnet,
        "resnet18": imagenet(32, 64, (2, 2, 2, 2), 1),
        "resnet50": imagenet(32, 64, (3, 4, 6, 3), 4),
        "mobilenet_v2": maps((32, 1, 32), (32, 1, 16), (32, 2, 24), (16, 3, 32), (8, 4, 64),
                             (8, 3, 96), (4, 3, 160), (4, 1, 320), (4, 1, 1280)),
        "mobilenet_v3_small": [*maps((32, 2, 16), (16, 2, 24), (8, 3, 40), (8, 2, 48), (4, 3, 96),
                                     (4, 1, 576)), (1024,)],
        "efficientnet_b0": maps((32, 1, 32), (32, 1, 16), (32, 2, 24), (16, 2, 40), (8, 3, 80),
                                (8, 3, 112), (4, 4, 192), (4, 1, 320), (4, 1, 1280)),
        "vit_tiny": [(65, 192)] * 13,
        "vit_small": [(65, 384)] * 13,
    }  # fmt: skip
    assert shapes[:-1] == expected[name]
    (kernel,) = (x for path, x in params[-1].items() if path.endswith("kernel"))
    assert kernel.shape[-1] == 10


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"mlp"}))
def test_too_small_images_and_other_inputs_are_refused(name):
    with pytest.raises(ValueError, match=r"\(3, 32, 1\) are too small"):
        MODELS[name]((3, 32, 1), 10, rank=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"need images .* shape \(64,\)"):
        MODELS[name]((64,), 10, rank=None, rngs=nnx.Rngs(0))


def test_image_shape_of_the_helpers_fits():
    units, params, mstate = split("conv")
    assert output_shapes(units, params, mstate, IMAGE)[0] == (3, 3, 6)
