"""Compressed images as arrays of one size: decoding, random and central crops. NumPy and Pillow.

JPEG files are decoded at a half, a quarter or an eighth of their size where the crop still has
no fewer pixels than it is to get.
"""

import io
import math
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]

# Side of the central crop over the shorter side of the image it is cut from.
CENTRAL = 224 / 256
# Aspect ratios of random crops, and how often one that fits is looked for.
_NARROW, _WIDE = 3 / 4, 4 / 3
_TRIES = 10


def random_crop(data: bytes, size: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """A random part of an image, resized, every other one mirrored (Szegedy et al. 2015).

    The part has a share of the area drawn from [least, 1] and an aspect ratio drawn from
    [3/4, 4/3], uniform in its logarithm.

    Args:
      data: the file, in any format that Pillow reads.
      size: height and width of the result.
      least: in (0, 1].
      rng: draws part and mirroring.

    Returns:
      uint8 (size, size, 3).

    Raises:
      OSError, SyntaxError, ValueError: no image, or a damaged one.
    """
    image = Image.open(io.BytesIO(data))
    box = random_box(image.width, image.height, least, rng)
    mirror = rng.random() < 0.5
    part = _resized(image, size, box)
    return np.array(part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else part)


def central_crop(data: bytes, size: int) -> np.ndarray:
    """The central square of an image whose side is 224/256 of the shorter side, resized.

    Arguments, result and errors are those of `random_crop`.
    """
    image = Image.open(io.BytesIO(data))
    side = CENTRAL * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return np.array(_resized(image, size, (left, top, left + side, top + side)))


def random_box(width: int, height: int, least: float, rng: np.random.Generator) -> Box:
    """Left, upper, right and lower edge of the part that `random_crop` shows."""
    for _ in range(_TRIES):
        area = width * height * rng.uniform(least, 1)
        ratio = math.exp(rng.uniform(math.log(_NARROW), math.log(_WIDE)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(rng.integers(n + 1)) for n in (width - w, height - h))
            return left, top, left + w, top + h
    # The largest central part of a permitted ratio.
    w, h = min(width, round(height * _WIDE)), min(height, round(width / _NARROW))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _resized(image: Any, size: int, box: Box) -> Any:
    """The part of an opened image in a box, as a square image in RGB."""
    width, height = image.size
    left, top, right, bottom = box
    # Other formats than JPEG pay no heed to this.
    image.draft("RGB", (math.ceil(width * size / (right - left)),
                        math.ceil(height * size / (bottom - top))))  # fmt: skip
    x, y = image.width / width, image.height / height
    scaled = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=scaled)
