"""What the devices of a mesh send each other, read off a compiled program."""

import math
import re
from typing import NamedTuple

# With its result: a shape or a tuple of shapes. What an asynchronous one starts is counted, and
# what ends it is not.
_COLLECTIVE = re.compile(
    r" = (?P<result>\([^)]*\)|\S+) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip


class Collective(NamedTuple):
    """One operation: its kind, and dtype and shape of every array that it gives a device."""

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def bytes(self) -> int:
        """Of its arrays. A ring of n devices sends 2 (n - 1) / n times that in an all-reduce."""
        return sum(_BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)


def collectives(hlo: str) -> list[Collective]:
    """Those of the text of a compiled program, each once, also where a loop repeats it.

    Args:
      hlo: as `jax.stages.Compiled.as_text` gives it.
    """
    found = []
    # Layouts may have brackets of their own, as a TPU's tiles.
    for match in _COLLECTIVE.finditer(re.sub(r"\{[^{}]*\}", "", hlo)):
        arrays = tuple(
            (m["dtype"], tuple(int(d) for d in m["dims"].split(",") if d))
            for m in _SHAPE.finditer(match["result"])
        )
        found.append(Collective(match["kind"], arrays))
    return found
