"""The data set of a config, in memory or streamed, and what reads it in training."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ssa_jax import data as data_lib
from ssa_jax.data import DATASETS, Dataset, Images, Loader, stream_loader, streams
from ssa_jax.data.arrays import is_pair
from ssa_jax.data.batches import Batches, BatchLoader, from_batches
from ssa_jax.data.decoding import Reading
from ssa_jax.data.files import open_data
from ssa_jax.data.stream_loader import StreamLoader
from ssa_jax.data.streams import Stream
from ssa_jax.errors import DataError
from ssa_jax.parallel.mesh import ONE_DEVICE, Layout
from ssa_jax.plugins import find
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import PREFIX

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
        data = data_lib.load(config.dataset, config.data_dir)
        return data_lib.shrunk(data, config.image_size) if config.image_size else data
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
    data = data_lib.limited(data_lib.hold_out(data, share), size)
    # They take a pass over all of them, and are asked for more than once.
    return data._replace(moments=moments(data))


def moments(data: Data) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and deviation by the last axis by which inputs are normalised; see `data.moments`."""
    if isinstance(data, Batches):
        return None
    return (
        (stream_loader.MEAN, stream_loader.STD)
        if isinstance(data, Stream)
        else data_lib.moments(data)
    )


def first_examples(data: Images, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A few training inputs, normalised, float32 (n, ...), and their targets; of a stream, noise.

    A stream is not read for them: noise like its images, and labels by chance.
    """
    if isinstance(data, Batches):
        images, targets = data.first[:2]
        return images[:n], targets[:n]
    if not isinstance(data, Dataset):
        rng = np.random.default_rng(0)
        images = rng.standard_normal((n, *data.image_shape), np.float32)
        return images, rng.integers(data.classes, size=n, dtype=np.int32)
    return data_lib.normalise(data.train_images[:n], moments(data)), data.train_labels[:n]


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


def from_arguments(
    train: Any, test: Any, loss: Any, crop: int, flip: bool, size: int | None,
    outputs: int | None, name: str, steps: int | None,
) -> tuple[Any, str]:  # fmt: skip
    """The data, and their name in the config; None for data that the config names."""
    if test is not None and isinstance(train, str | Path | Dataset):
        raise DataError(
            "test goes with arrays and batches; a name, a path or a Dataset has its own"
        )
    named = isinstance(train, str) and not Path(train).expanduser().exists()
    batches = not named and not isinstance(train, str | Path | Dataset) and not is_pair(train)
    _refuse_unused(
        {"crop": crop, "flip": flip, "size": size},
        named or batches or isinstance(train, Dataset),
        "is for arrays and files; a named data set, a Dataset and batches come as they are",
    )
    _refuse_unused(
        {"outputs": outputs}, named, "is for data that do not tell it; a named data set does"
    )
    _refuse_unused({"steps_per_epoch": steps}, not batches, "is for an iterable of batches")
    if named:
        return None, train
    labelled = loss == "cross_entropy" or getattr(loss, "classes", False)
    kinds: dict[str, Any] = {"classes": labelled, "outputs": outputs}
    if batches and hasattr(train, "shape"):
        raise DataError("targets are missing: give (inputs, targets)")
    if batches:
        data: Any = from_batches(train, test, name=name, steps_per_epoch=steps, **kinds)
        return data, f"{PREFIX}:{re.sub(r'[^0-9a-zA-Z]+', '_', name)}"
    options = {**kinds, "crop": crop, "flip": flip}
    if isinstance(train, str | Path):
        options = {n: v for n, v in options.items() if v is not None}
        options |= {"size": size} if Path(train).expanduser().is_dir() else {}
    else:
        options["name"] = name
    data = open_data(train, test, **options)
    return data, f"{PREFIX}:{data.name or 'data'}"


def _refuse_unused(arguments: dict[str, Any], unused: bool, why: str) -> None:
    """Raises DataError for an argument that is given and would do nothing."""
    for name, value in arguments.items():
        if unused and value not in (0, None):
            raise DataError(f"{name} {why}")
