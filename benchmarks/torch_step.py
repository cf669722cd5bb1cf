"""Backpropagation of the same network in PyTorch, where that is installed."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from ssa_jax.layers import SVDConv, SVDDense
from ssa_jax.models.blocks import Plain, Residual
from ssa_jax.types import Batch


def available() -> bool:
    """Whether PyTorch can be imported."""
    return importlib.util.find_spec("torch") is not None


def make_step(model: Any, batch: Batch, learning_rate: float) -> Callable[[], float]:
    """A call that does one training step and returns its loss.

    Mean cross-entropy and the fused Adam, without the clip of our chain; maps in the memory
    format that its CPU kernels prefer (channels last); as many threads as this process may use
    CPUs.

    Args:
      model: a dense `Feedforward` of `Plain` and `Residual` units, whose weights are copied.
      batch: in our layout.
      learning_rate: of Adam.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = module(model)
    images = torch.tensor(np.asarray(batch.images).transpose(0, 3, 1, 2))
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def module(model: Any) -> Any:
    """The network of `make_step`: channels last, in training mode.

    A layer W = U diag(s) Vᵀ is two, W = A B with A = U diag(√s) and B = diag(√s) Vᵀ, so that it
    starts as the same map.
    """
    torch = importlib.import_module("torch")
    made = torch.nn.Sequential(*(_unit(torch, unit) for unit in model.units))
    return made.to(memory_format=torch.channels_last).train()


def _unit(torch: Any, unit: Any) -> Any:
    if isinstance(unit, Residual):
        return _residual(torch, unit)
    if not isinstance(unit, Plain):
        raise TypeError(f"no PyTorch form of a unit {type(unit).__name__}")
    nn = torch.nn
    parts = [_average(torch)] if unit.average else []
    # Our features are ordered by position first.
    parts += [_to_rows(torch)] if unit.flatten else []
    parts.append(_map(torch, unit.map))
    if unit.norm is not None:
        momentum = 1 - unit.norm.momentum
        parts.append(nn.BatchNorm2d(unit.features, eps=unit.norm.epsilon, momentum=momentum))
    if unit.activation is not None:
        if unit.activation is not nnx.relu:
            raise TypeError("only ReLU is known here")
        parts.append(nn.ReLU())
    parts += [nn.MaxPool2d(*unit.pool)] if unit.pool else []
    return nn.Sequential(*parts)


def _map(torch: Any, layer: Any) -> Any:
    bias = None if layer.bias is None else np.asarray(layer.bias.get_value())
    if isinstance(layer, SVDDense | SVDConv):
        return _two_maps(torch, layer, bias)
    kernel = np.asarray(layer.kernel.get_value())
    if isinstance(layer, nnx.Linear):
        return _linear(torch, kernel.T, bias)
    return _conv(torch, kernel.transpose(3, 2, 0, 1), bias, layer.strides)


def _two_maps(torch: Any, layer: Any, bias: np.ndarray | None) -> Any:
    u, s, v = (np.asarray(x) for x in layer.kernel.get_value())
    a, b = u * np.sqrt(s), (v * np.sqrt(s)).T
    if isinstance(layer, SVDDense):
        return torch.nn.Sequential(_linear(torch, b, None), _linear(torch, a, bias))
    kh, kw = layer.kernel_size
    rank, down = len(s), layer.strides
    # Rows of u are (column of the kernel, channel out), of v (row of the kernel, channel in).
    first = b.reshape(rank, kh, -1).transpose(0, 2, 1)[..., None]
    second = a.reshape(kw, -1, rank).transpose(1, 2, 0)[:, :, None]
    return torch.nn.Sequential(
        _conv(torch, first, None, (down[0], 1)), _conv(torch, second, bias, (1, down[1]))
    )


def _linear(torch: Any, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    made = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None)
    return _filled(torch, made, weight, bias)


def _conv(torch: Any, weight: np.ndarray, bias: np.ndarray | None, strides: Any) -> Any:
    n, c, kh, kw = weight.shape
    padding = (kh // 2, kw // 2)
    made = torch.nn.Conv2d(c, n, (kh, kw), strides, padding, bias=bias is not None)
    return _filled(torch, made, weight, bias)


def _filled(torch: Any, made: Any, weight: np.ndarray, bias: np.ndarray | None) -> Any:
    with torch.no_grad():
        made.weight.copy_(torch.tensor(np.ascontiguousarray(weight)))
        if bias is not None:
            made.bias.copy_(torch.tensor(bias))
    return made


def _module(torch: Any, forward: Callable[..., Any], **children: Any) -> Any:
    """A module of some children with a function as its forward pass."""

    class Made(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in children.items():
                setattr(self, name, child)

        def forward(self, x: Any) -> Any:
            return forward(self, x)

    return Made()


def _average(torch: Any) -> Any:
    return _module(torch, lambda self, x: x.mean((2, 3)))


def _to_rows(torch: Any) -> Any:
    def rows(self: Any, x: Any) -> Any:
        del self
        return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(len(x), -1)

    return _module(torch, rows)


def _residual(torch: Any, block: Residual) -> Any:
    body = torch.nn.Sequential(*(_unit(torch, part) for part in block.body))
    projected = block.shortcut is not None
    shortcut = _unit(torch, block.shortcut) if projected else torch.nn.Identity()

    def forward(self: Any, x: Any) -> Any:
        y = self.body(x) + self.shortcut(x) if block.skip else self.body(x)
        return y if block.activation is None else torch.relu(y)

    return _module(torch, forward, body=body, shortcut=shortcut)
