"""Data sets in memory, as arrays, batches or streams, and the loaders that feed a step."""

from ssa_jax.data.datasets import (
    Dataset,
    Images,
    channel_moments,
    hold_out,
    limited,
    moments,
    normalise,
    shrunk,
)
from ssa_jax.data.loader import Feed, Loader, epoch_order, make_loader, shift_and_flip
from ssa_jax.data.registry import DATASETS, load

__all__ = [
    "DATASETS",
    "Dataset",
    "Feed",
    "Images",
    "Loader",
    "channel_moments",
    "epoch_order",
    "hold_out",
    "limited",
    "load",
    "make_loader",
    "moments",
    "normalise",
    "shift_and_flip",
    "shrunk",
]
