"""Weights of torchvision and timm: where they belong, and the logits they give."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from ssa_jax.export import ExportError, load_pretrained
from ssa_jax.export.pretrained import NAMES
from ssa_jax.models import MODELS

WIDTH = 8


def narrow():
    """A vision transformer of the published depth; the names say nothing of widths."""
    options = {"width": WIDTH, "heads": 2}
    return MODELS["vit_tiny"]((32, 32, 3), 5, rank=None, rngs=nnx.Rngs(0), **options)


def state_dict():
    """Arrays of timm's names and shapes for it."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 65, WIDTH),
              "patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,),
              "norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (5, WIDTH),
              "head.bias": (5,)}  # fmt: skip
    for i in range(12):
        for name, out, inner in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1),
                                 ("mlp.fc2", 1, 4)):  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = (out * WIDTH, inner * WIDTH)
            shapes[f"blocks.{i}.{name}.bias"] = (out * WIDTH,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def stored(tmp_path, arrays):
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, file)
    return file


def test_every_array_is_in_its_place(tmp_path):
    arrays, model = state_dict(), narrow()
    made = load_pretrained(model, "vit_tiny", stored(tmp_path, arrays))
    x = np.random.default_rng(1).normal(size=(2, 3, WIDTH)).astype(np.float32)
    attention = made.units[3].layers[0].body[1]
    rows = (
        np.split(arrays["blocks.2.attn.qkv.weight"], 3),
        np.split(arrays["blocks.2.attn.qkv.bias"], 3),
    )
    for part, w, b in zip((attention.query, attention.key, attention.value), *rows, strict=True):
        # The first of the heads takes the first of the rows.
        assert jnp.allclose(part(x).reshape(2, 3, WIDTH), x @ w.T + b[None, None], atol=1e-5)
    heads = x.reshape(2, 3, 2, WIDTH // 2)
    w, b = arrays["blocks.2.attn.proj.weight"], arrays["blocks.2.attn.proj.bias"]
    assert jnp.allclose(attention.out(heads), x @ w.T + b[None, None], atol=1e-5)
    tokens = made.units[0].layers[1]
    assert jnp.array_equal(tokens.positions.get_value(), arrays["pos_embed"][0])
    assert jnp.array_equal(tokens.token.get_value(), arrays["cls_token"][0, 0])
    kernel = made.units[0].layers[0].kernel.get_value()
    assert kernel[1, 2, 0, 3] == arrays["patch_embed.proj.weight"][3, 0, 1, 2]
    assert not jnp.array_equal(model.units[0].layers[0].kernel.get_value(), kernel)


def test_a_classifier_of_other_classes_stays(tmp_path):
    arrays, model = state_dict(), narrow()
    arrays["head.weight"], arrays["head.bias"] = np.zeros((1000, WIDTH)), np.zeros(1000)
    file = stored(tmp_path, arrays)
    made = load_pretrained(model, "vit_tiny", file, classifier=False)
    last, before = made.units[-1].layers, model.units[-1].layers
    assert jnp.array_equal(last[2].kernel.get_value(), before[2].kernel.get_value())
    assert jnp.array_equal(last[0].scale.get_value(), arrays["norm.weight"])
    with pytest.raises(ExportError, match=r"head.* has shape .*1000,?\) when transposed"):
        load_pretrained(model, "vit_tiny", file)


def test_what_does_not_fit_is_told(tmp_path):
    arrays, model = state_dict(), narrow()
    bias = arrays.pop("head.bias")
    with pytest.raises(ExportError, match="lacks the values of units/13/layers/2/bias"):
        load_pretrained(model, "vit_tiny", stored(tmp_path, arrays))
    arrays |= {"head.bias": bias, "head_dist.bias": bias}
    with pytest.raises(ExportError, match=r"'head_dist.bias', which vit_tiny has no place"):
        load_pretrained(model, "vit_tiny", stored(tmp_path, arrays))
    with pytest.raises(ExportError, match="pretrained weights are for resnet18"):
        load_pretrained(model, "mlp", tmp_path)
    with pytest.raises(ExportError, match="cannot be read as safetensors"):
        load_pretrained(model, "vit_tiny", tmp_path / "none")


def peer(name):
    """The module of torchvision or timm, or a skip where they are not installed."""
    try:
        import timm
        import torchvision
    except (ImportError, RuntimeError) as e:
        pytest.skip(f"needs torchvision and timm: {e}")
    if "vit" in name:
        return timm.create_model(f"{name}_patch16_224")
    return getattr(torchvision.models, name)()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_logits_are_those_of_the_peer(name, tmp_path):
    other = peer(name).eval()
    import torch

    with torch.no_grad():
        # Norms that do something, and each token elsewhere.
        for key, value in other.state_dict().items():
            if value.is_floating_point() and (value.ndim == 1 or key.endswith(("_token", "embed"))):
                value += 0.1 * torch.rand(value.shape)
        images = torch.randn(2, 3, 224, 224)
        expected = other(images).numpy()
    arrays = {key: np.ascontiguousarray(x.numpy()) for key, x in other.state_dict().items()}
    model = nnx.eval_shape(lambda: MODELS[name]((224, 224, 3), 1000, rank=None, rngs=nnx.Rngs(0)))
    made = load_pretrained(model, name, stored(tmp_path, arrays))
    made.eval()
    logits = nnx.jit(lambda m, x: m(x))(made, images.permute(0, 2, 3, 1).numpy())
    assert np.max(np.abs(logits - expected)) < 1e-5 * np.max(np.abs(expected))
