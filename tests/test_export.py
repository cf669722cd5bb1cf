"""Exports give the trained model's logits, in every form, and damaged ones say so."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import CLASSES, EVERY, IMAGE, NETWORKS, first, make_batch, small_model

from ssa_jax import export
from ssa_jax.export import Add, Affine, ExportError, InferenceModel, MaxPool
from ssa_jax.export.descriptions import describe, rebuild
from ssa_jax.layers import Pool, SVDConv, SVDDense
from ssa_jax.models import MODELS
from ssa_jax.models.blocks import Plain, average
from ssa_jax.training import costs


def logits(call, x):
    return jax.jit(lambda x: call(x))(x)


def seen(model, shape=IMAGE):
    """The model with batch norms that are not at their start, in evaluation mode."""
    for seed in range(2):
        model(3 * make_batch(seed=seed, shape=shape).images + 1)
    for i, (_, norm) in enumerate(nnx.iter_modules(model)):
        if isinstance(norm, nnx.BatchNorm):
            keys = jax.random.split(jax.random.key(i))
            norm.scale.set_value(1 + 0.3 * jax.random.normal(keys[0], norm.scale.shape))
            norm.bias.set_value(jax.random.normal(keys[1], norm.bias.shape))
    model.eval()
    return model


def kinds(layers):
    """Types of all layers, branches included."""
    found = []
    for layer in layers:
        found.append(type(layer))
        if isinstance(layer, Add):
            found += [kind for branch in layer.branches for kind in kinds(branch.layers)]
    return found


def assert_same(a, b):
    assert jnp.max(jnp.abs(a - b)) <= 1e-5 * jnp.max(jnp.abs(b))


@pytest.mark.parametrize("form", export.FORMS)
@pytest.mark.parametrize(
    "rank",
    first([0.4, None, 1.0], 1),
)
@pytest.mark.parametrize("name", sorted(EVERY))
@pytest.mark.filterwarnings("ignore:left dense")
def test_inference_forms_give_the_logits_of_the_trained_model(name, rank, form):
    model, x = seen(EVERY[name](rank)), make_batch().images
    expected = logits(model, x)
    found = export.to_inference(model, IMAGE, form)
    assert_same(logits(found, x), expected)
    assert not {nnx.BatchNorm, Affine, SVDConv, SVDDense, Plain} & set(kinds(found.layers))
    assert jnp.array_equal(logits(model, x), expected)


# The others are of the same modules, at more depth.
QUICK = ("mlp", "smallconv", "resnet32", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0")


@pytest.mark.parametrize("name", ["inverted", "vit"])
def test_gates_and_attention_are_read_back_and_run_as_a_program(name, tmp_path):
    model, x = seen(EVERY[name]()), make_batch().images
    export.save(tmp_path / "export", export.to_inference(model, IMAGE))
    loaded = export.load(tmp_path / "export")
    assert_same(logits(loaded, x), logits(model, x))
    assert_same(export.load_stablehlo(tmp_path / "export")(x[:3]), logits(loaded, x)[:3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in sorted(MODELS)],
)
def test_every_model_has_an_inference_form(name):
    # Small blocks keep the deep ones quick; what is tested is how they are put together.
    options = {"blocks": 1} if "32" in name else {}
    shape = (32, 32, 3) if name.startswith("vgg") else (8, 8, 3)
    model, shape = small_model(name, CLASSES, 0.25, shape, **options)
    model = seen(model, shape)
    x = make_batch(n=2, shape=shape).images
    found = export.to_inference(model, shape)
    assert_same(found(x), model(x))
    assert nnx.BatchNorm not in kinds(found.layers)


def test_auto_takes_the_cheaper_form_of_each_layer_and_merges_a_tie():
    rngs = nnx.Rngs(0)
    image = (6, 6, 4)

    def forms(layer, shape):
        model = nnx.Sequential(layer)
        sizes = [
            costs.macs(export.to_inference(model, shape, form),
                       jax.ShapeDtypeStruct((1, *shape), jnp.float32))
            for form in export.FORMS
        ]  # fmt: skip
        return dict(zip(export.FORMS, sizes, strict=True)), len(
            export.to_inference(model, shape).layers
        )

    # r (3·4 + 3·4) a pixel against 9·4·4: equal at half of full rank, 6 of 12.
    sizes, layers = forms(SVDConv(4, 4, 3, rank=0.5, rngs=rngs), image)
    assert sizes["factored"] == sizes["merged"] == sizes["auto"]
    assert layers == 1
    sizes, layers = forms(SVDConv(4, 4, 3, rank=5 / 12, rngs=rngs), image)
    assert sizes["auto"] == sizes["factored"] < sizes["merged"]
    assert layers == 2
    # With a stride the vertical map still runs at every column, which parameters do not tell.
    sizes, layers = forms(SVDConv(4, 4, 3, rank=5 / 12, strides=2, rngs=rngs), image)
    assert sizes["auto"] == sizes["merged"] < sizes["factored"]
    assert layers == 1
    sizes, layers = forms(SVDDense(8, 8, rank=0.75, rngs=rngs), (8,))
    assert sizes["auto"] == sizes["merged"] < sizes["factored"]


@pytest.mark.parametrize(
    ("strides", "padding"),
    [(1, "SAME"), (2, "SAME"), ((1, 2), "valid"), (2, 1), ((3, 1), ((0, 2), (1, 0)))],
)
@pytest.mark.parametrize("form", ["factored", "merged"])
def test_strides_and_paddings_survive(strides, padding, form, tmp_path):
    conv = SVDConv(2, 5, (3, 2), rank=0.5, strides=strides, padding=padding, rngs=nnx.Rngs(0))
    conv.bias.set_value(jnp.arange(5.0))
    x = make_batch().images
    found = export.to_inference(nnx.Sequential(conv), IMAGE, form)
    assert_same(found(x), conv(x))
    export.save(tmp_path / "export", found)
    assert jnp.array_equal(export.load(tmp_path / "export")(x), found(x))


def test_a_norm_that_no_map_precedes_stays_as_an_affine_map(tmp_path):
    rngs = nnx.Rngs(0)
    body = nnx.Sequential(
        nnx.BatchNorm(2, rngs=rngs), nnx.relu, nnx.Conv(2, 3, (3, 3), rngs=rngs),
        nnx.BatchNorm(3, use_scale=False, rngs=rngs), nnx.Dropout(0.5, rngs=rngs),
        nnx.BatchNorm(3, use_bias=False, rngs=rngs), average,
    )  # fmt: skip
    x = make_batch().images
    body(3 * x + 1)
    body.eval()
    found = export.to_inference(body, IMAGE)
    assert kinds(found.layers)[0] is Affine
    assert len(found.layers) == 4
    assert_same(found(x), body(x))
    export.save(tmp_path / "export", found)
    assert_same(export.load(tmp_path / "export")(x), body(x))


def test_a_split_block_and_a_whole_one_become_one_network():
    whole, halves = (seen(NETWORKS[name](0.5)) for name in ("residual", "split_residual"))
    described = [
        [describe(y) for y in export.to_inference(m, IMAGE).layers] for m in (whole, halves)
    ]
    assert described[0] == described[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A residual network's inference form and the folder of its export."""
    folder = tmp_path_factory.mktemp("saved") / "export"
    model = export.to_inference(seen(NETWORKS["residual"](0.3)), IMAGE)
    export.save(folder, model, {"dataset": "none"})
    return model, folder


def test_what_is_read_back_is_what_was_written(saved):
    model, folder = saved
    x = make_batch().images
    read = export.load(folder)
    for name, array in export.weights(model).items():
        assert np.array_equal(export.weights(read)[name], array)
    assert jnp.array_equal(logits(read, x), logits(model, x))
    assert export.read_config(folder)["metadata"] == {"dataset": "none"}
    assert (folder / "model.safetensors").stat().st_size == export.weight_bytes(model)
    # The layers alone are an ordinary module, which nnx.jit takes too.
    assert_same(nnx.jit(nnx.Sequential(*read.layers))(x), logits(model, x))


def test_the_program_takes_any_batch_size(saved):
    model, folder = saved
    program = export.load_stablehlo(folder)
    for n in (1, 2, 5):
        x = make_batch(n=n, seed=n).images
        assert_same(program(x), logits(model, x))


def test_wrong_images_are_told(saved):
    model, folder = saved
    for images in (jnp.ones((2, 6, 5, 2)), jnp.ones(IMAGE), jnp.ones((2, *IMAGE), jnp.uint8)):
        with pytest.raises(ValueError, match=r"expected normalised images \(batch, 6, 6, 2\)"):
            model(images)
        with pytest.raises(ExportError, match="the program takes other images"):
            export.load_stablehlo(folder)(images)


def test_nothing_is_overwritten(saved):
    model, folder = saved
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    with pytest.raises(ExportError, match="exists already; nothing was written"):
        export.save(folder, model)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def damage(folder, name, change):
    file = folder / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


def edit(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.json", None, "model.json cannot be read"),
        ("model.json", lambda c: c[:40], "model.json is damaged"),
        ("model.json", lambda c: b"\xff\xfe", "model.json is damaged"),
        ("model.json", lambda c: b"[1, 2]", "was not written by ssa_jax.export"),
        ("model.json", edit(format="onnx"), "was not written by ssa_jax.export"),
        ("model.json", edit(version=99), "format version 99, this code reads 1"),
        ("model.json", edit(layers=[{"kind": "lstm"}]), "no network that can be rebuilt"),
        ("model.json", edit(layers=[{"kind": "relu"}]), "does not hold the weights"),
        ("model.json", edit(sha256={}), "is damaged or of another export"),
        ("model.safetensors", None, "model.safetensors cannot be read"),
        ("model.safetensors", lambda c: c[: len(c) // 2], "is damaged or of another export"),
        ("model.safetensors", lambda c: c[:-1] + b"x", "is damaged or of another export"),
        ("model.stablehlo", None, "model.stablehlo cannot be read"),
        ("model.stablehlo", lambda c: c[:100], "is damaged or of another export"),
    ],
)
def test_a_damaged_export_is_one_line(saved, tmp_path, name, change, message):
    model, _ = saved
    folder = tmp_path / "export"
    export.save(folder, model)
    damage(folder, name, change)
    read = export.load_stablehlo if name.endswith("stablehlo") else export.load
    with pytest.raises(ExportError, match=message) as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_models_without_an_inference_form_name_the_layer():
    rngs = nnx.Rngs(0)

    def fails(layer, message):
        with pytest.raises(ExportError, match=message):
            export.to_inference(nnx.Sequential(nnx.relu, layer), IMAGE)

    fails(jnp.cos, "model/layers/1: exports have no layer cos; they have")
    fails(nnx.RMSNorm(2, rngs=rngs), "model/layers/1: exports have no layer RMSNorm")
    fails(nnx.Conv(2, 2, (3, 3), dtype=jnp.bfloat16, rngs=rngs), "model/layers/1: .*float32")
    fails(nnx.BatchNorm(6, axis=1, rngs=rngs), "model/layers/1: a batch norm over axis 1")
    with pytest.raises(ExportError, match="form must be one of auto, factored, merged"):
        export.to_inference(NETWORKS["conv"](0.5), IMAGE, "fast")


def test_max_pooling_drops_what_does_not_fill_a_window():
    x = jnp.arange(2 * 5 * 5.0).reshape(1, 5, 5, 2)
    pool = MaxPool(Pool(2, 2))
    assert pool(x).shape == (1, 2, 2, 2)
    assert pool(x)[0, 1, 1, 1] == x[0, 3, 3, 1]


def test_pooling_of_an_earlier_export_has_its_size_for_stride():
    assert rebuild({"kind": "max_pool", "size": 2}).pool == Pool(2, 2)
    overlapping = MaxPool(Pool(3, 2, 1))
    assert rebuild(describe(overlapping)).pool == overlapping.pool


def test_an_inference_model_exports_as_itself(saved):
    model, _ = saved
    again = export.to_inference(model, IMAGE)
    assert isinstance(again, InferenceModel)
    assert jnp.array_equal(again(make_batch().images), model(make_batch().images))
