"""The data set of a config, in memory or streamed, and what reads it in training."""

import jax
import numpy as np

from experiments.config import Config, ConfigError
from ssa_jax import data as data_lib
from ssa_jax import streams
from ssa_jax.data import Dataset, Loader
from ssa_jax.streams import Reading, Stream, StreamLoader

Data = Dataset | Stream


def load(config: Config) -> Data:
    """Reads a data set, or opens one that is streamed.

    Raises:
      DataError: missing or corrupt data.
    """
    if config.dataset in streams.STREAMS:
        return streams.load(config.dataset, config.data_dir, config.image_size)
    return data_lib.load(config.dataset, config.data_dir)


def hold_out(data: Data, share: float) -> Data:
    """The data set with a share of its training examples in place of the test set."""
    if isinstance(data, Stream):
        return streams.hold_out(data, share)
    return data_lib.hold_out(data, share)


def moments(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of pixels in [0, 255] by which images are normalised."""
    if isinstance(data, Stream):
        return streams.MEAN, streams.STD
    return data_lib.channel_moments(data.train_images)


def make_loader(config: Config, data: Data) -> Loader | StreamLoader:
    """What makes the batches of a run; every process reads its share of a streamed one.

    Raises:
      ConfigError: batches that the processes cannot share equally.
    """
    if not isinstance(data, Stream):
        return data_lib.make_loader(data)
    processes = jax.process_count()
    if config.batch_size % processes:
        raise ConfigError(
            f"--batch_size must be a multiple of {processes}, the number of processes, got "
            f"{config.batch_size}"
        )
    reading = Reading(
        crop_area=config.crop_area,
        on_corrupt=config.on_corrupt,
        workers=config.workers,
        shard=jax.process_index(),
        shards=processes,
    )
    return streams.make_loader(data, reading, config.batch_size)
