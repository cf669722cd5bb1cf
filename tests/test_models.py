"""The models' architectures, split blocks, and the mean slopes of activations."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import IMAGE, NETWORKS, first, make_batch, make_method, max_difference, split

from ssa_jax.layers import Pool, max_pool
from ssa_jax.methods import feedback
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import (
    BlockEntry,
    BlockExit,
    MeanSlope,
    Plain,
    Residual,
    add_mean_slopes,
    batch_norm,
    conv,
    dense,
)
from ssa_jax.models.feedforward import Feedforward
from ssa_jax.networks.forward import forward, output_shapes, predict
from ssa_jax.networks.units import split_units
from ssa_jax.training import costs, losses
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.train import init_state, make_refresh, make_step


def full(shapes):
    """Every path in full."""
    return feedback.plan(shapes, "full", 0)


SMALL = (8, 8, 3)


def small(name, rank=0.5, seed=0):
    """A residual model with one block a stage, its statistics moved by one pass."""
    model = MODELS[name](SMALL, 5, rank=rank, rngs=nnx.Rngs(seed), blocks=1)
    model(make_batch(shape=SMALL).images)
    return model


def with_slopes(model):
    add_mean_slopes(model)
    return model


# Parameter counts.


def conv_and_norm(c_in, c_out, size=3):
    return size * size * c_in * c_out + 2 * c_out


def affine(d_in, d_out):
    return d_in * d_out + d_out


def stack(*widths):
    return sum(conv_and_norm(a, b) for a, b in itertools.pairwise(widths))


PLAIN32 = stack(3, 16, *[16] * 10, *[32] * 10, *[64] * 10) + affine(64, 10)
RESNET32 = PLAIN32 + conv_and_norm(16, 32, 1) + conv_and_norm(32, 64, 1)
COUNTS = {
    "mlp": affine(3072, 512) + affine(512, 512) + affine(512, 10),
    "smallconv": stack(3, 32, 64, 128) + affine(4 * 4 * 128, 512) + affine(512, 10),
    "vgg13": stack(3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512) + affine(512, 10),
    "resnet32": RESNET32,
    "resnet32_conv": RESNET32,
    "resnet32_identity": RESNET32,
    "plain32": PLAIN32,
}
# Torchvision's, of images of 224 pixels and 1000 classes.
PUBLISHED = {"resnet18": 11_689_512, "resnet50": 25_557_032}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_of_imagenet_have_the_published_size(name):
    model = nnx.eval_shape(lambda: MODELS[name]((224, 224, 3), 1000, rank=None, rngs=nnx.Rngs(0)))
    assert costs.parameters(nnx.state(model, nnx.Param)) == PUBLISHED[name]


@pytest.mark.parametrize("name", COUNTS)
def test_dense_models_have_the_parameters_of_their_architecture(name):
    model = nnx.eval_shape(lambda: MODELS[name]((32, 32, 3), 10, rank=None, rngs=nnx.Rngs(0)))
    assert costs.parameters(nnx.state(model, nnx.Param)) == COUNTS[name]


def test_the_plain_network_has_the_published_size():
    # He et al. 2016, table 6: 0.46M for ResNet-32, whose shortcuts there have no parameters.
    assert COUNTS["plain32"] == 464_154


# Residual networks whole, split, and without skips.


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 0.5])
def test_whole_and_split_blocks_are_one_function_of_one_seed(rank):
    whole, halves = small("resnet32", rank), small("resnet32_conv", rank)
    x = make_batch(seed=1, shape=SMALL).images
    for mode in ("eval", "train"):
        a, b = (getattr(model, mode)() or model(x) for model in (whole, halves))
        assert jnp.allclose(a, b, atol=1e-6)
    _, params, _ = split_units(whole)
    _, params_split, _ = split_units(halves)
    for i in (1, 2, 3):
        first, last = (params[i]["body"][j] for j in (0, 1))
        assert max_difference(first, params_split[2 * i - 1]["first"]) == 0
        assert max_difference(last, params_split[2 * i]["last"]) == 0
        shortcuts = params[i].get("shortcut"), params_split[2 * i - 1].get("shortcut")
        assert shortcuts == (None, None) if i == 1 else max_difference(*shortcuts) == 0


@pytest.mark.slow
def test_composed_paths_agree_where_a_block_ends():
    (units, params, mstate), (units_s, params_s, mstate_s) = (
        split_units(small(name)) for name in ("resnet32", "resnet32_conv")
    )
    shapes, shapes_s = (
        output_shapes(u, p, m, SMALL) for u, p, m in ((units, params, mstate),
                                                      (units_s, params_s, mstate_s))
    )  # fmt: skip
    paths = feedback.composed_paths(units, params, mstate, shapes, full(shapes))
    paths_s = feedback.composed_paths(units_s, params_s, mstate_s, shapes_s, full(shapes_s))
    for path, path_s in zip(paths, paths_s[::2], strict=True):
        assert float(jnp.max(jnp.abs(path))) > 1e-3
        assert jnp.allclose(path, path_s, atol=1e-5)
    # What skips the second convolution gets the path of the block's end unchanged.
    for entry, end in zip(paths_s[1::2], paths_s[2::2], strict=True):
        assert jnp.array_equal(entry[..., -end.shape[-1] :], end)


@pytest.mark.slow
def test_the_plain_network_differs_by_the_skips_alone():
    residual, plain = small("resnet32"), small("plain32")
    residual.eval()
    # The same statistics too: those of the second pass would follow the skips.
    for a, b in zip(residual.units[1:-1], plain.units[1:-1], strict=True):
        b.body = nnx.clone(a.body)
    plain.eval()
    x = residual.units[0](make_batch(shape=SMALL).images)
    assert max_difference(*(nnx.state(m.units[0].map) for m in (residual, plain))) == 0
    for a, b in zip(residual.units[1:-1], plain.units[1:-1], strict=True):
        y = a.body[1](a.body[0](x))
        skip = a.shortcut(x) if a.shortcut else x
        assert b.shortcut is None
        assert jnp.allclose(b(x), nnx.relu(y), atol=1e-6)
        assert jnp.allclose(a(x), nnx.relu(y + skip), atol=1e-6)
        linear_skip = a.shortcut.linear(x) if a.shortcut else x
        assert jnp.allclose(a.linear(x) - b.linear(x), linear_skip, atol=1e-4)
        x = a(x)


@pytest.mark.parametrize("gates", first([True, False], 1))
def test_open_blocks_are_residual_ones_before_their_activation(gates):
    residual, open_ = small("resnet32"), small("resnet32_identity")
    for a, b in zip(residual.units[1:-1], open_.units[1:-1], strict=True):
        assert max_difference(*(nnx.state(m, nnx.Param) for m in (a, b))) == 0
        # The same statistics too.
        b.body, b.shortcut = nnx.clone(a.body), nnx.clone(a.shortcut)
    if gates:
        add_mean_slopes(open_)
    residual.eval()
    open_.eval()
    x = residual.units[0](make_batch(shape=SMALL).images)
    for a, b in zip(residual.units[1:-1], open_.units[1:-1], strict=True):
        assert jnp.array_equal(a(x), nnx.relu(b(x)))
        if b.shortcut is None:
            # The skip is whole in the output and in the linear path alike.
            body, path = x, x
            for part in b.body:
                body, path = part(body), part.linear(path)
            assert jnp.allclose(b(x) - body, x, atol=1e-5)
            assert jnp.allclose(b.linear(x) - path, x, atol=1e-5)
        x = a(x)


def test_the_plain_network_starts_from_the_weights_of_the_residual_one():
    _, residual, _ = split_units(small("resnet32"))
    _, plain, _ = split_units(small("plain32"))
    for a, b in zip(residual, plain, strict=True):
        assert max_difference({k: v for k, v in a.items() if k != "shortcut"}, b) == 0


def test_a_shortcut_without_skip_is_refused():
    part = Plain(dense(2, 2, rank=None, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="takes no shortcut"):
        Residual([part], shortcut=part, skip=False)


def test_only_the_stem_starts_at_full_rank():
    _, params, _ = split_units(small("resnet32", 0.5))
    assert params[0]["map"]["kernel"].rank == 3 * 3
    assert params[1]["body"][0]["map"]["kernel"].rank == 3 * 16 // 2
    assert params[2]["shortcut"]["map"]["kernel"].rank == 16 // 2


@pytest.mark.slow
def test_averaging_classifier_is_its_linear_path():
    model = small("resnet32")
    last = model.units[-1]
    h = jax.random.normal(jax.random.key(0), (4, 2, 2, 64))
    assert jnp.array_equal(last(h), last.linear(h))
    assert jnp.allclose(last(h), last.map(h.mean((1, 2))), atol=1e-6)
    units, params, mstate = split_units(model)
    shapes = output_shapes(units, params, mstate, SMALL)
    path = feedback.composed_paths(units, params, mstate, shapes, full(shapes))[-1]
    expected = params[-1]["map"]["kernel"].T.reshape(5, 1, 1, 64) / 4
    assert jnp.allclose(path, jnp.broadcast_to(expected, path.shape), atol=1e-7)


# Mean slopes.


def is_slope(path):
    return "'slope'" in jax.tree_util.keystr(path)


def slopes(tree, others=False):
    """The slopes of a state tree, or all its other leaves."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return [x for path, x in found if is_slope(path) != others]


def plain(rngs, c_in=2, activation=None, **options):
    layer = conv(c_in, 4, 3, rank=0.7, rngs=rngs)
    return Plain(layer, norm=batch_norm(4, rngs), activation=activation, **options)


WATCHED = {
    "dense": lambda r, a: Plain(dense(72, 4, rank=0.5, rngs=r), activation=a, flatten=True),
    "conv": lambda r, a: plain(r, activation=a),
    "pooled": lambda r, a: plain(r, activation=a, pool=Pool(2, 2)),
    "residual": lambda r, a: Residual([plain(r, activation=nnx.relu), plain(r, 4)],
                                      shortcut=plain(r), activation=a),
    "bare": lambda r, a: Residual([plain(r, activation=nnx.relu), plain(r, 4)],
                                  skip=False, activation=a),
    "exit": lambda r, a: BlockExit(Plain(conv(1, 1, 3, rank=None, rngs=r)), activation=a),
}  # fmt: skip


def identity(z):
    return z


@pytest.mark.parametrize("kind", WATCHED)
def test_mean_slope_follows_the_fraction_of_positive_preactivations(kind):
    relu, bare = (with_slopes(WATCHED[kind](nnx.Rngs(0), a)) for a in (nnx.relu, identity))
    expected = 1.0
    for seed in (0, 1):
        x = make_batch(seed=seed).images
        z = bare(x)
        relu(x)
        fraction = jnp.mean(z > 0, axis=tuple(range(z.ndim - 1)))
        expected = 0.9 * expected + 0.1 * fraction
        assert bool(jnp.any(fraction < 1))
        assert jnp.allclose(relu.slope.mean.get_value(), expected, atol=1e-6)
        assert jnp.array_equal(bare.slope.mean.get_value(), jnp.ones_like(expected))
    relu.eval()
    relu(x)
    assert jnp.allclose(relu.slope.mean.get_value(), expected, atol=1e-6)


def test_mean_slope_takes_any_elementwise_activation():
    module = with_slopes(Plain(dense(72, 4, rank=None, rngs=nnx.Rngs(0)), activation=nnx.tanh,
                               flatten=True))  # fmt: skip
    x = make_batch().images
    module(x)
    slope = jnp.mean(1 - jnp.tanh(module.map(x.reshape(8, -1))) ** 2, axis=0)
    assert jnp.allclose(module.slope.mean.get_value(), 0.9 + 0.1 * slope, atol=1e-6)
    assert jnp.allclose(
        module.linear(x),
        module.map(x.reshape(8, -1)) * module.slope.mean.get_value()[None, :],
        atol=1e-6,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_mean_slopes_change_no_output_gradient_or_other_state(name):
    units, params, mstate = split(name, 0.5)
    units_s, params_s, mstate_s = split_units(with_slopes(NETWORKS[name](0.5)))
    _, twins, _ = split(name, 0.5, seed=7)
    assert not slopes(mstate)
    assert bool(slopes(mstate_s)) == (name != "linear")
    assert max_difference(params, params_s) == 0
    batch = make_batch()
    logits, moved, tape = forward(units, params, mstate, batch.images)
    logits_s, moved_s, tape_s = forward(units_s, params, mstate_s, batch.images)
    assert jnp.array_equal(logits, logits_s)
    for a, b in zip(jax.tree.leaves(moved), slopes(moved_s, others=True), strict=True):
        assert jnp.array_equal(a, b)
    for a, b in zip(slopes(moved_s), slopes(mstate_s), strict=True):
        assert bool(jnp.any(a < b))
    _, error = losses.output_error(logits, batch.labels)
    for pull, pull_s, h in zip(tape.pullbacks, tape_s.pullbacks, tape.outputs, strict=True):
        assert max_difference(pull(jnp.cos(h)), pull_s(jnp.cos(h))) == 0
    signals = feedback.walk(units, params, twins, tape, error)
    signals_s = feedback.walk(units_s, params, twins, tape_s, error)
    assert max_difference(signals, signals_s) == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_activation_is_watched_once(name):
    model = with_slopes(NETWORKS[name](0.5))
    activations = [m for _, m in nnx.iter_modules(model) if getattr(m, "activation", None)]
    assert [m for m in activations if m.slope is None] == []
    assert sum(isinstance(m, MeanSlope) for _, m in nnx.iter_modules(model)) == len(activations)


def test_pooled_slope_is_that_of_the_maxima():
    layer = conv(2, 4, 3, rank=None, rngs=nnx.Rngs(0))
    module = with_slopes(Plain(layer, activation=nnx.relu, pool=Pool(3, 3)))
    x = make_batch().images
    module(x)
    fraction = jnp.mean(max_pool(layer(x), Pool(3, 3)) > 0, axis=(0, 1, 2))
    assert float(jnp.max(jnp.abs(fraction - jnp.mean(layer(x) > 0, axis=(0, 1, 2))))) > 0.1
    assert jnp.allclose(module.slope.mean.get_value(), 0.9 + 0.1 * fraction, atol=1e-6)


def half_slope_network():
    rngs = nnx.Rngs(0)

    def half(z):
        return 0.5 * z

    def part(c_in, c_out, size=3, strides=1, activation=None):
        return Plain(conv(c_in, c_out, size, rank=0.7, rngs=rngs, strides=strides),
                     norm=batch_norm(c_out, rngs), activation=activation)  # fmt: skip

    return Feedforward(
        [
            part(2, 4, activation=half),
            Residual([part(4, 4, activation=half), part(4, 4)], activation=half),
            Residual([part(4, 4, activation=half), part(4, 4)], skip=False, activation=half),
            BlockEntry(part(4, 6, strides=2, activation=half),
                       shortcut=part(4, 6, size=1, strides=2)),
            BlockExit(part(6, 6), activation=half),
            Plain(dense(6, 5, rank=None, rngs=rngs), average=True),
        ]
    )  # fmt: skip


@pytest.mark.slow
def test_composed_path_with_mean_slopes_is_the_jacobian_at_constant_slope():
    units, params, mstate = split_units(with_slopes(half_slope_network()))
    shapes = output_shapes(units, params, mstate, IMAGE)
    x = make_batch().images
    step = jax.jit(lambda m: forward(units, params, m, x)[1])
    before = feedback.composed_paths(units, params, mstate, shapes, full(shapes))
    for _ in range(200):
        mstate = step(mstate)
    assert max_difference(slopes(mstate), [jnp.full_like(s, 0.5) for s in slopes(mstate)]) < 1e-6
    paths = feedback.composed_paths(units, params, mstate, shapes, full(shapes))
    h = x[:1]
    for i, path in enumerate(paths):
        h, _ = units[i].apply(params[i], mstate[i], h, train=False)
        rest = slice(i + 1, None)
        jacobian = jax.jacobian(lambda h, r=rest: predict(units[r], params[r], mstate[r], h))(h)
        scale = float(jnp.max(jnp.abs(path)))
        assert jnp.allclose(path, jacobian[0, :, 0], atol=1e-5 * scale)
    assert max_difference(before[:1], paths[:1]) > 0.1 * float(jnp.max(jnp.abs(paths[0])))


def test_mean_slopes_stay_when_ranks_are_sliced():
    units, params, mstate = split_units(with_slopes(NETWORKS["conv"](0.5)))
    x = make_batch().images
    _, mstate, _ = forward(units, params, mstate, x)
    kernel = params[0]["map"]["kernel"]
    zeroed = kernel._replace(s=kernel.s.at[2:].set(0))
    whole, small = (
        (units[0].apply(p, mstate[0], x, train=True), units[0].linear(p, mstate[0], x))
        for p in (
            {**params[0], "map": {"kernel": k}}
            for k in (zeroed, jax.tree.map(lambda x: x[..., :2], zeroed))
        )
    )
    assert max_difference(whole, small) < 1e-5


@pytest.mark.slow
def test_training_moves_the_slopes_and_compiles_once():
    units, params, mstate = split_units(with_slopes(NETWORKS["split_residual"](0.5)))
    method = make_method("ssa", units, params, mstate, path="composed", every=1)
    compiled = []
    optimizer = optax.sgd(0.1)
    step = make_step(units, method, optimizer, LossWeights(), lambda: compiled.append(1))
    refresh = make_refresh(method)
    # The step may take the state's buffers over.
    before = jax.tree.map(jnp.copy, mstate)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    for _ in range(3):
        state, _ = step(refresh(state), make_batch())
    assert len(compiled) == 1
    assert jax.tree.structure(state.mstate) == jax.tree.structure(before)
    for old, new in zip(slopes(before), slopes(state.mstate), strict=True):
        assert bool(jnp.any(new < old))
    # At a refresh the direct paths take the slopes in.
    flat = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.ones_like(x) if is_slope(path) else x, state.mstate
    )
    ones = method.refresh(state.feedback, state.params, flat)
    taken = method.refresh(state.feedback, state.params, state.mstate)
    assert max_difference(ones.paths[-1], taken.paths[-1]) == 0
    assert max_difference(ones.paths[0], taken.paths[0]) > 0
