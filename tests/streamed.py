"""Small streams of JPEG files, and what their tests share."""

import io

import numpy as np
from PIL import Image

from ssa_jax.data.streams import Stream

SIZE = 8


def jpeg(seed, width=20, height=16, quality=95):
    """A file of random colours in 4x4 patches."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches.repeat(4, 0).repeat(4, 1)).save(file, "JPEG", quality=quality)
    return file.getvalue()


def records(n, first=0, corrupt=()):
    """Files and labels i % 3; those at `corrupt` are cut short."""
    found = [{"image": jpeg(first + i), "label": i % 3} for i in range(n)]
    for i in corrupt:
        found[i]["image"] = found[i]["image"][:100]
    return found


def stream(n=23, corrupt=(), n_test=7, corrupt_test=()):
    return Stream("sample", records(n, corrupt=corrupt), records(n_test, 1000, corrupt_test),
                  3, SIZE)  # fmt: skip
