"""Weights that torchvision or timm published, brought into the models here, by their names."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from ssa_jax.export.modules import ExportError

# A pattern of the front of a name, and the path of the layer that stands for it, with `\1` for
# the first group of the pattern; the classifier is last.
PathOf = Callable[[re.Match[str]], str]
Names = Mapping[str, str | PathOf]

# The ends of names. A norm's weight is told by its having one axis.
_LEAVES = {"bias": "bias", "running_mean": "mean", "running_var": "var", "cls_token": "token",
           "pos_embed": "positions"}  # fmt: skip
_IGNORED = "num_batches_tracked"


def _resnet(*blocks: int) -> Names:
    def block(found: re.Match[str]) -> str:
        stage, i = int(found[1]), int(found[2])
        return f"units/{1 + sum(blocks[: stage - 1]) + i}"

    def body(part: str) -> PathOf:
        return lambda found: f"{block(found)}/body/{int(found[3]) - 1}/{part}"

    return {
        r"conv1": "units/0/map",
        r"bn1": "units/0/norm",
        r"layer(\d)\.(\d)\.conv(\d)": body("map"),
        r"layer(\d)\.(\d)\.bn(\d)": body("norm"),
        r"layer(\d)\.(\d)\.downsample\.0": lambda found: f"{block(found)}/shortcut/map",
        r"layer(\d)\.(\d)\.downsample\.1": lambda found: f"{block(found)}/shortcut/norm",
        r"fc": f"units/{1 + sum(blocks)}/map",
    }


_MOBILENET_V2: Names = {
    r"features\.(0|18)\.0": r"units/\1/map",
    r"features\.(0|18)\.1": r"units/\1/norm",
    # The first block alone is not widened.
    r"features\.1\.conv\.1": "units/1/body/1/map",
    r"features\.1\.conv\.2": "units/1/body/1/norm",
    r"features\.(\d+)\.conv\.(\d)\.0": r"units/\1/body/\2/map",
    r"features\.(\d+)\.conv\.(\d)\.1": r"units/\1/body/\2/norm",
    r"features\.(\d+)\.conv\.2": r"units/\1/body/2/map",
    r"features\.(\d+)\.conv\.3": r"units/\1/body/2/norm",
    r"classifier\.1": "units/19/map",
}


_MOBILENET_V3: Names = {
    r"features\.(0|12)\.0": r"units/\1/map",
    r"features\.(0|12)\.1": r"units/\1/norm",
    r"features\.(\d+)\.block\.(\d)\.0": r"units/\1/body/\2/map",
    r"features\.(\d+)\.block\.(\d)\.1": r"units/\1/body/\2/norm",
    r"features\.(\d+)\.block\.(\d)\.fc1": r"units/\1/body/\2/gate/layers/1",
    r"features\.(\d+)\.block\.(\d)\.fc2": r"units/\1/body/\2/gate/layers/3",
    r"classifier\.0": "units/13/map",
    r"classifier\.3": "units/14/map",
}


def _efficientnet(*blocks: int) -> Names:
    def in_block(end: str) -> PathOf:
        def path(found: re.Match[str]) -> str:
            unit = 1 + sum(blocks[: int(found[1]) - 1]) + int(found[2])
            return f"units/{unit}/body/{found[3]}/{end}"

        return path

    front, end = r"features\.(\d)\.(\d)\.block\.(\d)", len(blocks) + 1
    return {
        r"features\.0\.0": "units/0/map",
        r"features\.0\.1": "units/0/norm",
        rf"{front}\.0": in_block("map"),
        rf"{front}\.1": in_block("norm"),
        rf"{front}\.fc1": in_block("gate/layers/1"),
        rf"{front}\.fc2": in_block("gate/layers/3"),
        rf"features\.{end}\.0": f"units/{sum(blocks) + 1}/map",
        rf"features\.{end}\.1": f"units/{sum(blocks) + 1}/norm",
        r"classifier\.1": f"units/{sum(blocks) + 2}/map",
    }


def _vit(depth: int = 12) -> Names:
    def in_block(end: str) -> PathOf:
        return lambda found: f"units/{int(found[1]) + 1}/layers/{end}"

    ends = {"norm1": "0/body/0", "attn.query": "0/body/1/query", "attn.key": "0/body/1/key",
            "attn.value": "0/body/1/value", "attn.proj": "0/body/1/out", "norm2": "1/body/0",
            "mlp.fc1": "1/body/1", "mlp.fc2": "1/body/3"}  # fmt: skip
    return {
        r"patch_embed\.proj": "units/0/layers/0",
        # Of arrays without a layer of their own.
        r"": "units/0/layers/1",
        r"norm": f"units/{depth + 1}/layers/0",
        **{rf"blocks\.(\d+)\.{re.escape(n)}": in_block(end) for n, end in ends.items()},
        r"head": f"units/{depth + 1}/layers/2",
    }


NAMES: dict[str, Names] = {
    "resnet18": _resnet(2, 2, 2, 2),
    "resnet50": _resnet(3, 4, 6, 3),
    "mobilenet_v2": _MOBILENET_V2,
    "mobilenet_v3_small": _MOBILENET_V3,
    "efficientnet_b0": _efficientnet(1, 2, 2, 3, 3, 4, 1),
    "vit_tiny": _vit(),
    "vit_small": _vit(),
}


def load_pretrained(
    model: nnx.Module, name: str, file: str | Path, *, classifier: bool = True
) -> Any:
    """The dense model with the weights of a state dict of PyTorch, stored as safetensors.

    Kernels (out, in, kh, kw) become (kh, kw, in, out), matrices are transposed, and timm's query,
    key and value, one matrix there, three. The images have to be of 224 pixels for a vision
    transformer, whose positions are learned; the normalisation is that of the weights.

    Args:
      model: of `MODELS[name]` with rank None; it is left as it is. `factorize` puts the result on
        factors.
      name: a key of `NAMES`: timm's names for the vision transformers (``vit_*_patch16_224``),
        torchvision's for all others.
      file: such as `safetensors.torch.save_file(torch_model.state_dict(), file)` writes.
      classifier: False leaves the last layer as it is, for other classes.

    Returns:
      a copy of the model.

    Raises:
      ExportError: another model, a file that cannot be read, an array that is missing, that has no
        place or another size.
    """
    if name not in NAMES:
        raise ExportError(f"pretrained weights are for {', '.join(NAMES)}, not {name!r}")
    try:
        arrays = safetensors.numpy.load_file(file)
    except Exception as e:
        raise ExportError(f"{file} cannot be read as safetensors: {e}") from e
    model = nnx.clone(model)
    places = {
        "/".join(map(str, path)): variable
        for path, variable in nnx.iter_graph(model)
        if isinstance(variable, nnx.Param | nnx.BatchStat)
    }
    *_, last = NAMES[name].values()
    left = set(places)
    for key, value in _single(arrays):
        path = _path(NAMES[name], key, value)
        if path is None or path not in places:
            raise ExportError(f"{file} has an array {key!r}, which {name} has no place for")
        left.remove(path)
        if not classifier and path.startswith(f"{last}/"):
            continue
        places[path].set_value(_shaped(key, value, places[path].shape))
    if left:
        raise ExportError(f"{file} lacks the values of {', '.join(sorted(left))}")
    return model


def _single(arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """The arrays one by one; query, key and value apart."""
    for key, value in arrays.items():
        if key.endswith(_IGNORED):
            continue
        if ".qkv." in key:
            parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            yield from ((key.replace("qkv", part), x) for part, x in parts)
        else:
            yield key, value


def _path(names: Names, key: str, value: np.ndarray) -> str | None:
    """Where an array belongs, or None."""
    layer, _, leaf = key.rpartition(".")
    for pattern, path in names.items():
        if found := re.fullmatch(pattern, layer):
            front = path(found) if callable(path) else found.expand(path)
            weight = "scale" if value.ndim == 1 else "kernel"
            return f"{front}/{weight if leaf == 'weight' else _LEAVES.get(leaf, leaf)}"
    return None


def _shaped(key: str, value: np.ndarray, shape: tuple[int, ...]) -> Any:
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
        value = value.T
    # Heads are apart in Flax; timm's positions and token have an axis for the batch, and within
    # squeeze-and-excitation torchvision has convolutions.
    if value.size != math.prod(shape) or (value.ndim == len(shape) and value.shape != shape):
        raise ExportError(f"{key} has shape {value.shape} when transposed, and the model {shape}")
    return jnp.asarray(value.reshape(shape), jnp.float32)
