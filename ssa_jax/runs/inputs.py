"""The data set of a config, in memory or streamed, and what reads it in training."""

import jax
import numpy as np

from ssa_jax import data as data_lib
from ssa_jax.data import DATASETS, Dataset, Images, Loader, stream_loader, streams
from ssa_jax.data.batches import Batches, BatchLoader
from ssa_jax.data.decoding import Reading
from ssa_jax.data.stream_loader import StreamLoader
from ssa_jax.data.streams import Stream
from ssa_jax.errors import DataError
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.plugins import find
from ssa_jax.runs.config import Config

Data = Dataset | Stream | Batches
AnyLoader = Loader | StreamLoader | BatchLoader


def load(config: Config) -> Data:
    """Reads a data set, or opens one that is streamed.

    Raises:
      DataError: missing or corrupt data.
    """
    if config.dataset in streams.STREAMS:
        return streams.load(config.dataset, config.data_dir, config.image_size)
    if config.dataset in DATASETS:
        return data_lib.load(config.dataset, config.data_dir)
    return find("dataset", config.dataset, DATASETS)(config.data_dir)


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
    if isinstance(data, Batches):
        if share or size:
            raise DataError("--validation and --train_size need data with a known order")
        return data
    if isinstance(data, Stream):
        return streams.limited(streams.hold_out(data, share), size)
    return data_lib.limited(data_lib.hold_out(data, share), size)


def moments(data: Data) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation by the last axis by which inputs are normalised; see `data.moments`."""
    if isinstance(data, Batches):
        return None
    return (
        (stream_loader.MEAN, stream_loader.STD)
        if isinstance(data, Stream)
        else data_lib.moments(data)
    )


def first_images(data: Images, n: int) -> np.ndarray:
    """A few training images, normalised, float32 (n, H, W, C); of a stream, noise like them."""
    if isinstance(data, Batches):
        return data.first[0][:n]
    if not isinstance(data, Dataset):
        return np.random.default_rng(0).standard_normal((n, *data.image_shape), np.float32)
    return data_lib.normalise(data.train_images[:n], moments(data))


def make_loader(config: Config, data: Data, layout: Layout = ONE_DEVICE) -> AnyLoader:
    """What makes the batches of a run; every process reads its share of streamed ones."""
    if isinstance(data, Batches):
        return BatchLoader(data, layout)
    if not isinstance(data, Stream):
        return data_lib.make_loader(data, layout=layout)
    reading = Reading(
        crop_area=config.crop_area,
        on_corrupt=config.on_corrupt,
        workers=config.workers,
        shard=jax.process_index(),
        shards=jax.process_count(),
    )
    return stream_loader.make_loader(data, reading, config.batch_size, layout)
