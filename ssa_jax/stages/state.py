"""A training state in parts, the part of a stage on the devices of that stage."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssa_jax.parallel import buffers
from ssa_jax.parallel.buffers import Buffers, Sizes
from ssa_jax.parallel.mesh import STAGE
from ssa_jax.stages.owners import Numbers, Owners
from ssa_jax.types import TrainState

Array = jax.Array
Tree = Any

PARTS = ("params", "mstate", "feedback", "opt_state")


class Shapes(NamedTuple):
    """Structure, shapes and dtypes of a `TrainState`, as a static fact of a program."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    def tree(self) -> TrainState:
        """The state that these are of, with a `jax.ShapeDtypeStruct` for every array."""
        of = (jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.leaves)
        state: TrainState = jax.tree.unflatten(self.structure, of)
        return state


def shapes_of(state: TrainState) -> Shapes:
    """Those of a state of arrays or of their shapes."""
    leaves, structure = jax.tree.flatten(state)
    return Shapes(structure, tuple((x.shape, x.dtype) for x in leaves))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "key", "parts", "common"],
    meta_fields=["shapes"],
)
@dataclasses.dataclass(frozen=True)
class StagedState:
    """A `TrainState` of which every stage has its own part.

    Attributes:
      step, key: as in `TrainState`, on every device.
      parts: by name in `PARTS`, of each dtype one buffer (stages, n), spread over the stages.
      common: leaves of the feedback that are no unit's own, on every device.
      shapes: of the whole state.
    """

    step: Array
    key: Array
    parts: dict[str, Buffers]
    common: tuple[Array, ...]
    shapes: Shapes


class Part(NamedTuple):
    """One part of a state: its leaves in order, and which of them each stage has.

    Attributes:
      structure: of its tree.
      leaves: shapes and dtypes.
      numbers: of the leaves of each stage.
      sizes: of a stage's buffers.
    """

    structure: Any
    leaves: Sequence[Any]
    numbers: Numbers
    sizes: Sizes

    def shapes(self, stage: int) -> list[Any]:
        """Of the leaves of a stage."""
        return [self.leaves[k] for k in self.numbers[stage]]

    def tree(self, stage: int, own: Buffers, common: Sequence[tuple[int, Array]] = ()) -> Tree:
        """The whole tree as a stage sees it: zeros for what is not there."""
        known = dict(zip(self.numbers[stage], buffers.unpack(own, self.shapes(stage)), strict=True))
        known |= common
        return jax.tree.unflatten(self.structure, self._all(known))

    def pack(self, stage: int, tree: Tree) -> Buffers:
        """The leaves of a stage out of a whole tree."""
        leaves = jax.tree.leaves(tree)
        return buffers.pack([leaves[k] for k in self.numbers[stage]], self.sizes)

    def of_all(self, whole: Tree) -> Buffers:
        """The buffers of all stages (stages, n) of a whole tree."""
        each = [self.pack(stage, whole) for stage in range(len(self.numbers))]
        return {name: jnp.stack([own[name] for own in each]) for name in self.sizes}

    def whole(self, parts: Buffers, common: Iterable[tuple[int, Array]] = ()) -> Tree:
        """The tree that `of_all` was made of."""
        known = dict(common)
        for stage, numbers in enumerate(self.numbers):
            own = {name: x[stage] for name, x in parts.items()}
            known |= zip(numbers, buffers.unpack(own, self.shapes(stage)), strict=True)
        return jax.tree.unflatten(self.structure, [known[k] for k in range(len(self.leaves))])

    def _all(self, known: dict[int, Array]) -> list[Array]:
        return [known[k] if k in known else zeros(x) for k, x in enumerate(self.leaves)]


def zeros(shape: Any) -> Array:
    """Of a shape and dtype; of a typed PRNG key any one."""
    if jax.dtypes.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), shape.shape)
    return jnp.zeros(shape.shape, shape.dtype)


def parts_of(shapes: Shapes, owners: Owners) -> dict[str, Part]:
    """How each part of a state of these shapes is divided."""
    state, found = shapes.tree(), {}
    for name in PARTS:
        leaves, structure = jax.tree.flatten(getattr(state, name))
        numbers: Numbers = getattr(owners, name)
        sizes = buffers.sizes([[leaves[k] for k in own] for own in numbers])
        found[name] = Part(structure, leaves, numbers, sizes)
    return found


def divided(state: TrainState, owners: Owners, mesh: Mesh) -> StagedState:
    """Inside a jitted program: a state, whole on every device, in parts."""
    shapes = shapes_of(state)
    parts = parts_of(shapes, owners)
    of_all = {name: part.of_all(getattr(state, name)) for name, part in parts.items()}
    leaves = jax.tree.leaves(state.feedback)
    common = tuple(leaves[k] for k in owners.common)
    return placed(StagedState(state.step, state.key, of_all, common, shapes), mesh)


def whole(staged: StagedState, owners: Owners) -> TrainState:
    """Inside a jitted program: the state that was divided."""
    parts = parts_of(staged.shapes, owners)
    common = tuple(zip(owners.common, staged.common, strict=True))
    trees = {
        name: part.whole(staged.parts[name], common if name == "feedback" else ())
        for name, part in parts.items()
    }
    return TrainState(step=staged.step, key=staged.key, **trees)


def placed(staged: StagedState, mesh: Mesh) -> StagedState:
    """Inside a jitted program: the state where it belongs."""
    return jax.lax.with_sharding_constraint(staged, shardings(staged, mesh))


def shardings(staged: StagedState, mesh: Mesh) -> StagedState:
    """Where its arrays belong: buffers over the stages, everything else on every device."""
    everywhere, spread = NamedSharding(mesh, P()), NamedSharding(mesh, P(STAGE))
    of_all: StagedState = jax.tree.map(lambda _: everywhere, staged)
    return dataclasses.replace(of_all, parts=jax.tree.map(lambda _: spread, staged.parts))
