"""The models' architectures: whole and split blocks, skips, and their paths."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import apart, make_batch, max_difference

from ssa_jax.layers.norm import BatchNorm
from ssa_jax.methods import feedback
from ssa_jax.methods.composed import composed_paths
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import Plain, Residual, dense
from ssa_jax.networks.forward import output_shapes
from ssa_jax.training import costs

SMALL = (8, 8, 3)


def small(name, rank=0.5, seed=0):
    """A residual model with one block a stage, its statistics moved by one pass."""
    model = MODELS[name](SMALL, 5, rank=rank, rngs=nnx.Rngs(seed), blocks=1)
    model(make_batch(shape=SMALL).images)
    return model


def composed(units, params, mstate):
    """Full paths by exact derivatives on a few images."""
    shapes = output_shapes(units, params, mstate, SMALL)
    x = make_batch(4, 2, SMALL).images
    return composed_paths(units, params, None, mstate, x, feedback.plan(shapes, "full", 0))


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
    "vgg11": stack(3, 64, 128, 256, 256, 512, 512, 512, 512) + affine(512, 10),
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
    _, params, _ = apart(whole, SMALL)
    _, params_split, _ = apart(halves, SMALL)
    for i in (1, 2, 3):
        # The shortcut is of the first convolution's unit.
        last = {path: x for path, x in params[i].items() if "/body/1/" in path}
        first = {path: x for path, x in params[i].items() if path not in last}
        assert any("/shortcut/" in path for path in first) == (i > 1)
        assert first.keys() == params_split[2 * i - 1].keys()
        assert last.keys() == params_split[2 * i].keys()
        assert max_difference(first, params_split[2 * i - 1]) == 0
        assert max_difference(last, params_split[2 * i]) == 0


@pytest.mark.slow
def test_composed_paths_agree_where_a_block_ends():
    paths, paths_s = (
        composed(*apart(small(name), SMALL)) for name in ("resnet32", "resnet32_conv")
    )
    for path, path_s in zip(paths, paths_s[::2], strict=True):
        assert float(jnp.max(jnp.abs(path))) > 1e-3
        assert jnp.allclose(path, path_s, atol=1e-5)


@pytest.mark.slow
def test_what_skips_a_convolution_is_sent_what_the_block_gets_before_its_activation():
    """Without that activation the path of the block's end, unchanged."""
    model = small("resnet32_conv")
    for block in model.units[1:-1]:
        block.activation = None
    paths = composed(*apart(model, SMALL))
    for entry, end in zip(paths[1::2], paths[2::2], strict=True):
        assert jnp.allclose(entry[..., -end.shape[-1] :], end, atol=1e-6)
        assert not jnp.allclose(entry[..., : end.shape[-1]], end, atol=1e-3)


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
        x = a(x)


def test_open_blocks_are_residual_ones_before_their_activation():
    residual, open_ = small("resnet32"), small("resnet32_identity")
    for a, b in zip(residual.units[1:-1], open_.units[1:-1], strict=True):
        assert max_difference(*(nnx.state(m, nnx.Param) for m in (a, b))) == 0
        # The same statistics too.
        b.body, b.shortcut = nnx.clone(a.body), nnx.clone(a.shortcut)
    residual.eval()
    open_.eval()
    x = residual.units[0](make_batch(shape=SMALL).images)
    for a, b in zip(residual.units[1:-1], open_.units[1:-1], strict=True):
        assert jnp.array_equal(a(x), nnx.relu(b(x)))
        if b.shortcut is None:
            # The skip is whole in the output and in its derivative alike.
            def body(x, b=b):
                return b.body[1](b.body[0](x))

            assert jnp.allclose(b(x) - body(x), x, atol=1e-5)
            y, whole = jax.vjp(b, x)
            signal = jnp.cos(y)
            (inner,) = jax.vjp(body, x)[1](signal)
            assert jnp.allclose(whole(signal)[0] - inner, signal, atol=1e-5)
        x = a(x)


def test_the_plain_network_starts_from_the_weights_of_the_residual_one():
    _, residual, _ = apart(small("resnet32"), SMALL)
    _, plain, _ = apart(small("plain32"), SMALL)
    for a, b in zip(residual, plain, strict=True):
        a = {path: x for path, x in a.items() if "/shortcut/" not in path}
        assert a.keys() == b.keys()
        assert max_difference(a, b) == 0


def test_a_shortcut_without_skip_is_refused():
    part = Plain(dense(2, 2, rank=None, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="takes no shortcut"):
        Residual([part], shortcut=part, skip=False)


def test_only_the_stem_starts_at_full_rank():
    _, params, _ = apart(small("resnet32", 0.5), SMALL)
    assert params[0]["units/0/map/kernel"].rank == 3 * 3
    assert params[1]["units/1/body/0/map/kernel"].rank == 3 * 16 // 2
    assert params[2]["units/2/shortcut/map/kernel"].rank == 16 // 2


@pytest.mark.slow
def test_path_of_an_averaging_classifier_is_its_kernel_over_the_positions():
    model = small("resnet32")
    last = model.units[-1]
    h = jax.random.normal(jax.random.key(0), (4, 2, 2, 64))
    assert jnp.allclose(last(h), last.map(h.mean((1, 2))), atol=1e-6)
    units, params, mstate = apart(model, SMALL)
    path = composed(units, params, mstate)[-1]
    expected = params[-1]["units/4/map/kernel"].T.reshape(5, 1, 1, 64) / 4
    assert jnp.allclose(path, jnp.broadcast_to(expected, path.shape), atol=1e-7)


def test_groups_of_a_batch_norm_are_normalised_as_batches_of_their_own():
    x = jax.random.normal(jax.random.key(0), (6, 4, 4, 5))
    norm, stock = (kind(5, momentum=0.9, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm))
    norm.groups = 3
    parts = [nnx.clone(stock) for _ in range(3)]
    expected = jnp.concatenate([part(x[2 * i : 2 * i + 2]) for i, part in enumerate(parts)])
    assert max_difference(norm(x), expected) < 1e-6
    for name in ("mean", "var"):
        means = sum(getattr(part, name).get_value() for part in parts) / 3
        assert max_difference(getattr(norm, name).get_value(), means) < 1e-6
    # No group sees another: the derivative of one by the rows of another is zero.
    one = jax.grad(lambda x: jnp.sum(nnx.clone(norm)(x)[:2] ** 3))(x)
    assert jnp.any(one[:2] != 0)
    assert not jnp.any(one[2:])
    # By stored statistics rows are alone anyway, and a batch that is not divided is one group.
    stock.mean.set_value(norm.mean.get_value()), stock.var.set_value(norm.var.get_value())
    assert max_difference(norm(x, True), stock(x, True)) == 0
    assert max_difference(norm(x[:5]), stock(x[:5])) == 0


def test_a_batch_norm_by_device_has_as_many_groups_as_its_program_has_devices():
    """Whichever it is traced for: those of a plan are not here."""
    x = jax.ShapeDtypeStruct((6, 4, 4, 5), jnp.float32)

    whole, three, by_device = (BatchNorm(5, rngs=nnx.Rngs(0)) for _ in range(3))
    three.groups, by_device.by_device = 3, True

    def program(norm):
        return str(jax.make_jaxpr(lambda x: nnx.clone(norm)(x))(x))

    assert program(by_device) == program(whole)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((3,), ("devices",))):
        assert program(by_device) == program(three) != program(whole)
