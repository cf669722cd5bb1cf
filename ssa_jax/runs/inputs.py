"""The data set of a config, in memory or streamed, and what reads it in training."""

import jax
import numpy as np

from ssa_jax import data as data_lib
from ssa_jax.data import Dataset, Loader, streams
from ssa_jax.data.streams import Reading, Stream, StreamLoader
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.runs.config import Config

Data = Dataset | Stream


def load(config: Config) -> Data:
    """Reads a data set, or opens one that is streamed.

    Raises:
      DataError: missing or corrupt data.
    """
    if config.dataset in streams.STREAMS:
        return streams.load(config.dataset, config.data_dir, config.image_size)
    return data_lib.load(config.dataset, config.data_dir)


def of_run(config: Config, data: Data | None = None) -> Data:
    """The data set as a run has it: a share held out, and no more training examples than asked.

    Args:
      config: the run.
      data: its whole data set, where the caller has it already.

    Raises:
      DataError: missing or corrupt data.
    """
    data = data or load(config)
    share, size = config.validation, config.train_size
    if isinstance(data, Stream):
        return streams.limited(streams.hold_out(data, share), size)
    return data_lib.limited(data_lib.hold_out(data, share), size)


def moments(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (C,) of pixels in [0, 255] by which images are normalised."""
    if isinstance(data, Stream):
        return streams.MEAN, streams.STD
    return data_lib.channel_moments(data.train_images)


def make_loader(config: Config, data: Data, layout: Layout = ONE_DEVICE) -> Loader | StreamLoader:
    """What makes the batches of a run; every process reads its share of streamed ones."""
    if not isinstance(data, Stream):
        return data_lib.make_loader(data, layout=layout)
    reading = Reading(
        crop_area=config.crop_area,
        on_corrupt=config.on_corrupt,
        workers=config.workers,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )
    return streams.make_loader(data, reading, config.batch_size, layout)
