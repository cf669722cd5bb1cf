"""Decoding and crops."""

import io

import numpy as np
import pytest
from PIL import Image
from streamed import jpeg

from ssa_jax.data import images


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ramp(height, width):
    """Red grows to the right and green downwards, a value a pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return pixels


def test_the_central_crop_is_seven_eighths_of_the_shorter_side():
    pixels = ramp(64, 96)
    crop = images.central_crop(png(pixels), 56)
    assert np.array_equal(crop, pixels[4:60, 20:76])


def test_the_whole_area_is_the_whole_image_or_its_mirror():
    pixels = ramp(32, 32)
    seen = set()
    for seed in range(20):
        crop = images.random_crop(png(pixels), 32, 1.0, np.random.default_rng(seed))
        # Of the whole area only the square fits, so this is the fallback where none was drawn.
        seen |= {m for m in (False, True) if np.array_equal(crop, pixels[:, :: -1 if m else 1])}
    assert seen == {False, True}


def test_random_parts_have_the_areas_and_ratios_asked_for():
    rng = np.random.default_rng(0)
    width, height, least = 400, 300, 0.3
    boxes = np.array([images.random_box(width, height, least, rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    areas = (right - left) * (bottom - top) / (width * height)
    ratios = (right - left) / (bottom - top)
    # Sides are rounded to whole pixels.
    assert least * 0.99 < areas.min() < least + 0.05
    assert 0.9 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.8
    assert 1.25 < ratios.max() < 1.35
    assert left.std() > 20


def test_parts_of_the_fallback_keep_to_the_ratios():
    class Unfitting:
        """Draws areas that no ratio fits."""

        def uniform(self, low, high):
            return high

    assert images.random_box(400, 100, 0.5, Unfitting()) == (133, 0, 266, 100)
    assert images.random_box(100, 400, 0.5, Unfitting()) == (0, 133, 100, 266)


def test_a_jpeg_decoded_at_a_smaller_scale_is_the_same_picture():
    pixels = ramp(192, 256)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    small = images.central_crop(file.getvalue(), 24).astype(float)
    whole = images.central_crop(png(pixels), 24).astype(float)
    assert np.abs(small - whole).mean() < 2
    assert whole.std() > 10


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA"])
def test_every_mode_becomes_three_colours(mode):
    file = io.BytesIO()
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    Image.fromarray(ramp(16, 16)).convert(mode).save(file, kind)
    assert images.central_crop(file.getvalue(), 8).shape == (8, 8, 3)


@pytest.mark.parametrize("damaged", [b"", b"no image", jpeg(0)[:200]])
def test_damaged_files_raise(damaged):
    with pytest.raises((OSError, SyntaxError, ValueError)):
        images.central_crop(damaged, 8)
