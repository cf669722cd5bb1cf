"""Data sets, augmentation, order; missing and damaged data."""

import importlib.util
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssa_jax import data
from ssa_jax.data import Dataset, decoded, tfds
from ssa_jax.errors import DataError

PREPARED = os.environ.get("TFDS_DATA_DIR")


def small(n_test=7):
    rng = np.random.default_rng(0)

    def images(n):
        return rng.integers(0, 256, (n, 4, 5, 2), dtype=np.uint8)

    return Dataset(images(20), np.arange(20, dtype=np.int32) % 3, images(n_test),
                   np.arange(n_test, dtype=np.int32) % 3, 3, 1, True)  # fmt: skip


def test_digits_are_read_whole_and_split_apart():
    digits = data.load("digits")
    assert digits.image_shape == (8, 8, 1)
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.max() == 255
    train = {x.tobytes() for x in digits.train_images}
    assert sum(x.tobytes() in train for x in digits.test_images) < 5
    assert np.array_equal(digits.test_labels, data.load("digits").test_labels)


def test_moments_are_exact():
    images = small().train_images
    mean, std = data.channel_moments(images)
    assert np.allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    assert np.allclose(std, images.std((0, 1, 2)), rtol=1e-5)


def test_training_images_are_normalised():
    loader = data.make_loader(small())
    batch = loader.fixed_batch(np.arange(20))
    assert jnp.allclose(batch.images.mean((0, 1, 2)), 0, atol=1e-5)
    assert jnp.allclose(batch.images.std((0, 1, 2)), 1, atol=1e-5)


def test_order_is_a_permutation_of_seed_and_epoch():
    key = jax.random.key(3)
    first = data.epoch_order(key, 0, 50)
    assert sorted(first.tolist()) == list(range(50))
    assert jnp.array_equal(first, data.epoch_order(key, 0, 50))
    assert not jnp.array_equal(first, data.epoch_order(key, 1, 50))
    assert not jnp.array_equal(first, data.epoch_order(jax.random.key(4), 0, 50))


def test_augmentation_is_a_shift_with_zeros_or_its_mirror():
    images = jnp.arange(1.0, 2 * 4 * 5 * 1 + 1).reshape(2, 4, 5, 1)
    padded = np.pad(np.asarray(images), ((0, 0), (1, 1), (1, 1), (0, 0)))
    seen = set()
    for seed in range(60):
        out = np.asarray(data.shift_and_flip(jax.random.key(seed), images, 1, True))
        for i in range(2):
            windows = {
                (r, c, flip): padded[i, r : r + 4, c : c + 5][:, :: -1 if flip else 1]
                for r in range(3) for c in range(3) for flip in (False, True)
            }  # fmt: skip
            matches = [k for k, w in windows.items() if np.array_equal(w, out[i])]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) == 18


def test_no_augmentation_changes_nothing():
    images = jax.random.normal(jax.random.key(0), (3, 4, 5, 2))
    assert jnp.array_equal(data.shift_and_flip(jax.random.key(1), images, 0, False), images)


def test_test_batches_hold_every_example_once():
    loader = data.make_loader(small(), eval_batch_size=3)
    labels = np.concatenate([np.asarray(b.labels) for b in loader.test_batches()])
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0, -1, -1]


def test_unknown_name_lists_the_known():
    with pytest.raises(DataError, match=r"must be one of cifar10, .*digits, got 'cifar11'"):
        data.load("cifar11")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="it would download the data"
)
def test_missing_data_names_the_two_ways_out(tmp_path):
    with pytest.raises(DataError, match=r"ssa_jax\[prepare\].*--data_dir.*TFDS_DATA_DIR"):
        data.load("cifar10", str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"train_images": np.zeros((20, 4, 5, 2), np.float32)},
        {"train_images": np.zeros((20, 4, 5), np.uint8)},
        {"train_labels": np.zeros(19, np.int32)},
        {"test_labels": np.full(7, 3, np.int32)},
        {"test_labels": np.full(7, -1, np.int32)},
        {"test_images": np.zeros((0, 4, 5, 2), np.uint8), "test_labels": np.zeros(0, np.int32)},
    ],
    ids=["dtype", "rank", "count", "label too large", "negative label", "empty"],
)
def test_data_that_is_not_what_it_says_is_refused(change, monkeypatch):
    monkeypatch.setitem(data.DATASETS, "digits", lambda _: small()._replace(**change))
    with pytest.raises(DataError, match="digits"):
        data.load("digits")


def test_a_wrong_label_is_named_by_its_record(monkeypatch):
    labels = np.arange(20, dtype=np.int32) % 3
    labels[[7, 11]] = 3, -1
    monkeypatch.setitem(data.DATASETS, "digits", lambda _: small()._replace(train_labels=labels))
    with pytest.raises(DataError, match=r"digits train: record 7 has label 3, outside \[0, 3\)"):
        data.load("digits")


class Records:
    """A prepared data set, one record of which cannot be used."""

    data_dir = "there"

    def __init__(self, spoilt):
        self.spoilt = spoilt

    def as_data_source(self, split):
        del split
        return self

    def __len__(self):
        return 5

    def __getitem__(self, i):
        whole = {"image": np.zeros((4, 4, 1), np.uint8), "label": i}
        return self.spoilt(whole) if i == 3 else whole


def undecodable(_):
    raise ValueError("cannot identify image file")


@pytest.mark.parametrize(
    "spoilt",
    [undecodable, lambda x: {"image": x["image"]}, lambda x: {**x, "image": x["image"][:2]}],
    ids=["not decoded", "no label", "another shape"],
)
def test_a_corrupt_record_is_named_by_its_index(spoilt):
    with pytest.raises(DataError, match="mnist train in there: record 3 is corrupt: "):
        tfds._read_split(Records(spoilt), "mnist", "train")


def test_a_split_is_decoded_once_until_its_files_change(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / "records").write_bytes(b"one")
    read = []

    def split():
        read.append(1)
        images = np.full((decoded.LEAST, 2, 2, 1), len(read), np.uint8)
        return images, np.arange(decoded.LEAST, dtype=np.int32)

    first, again = (decoded.kept(prepared, "train", split) for _ in range(2))
    assert len(read) == 1
    assert all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(first, again, strict=True)
    )
    assert decoded.kept(prepared, "test", split)[0].max() == 2
    (prepared / "records").write_bytes(b"other")
    assert decoded.kept(prepared, "train", split)[0].max() == 3
    # One that is damaged is read anew, and so is all where nothing can be kept.
    for file in (tmp_path / "cache").rglob("*.npz"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    assert decoded.kept(prepared, "train", split)[0].max() == 4
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    assert decoded.kept(prepared, "train", split)[0].max() == 5


def test_few_records_are_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    few = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32)
    decoded.kept(tmp_path, "train", lambda: few)
    assert not (tmp_path / "cache").exists()


needs_prepared = pytest.mark.skipif(not PREPARED, reason="TFDS_DATA_DIR is not set")


def copy_of(name, folder):
    """A writable copy of a prepared data set; skips where it is not prepared."""
    source = Path(str(PREPARED)) / name
    if not source.exists():
        pytest.skip(f"{name} is not prepared in TFDS_DATA_DIR")
    shutil.copytree(source, folder / name, copy_function=shutil.copyfile)
    for path in (folder / name).rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder / name


@pytest.mark.slow
@needs_prepared
def test_a_damaged_record_is_named(tmp_path):
    files = list(copy_of("mnist", tmp_path).rglob("*train*.array_record*"))
    raw = bytearray(files[0].read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4096] = bytes(4096)
    files[0].write_bytes(raw)
    with pytest.raises(DataError, match=r"mnist train in .*: record \d+ is corrupt"):
        data.load("mnist", str(tmp_path))


@needs_prepared
@pytest.mark.slow
def test_a_file_cut_short_is_refused(tmp_path):
    files = list(copy_of("mnist", tmp_path).rglob("*test*.array_record*"))
    files[0].write_bytes(files[0].read_bytes()[:100_000])
    with pytest.raises(DataError, match="mnist test"):
        data.load("mnist", str(tmp_path))


@needs_prepared
@pytest.mark.long
def test_cifar10_is_cifar10():
    cifar = data.load("cifar10")
    assert cifar.train_images.shape == (50_000, 32, 32, 3)
    assert cifar.test_images.shape == (10_000, 32, 32, 3)
    assert (np.bincount(cifar.train_labels) == 5000).all()
    mean, std = data.channel_moments(cifar.train_images)
    assert np.allclose(mean / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    assert np.allclose(std / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_shrunk_images_are_means_of_squares_and_keep_their_range():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3), np.uint8)
    labels = np.arange(5, dtype=np.int32)
    whole = Dataset(images, labels, images[:2], labels[:2], 5, 4, True)
    small = data.shrunk(whole, 3)
    assert small.train_images.dtype == np.uint8
    assert small.image_shape == (3, 3, 3)
    assert small.crop == 2
    wanted = images[4, 2:4, 4:6].astype(float).mean((0, 1))
    assert np.abs(small.train_images[4, 1, 2] - wanted).max() <= 0.5
    assert np.array_equal(small.test_images, small.train_images[:2])
    assert np.array_equal(small.train_labels, labels)
    assert data.shrunk(whole, 6) is whole
    floats = whole._replace(train_images=images / 255.0, test_images=images[:2] / 255.0)
    assert np.allclose(data.shrunk(floats, 3).train_images[4, 1, 2], wanted / 255)


@pytest.mark.parametrize("shape", [(6, 6, 3), (8, 4, 3), (9,)])
def test_images_that_cannot_be_shrunk_are_refused(shape):
    images = np.zeros((4, *shape), np.uint8)
    labels = np.zeros(4, np.int32)
    whole = Dataset(images, labels, images, labels, 2, 0, False)
    with pytest.raises(DataError, match="cannot be shrunk to squares of 4: a divisor"):
        data.shrunk(whole, 4)
