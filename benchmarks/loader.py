"""How many images a second are decoded and augmented, against Pillow in a plain loop?

    python -m benchmarks.loader [--quick] [--json FILE] [--notes TEXT] [--data_dir DIR]

The training batches of `imagenet_sample1k` (JPEG files of about 120x100 pixels) for each size of
crop: a loop in one process that decodes with Pillow, crops, resizes, mirrors and stacks; our
reader in threads of one process, and with one and two worker processes. Rates are of what comes
after the first batch; the seconds until it comes, in which workers start, are apart.
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from experiments.show import markdown
from ssa_jax.data import decoding, images, streams
from ssa_jax.data.decoding import HostBatch, Reading
from ssa_jax.data.streams import Stream
from ssa_jax.reporting.environment import environment

Row = dict[str, Any]

NAME = "imagenet_sample1k"
SIZES = (64, 224)
BATCH = 50
WORKERS = (0, 1, 2)
SECONDS, QUICK_SECONDS = 2.5, 0.2
ROUNDS, QUICK_ROUNDS = 3, 1
# Long enough never to end while it is timed.
_EPOCHS = 10_000


def plain(stream: Stream, batch_size: int) -> Generator[np.ndarray]:
    """Batches as one would write them without a reader: every file decoded whole."""
    rng = np.random.default_rng(0)
    size, least = stream.image_size, Reading().crop_area
    while True:
        batch = []
        for index in rng.permutation(stream.train_size)[:batch_size]:
            image = Image.open(io.BytesIO(stream.train[int(index)]["image"])).convert("RGB")
            box = images.random_box(image.width, image.height, least, rng)
            image = image.crop(tuple(map(int, box))).resize((size, size), Image.Resampling.BILINEAR)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            batch.append(np.asarray(image))
        yield np.stack(batch)


def ours(stream: Stream, batch_size: int, workers: int) -> Generator[HostBatch]:
    """Our reader's batches, epoch after epoch."""
    dataset = decoding.train_dataset(stream, Reading(), (0,), 0, batch_size).repeat(_EPOCHS)
    return decoding.read(dataset, workers)


def rate(
    make: Callable[[], Generator[Any]], batch_size: int, seconds: float
) -> tuple[float, float]:
    """Images a second after the first batch, and the seconds until that one."""
    start = time.perf_counter()
    batches = make()
    next(batches)
    begun = time.perf_counter()
    done, passed = 0, 0.0
    while passed < seconds:
        next(batches)
        done, passed = done + batch_size, time.perf_counter() - begun
    batches.close()
    return done / passed, begun - start


def measure(stream: Stream, batch_size: int, rounds: int, seconds: float) -> list[Row]:
    """The rows of one size, the plain loop first; all take turns."""
    contestants: list[tuple[str, int, Callable[[], Generator[Any]]]] = [
        ("plain", 0, lambda: plain(stream, batch_size)),
        *(("ours", n, lambda n=n: ours(stream, batch_size, n)) for n in WORKERS),  # type: ignore[misc]
    ]
    found: list[list[tuple[float, float]]] = [[] for _ in contestants]
    for _ in range(rounds):
        for results, (_, _, make) in zip(found, contestants, strict=True):
            results.append(rate(make, batch_size, seconds))
    rows: list[Row] = []
    for (reader, workers, _), results in zip(contestants, found, strict=True):
        rates, waits = zip(*results, strict=True)
        median = statistics.median(rates)
        reference = rows[0]["images_per_second"] if rows else median
        rows.append(
            {
                "size": stream.image_size,
                "reader": reader,
                "workers": workers,
                "batch": batch_size,
                "images_per_second": round(median, 1),
                "ratio_to_plain": round(median / reference, 3),
                "first_batch_s": round(statistics.median(waits), 3),
                "rounds": rounds,
            }
        )
    return rows


def main() -> None:
    """Measures the sizes one after the other and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one size, to see that it runs")
    parser.add_argument("--json", help="write versions and rows to this file")
    parser.add_argument("--notes", help="what else the record should say, such as other load")
    parser.add_argument("--data_dir", help="TFDS directory; else TFDS_DATA_DIR or its default")
    args = parser.parse_args()
    # Grain's processes look at flags of absl.
    flags.FLAGS.mark_as_parsed()
    rounds, seconds = (QUICK_ROUNDS, QUICK_SECONDS) if args.quick else (ROUNDS, SECONDS)
    rows: list[Row] = []
    for size in SIZES[: 1 if args.quick else None]:
        rows += measure(streams.load(NAME, args.data_dir, size), BATCH, rounds, seconds)
        if args.json:
            notes = {"notes": args.notes} if args.notes else {}
            record = {**environment("grain", "pillow"), **notes, "rows": rows}
            Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    print(markdown.of_records(rows))


if __name__ == "__main__":
    main()
