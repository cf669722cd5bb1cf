"""Streamed data: the same batches from any place and with any workers; shards; corrupt files."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from streamed import SIZE, records, stream

from ssa_jax.data import decoding, stream_loader, streams
from ssa_jax.data.decoding import Reading
from ssa_jax.data.streams import Subset
from ssa_jax.errors import DataError

SEED = (3, 5)
BATCH = 4
# Whole batches of the 23 records.
STEPS = 5


def batches(source, reading=Reading(), epoch=0, start=0, batch_size=BATCH):  # noqa: B008
    dataset = decoding.train_dataset(source, reading, SEED, epoch, batch_size)[start:]
    return list(decoding.read(dataset, reading.workers))


def assert_equal_batches(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        assert all(np.array_equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole():
    return batches(stream())


def test_resumed_after_any_number_of_batches_the_rest_is_the_same():
    source = stream(n=83)
    uninterrupted = batches(source)
    for done in np.random.default_rng(0).choice(len(uninterrupted), 10, replace=False):
        assert_equal_batches(batches(source, start=int(done)), uninterrupted[done:])


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(whole, workers):
    # Grain looks at flags, which a program has parsed.
    flags.FLAGS.mark_as_parsed()
    assert_equal_batches(batches(stream(), Reading(workers=workers)), whole)
    assert_equal_batches(batches(stream(), Reading(workers=workers), start=2), whole[2:])


def test_an_epoch_shows_every_record_at_most_once_and_each_anew():
    # Labels stand for records here.
    source = stream()._replace(
        train=[{**r, "label": i} for i, r in enumerate(records(23))], classes=23
    )
    first, second = (batches(source, epoch=e) for e in (0, 1))
    orders = [np.concatenate([b["label"] for b in epoch]) for epoch in (first, second)]
    assert len(first) == STEPS
    for order in orders:
        assert len(set(order)) == STEPS * BATCH
    assert orders[0].tolist() != orders[1].tolist()
    # A record in both epochs is cropped in two ways.
    common = set(orders[0]) & set(orders[1])
    images = [
        {label: b["image"][i] for b in epoch for i, label in enumerate(b["label"])}
        for epoch in (first, second)
    ]
    same = [np.array_equal(images[0][k], images[1][k]) for k in common]
    assert np.mean(same) < 0.2
    assert first[0]["image"].shape == (BATCH, SIZE, SIZE, 3)
    assert first[0]["image"].dtype == np.uint8


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_are_disjoint_and_together_the_batch(whole, shards):
    parts = [batches(stream(), Reading(shard=i, shards=shards)) for i in range(shards)]
    for step, batch in enumerate(whole):
        for name, values in batch.items():
            # Shard i has records i, i + shards, ... of the batch.
            joined = np.stack([part[step][name] for part in parts], axis=1)
            assert np.array_equal(joined.reshape(values.shape), values)


def test_shards_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 cannot be shared equally by 3 processes"):
        batches(stream(), Reading(shards=3))


def test_a_corrupt_record_is_named_by_its_index():
    with pytest.raises(DataError, match=r"sample: record 11 is corrupt: .*--on_corrupt=skip"):
        batches(stream(n=24, corrupt=(11,)))


@pytest.mark.long
def test_a_corrupt_record_is_named_from_a_worker_too():
    flags.FLAGS.mark_as_parsed()
    with pytest.raises(DataError, match="sample: record 11 is corrupt"):
        batches(stream(n=24, corrupt=(11,)), Reading(workers=1))


def test_a_skipped_record_is_replaced_by_the_next_good_one_and_counted():
    skip = Reading(on_corrupt="skip", crop_area=1.0)
    good = stream(n=24)._replace(train=[{**r, "label": 0} for r in records(24)])
    bad = good._replace(train=[dict(r) for r in good.train])
    for i in (5, 6, 23):
        bad.train[i]["image"] = b"no image"
    for i in (7, 0):
        bad.train[i]["label"] = 1
    found, expected = batches(bad, skip), batches(good, skip)
    replaced = [b["skipped"] for b in found]
    assert np.sum(replaced) == 3
    assert np.sum([b["skipped"] for b in expected]) == 0
    # Those of the replaced have the label of what came in their place, all others stay.
    for b, e in zip(found, expected, strict=True):
        assert (b["label"][b["skipped"] == 1] == 1).all()
        kept = (b["skipped"] == 0) & (b["label"] == 0)
        assert np.array_equal(b["image"][kept], e["image"][kept])
    assert sum((b["label"] == 1).sum() for b in found) == 5
    assert_equal_batches(batches(bad, skip, start=3), found[3:])


def test_a_label_outside_the_classes_is_a_corrupt_record():
    source = stream(n=8)
    source.train[2]["label"] = 3
    with pytest.raises(DataError, match=r"record 2 is corrupt: label 3 outside \[0, 3\)"):
        batches(source)


def test_nothing_but_corrupt_records_is_an_error_also_where_they_are_skipped():
    with pytest.raises(DataError, match="all of 8 records in a row are corrupt"):
        batches(stream(n=8, corrupt=range(8)), Reading(on_corrupt="skip"))


def loader(source, **reading):
    return stream_loader.make_loader(source, Reading(**reading), eval_batch_size=4)


def test_feeds_are_the_batches_of_the_run_on_the_device_in_order():
    key = jax.random.key(3)
    source = stream()
    made = loader(source)
    words = jax.random.key_data(key).tolist()
    expected = list(decoding.read(decoding.train_dataset(source, Reading(), words, 1, BATCH), 0))
    with jax.transfer_guard("disallow"):
        feeds = list(made.feeds(key, 1, BATCH, 2))
    assert len(feeds) == STEPS - 2
    for feed, host in zip(feeds, expected[2:], strict=True):
        batch = made.batch_at(feed.source, 0)
        assert np.array_equal(batch.labels, host["label"])
        pixels = np.asarray(batch.images) * stream_loader.STD + stream_loader.MEAN
        assert np.allclose(pixels, host["image"], atol=1e-3)
        assert feed.counts["skipped"].tolist() == [0]


def test_test_batches_hold_every_example_once_and_mark_what_is_not_there():
    source = stream(corrupt_test=(1,))
    labels = [b.labels.tolist() for b in loader(source, on_corrupt="skip").test_batches()]
    assert labels == [[0, -1, 2, 0], [1, 2, 0, -1]]
    with pytest.raises(DataError, match="record 1 is corrupt"):
        list(loader(source).test_batches())


def test_shards_of_the_test_set_have_equally_many_batches_and_together_every_example():
    # The second shard has nothing left for the last batch of 5 in batches of 4.
    source = stream(n_test=5)
    parts = [
        [b.labels.tolist() for b in loader(source, shard=i, shards=2).test_batches()]
        for i in range(2)
    ]
    assert parts == [[[0, 2], [1, -1]], [[1, 0], [-1, -1]]]


def test_a_shard_without_any_test_example_has_no_batches():
    source = stream(n_test=1)
    sizes = [
        [len(b["label"]) for b in decoding.read(decoding.test_dataset(source, reading, 2), 0)]
        for reading in (Reading(shard=0, shards=2), Reading(shard=1, shards=2))
    ]
    assert sizes == [[1], []]


def test_fixed_batches_are_central_crops():
    source = stream()
    batch = loader(source).fixed_batch(np.array([4, 2]))
    assert batch.labels.tolist() == [1, 2]
    again = loader(source).fixed_batch(np.array([2]))
    assert np.array_equal(batch.images[1], again.images[0])


def test_held_out_records_are_measured_and_not_trained_on():
    source = stream()
    split = streams.hold_out(source, 0.2)
    assert isinstance(split.test, Subset)
    assert (split.train_size, len(split.test)) == (18, 5)
    files = [{r["image"] for r in map(part.__getitem__, range(len(part)))}
             for part in (split.train, split.test)]  # fmt: skip
    assert not files[0] & files[1]
    assert files[0] | files[1] == {r["image"] for r in source.train}
    assert streams.hold_out(source, 0.0) is source


def test_a_limited_stream_is_a_part_of_the_training_records_always_the_same():
    source = stream()
    part = streams.limited(source, 9)
    assert (part.train_size, part.test) == (9, source.test)
    files = [part.train[i]["image"] for i in range(9)]
    assert len(set(files)) == 9
    assert set(files) < {r["image"] for r in source.train}
    assert files == [streams.limited(source, 9).train[i]["image"] for i in range(9)]
    assert streams.limited(source, 0) is streams.limited(source, 10**6) is source
    # Held out first, so that the size of what is trained on does not change what is measured.
    both = streams.limited(streams.hold_out(source, 0.2), 9)
    assert np.array_equal(both.test.indices, streams.hold_out(source, 0.2).test.indices)
    assert not {both.train[i]["image"] for i in range(9)} & {r["image"] for r in map(
        both.test.__getitem__, range(len(both.test)))}  # fmt: skip


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="must be one of imagenet2012, tiny_imagenet10"):
        streams.load("imagenet")
    with pytest.raises(DataError, match="tiny_imagenet10 in"):
        streams.load("tiny_imagenet10", str(tmp_path))


needs_prepared = pytest.mark.skipif(
    not os.environ.get("TFDS_DATA_DIR"), reason="TFDS_DATA_DIR is not set"
)


@needs_prepared
@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [("tiny_imagenet10", (5000, 500, 64), 10), ("imagenet_sample1k", (1000, 1000, 64), 1000)],
)
def test_prepared_samples_are_opened_and_decoded(name, sizes, classes):
    try:
        source = streams.load(name)
    except DataError:
        pytest.skip(f"{name} is not prepared in TFDS_DATA_DIR")
    assert (source.train_size, len(source.test), source.image_size) == sizes
    assert source.classes == classes
    first = decoding.train_dataset(source, Reading(), SEED, 0, 32)[0]
    assert 40 < first["image"].mean() < 200
    assert len(set(first["label"].tolist())) > 5
    assert functools.reduce(max, first["label"].tolist()) < classes


def shared_memory():
    folder = Path("/dev/shm")
    return {file.name for file in folder.iterdir()} if folder.exists() else set()


@pytest.mark.slow
def test_workers_and_their_memory_end_with_a_process_that_is_killed():
    before = shared_memory()
    reader = subprocess.Popen(
        [sys.executable, Path(__file__).parent / "reading_in_workers.py"],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    assert len(workers) == 2
    reader.kill()
    reader.communicate()

    def alive(pid):
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"

    deadline = time.monotonic() + 60
    while any(map(alive, workers)) or shared_memory() - before:
        assert time.monotonic() < deadline, (workers, shared_memory() - before)
        time.sleep(0.1)
