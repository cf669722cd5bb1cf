"""A model of any kind as units: its program is traced, and taken apart at the cuts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax.factors import WithFeedback, is_factors, path_name
from ssa_jax.factors.linalg import platform_of_trace
from ssa_jax.networks.cut import CutError, Flat
from ssa_jax.networks.packing import Packing
from ssa_jax.networks.program import Program, Segment
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any
Entries = dict[str, Any]


class Traced:
    """A network as pure functions, and its programs by the shapes of what they are given.

    Args:
      apply: (params, mstate, x, *, train) -> (outputs, new mstate) of the whole model.
      params: its parameters, a pytree with `Factors` or arrays.
      mstate: the rest of its state, a pytree of arrays.
      x: an input of it, a pytree of arrays or of their shapes, whose first axis is the batch.

    Attributes:
      units: one a cut, and one for what follows the last.
      params: of each unit, by path in the model. What units share, each has a copy of.
      mstate: the same of the state.

    Raises:
      CutError: the model has no cut, or cannot be taken apart at them.
    """

    def __init__(
        self, apply: Callable[..., tuple[Tree, Tree]], params: Tree, mstate: Tree, x: Tree
    ):
        self._apply = apply
        self._trees = _structure(params), _structure(mstate)
        entries = _entries(params), _entries(mstate)
        self._shapes, self._state_shapes = map(_shapes, entries)
        self._x = _shapes(x)
        self._programs: dict[Any, _Typed] = {}
        names = [self._program(*self._shapes_of_all, self._x, t).names for t in (True, False)]
        if len(names[0]) != len(names[1]):
            raise CutError("the model has other cuts in training than in evaluation")
        # What a unit reads in training or in evaluation; what none reads is kept by the first.
        own = [[a | b for a, b in zip(*unit, strict=True)] for unit in zip(*names, strict=True)]
        for k, given in enumerate(entries):
            own[0][k] |= given.keys() - set().union(*(unit[k] for unit in own))
        self.params, self.mstate = (
            tuple({n: v for n, v in given.items() if n in unit[k]} for unit in own)
            for k, given in enumerate(entries)
        )
        uses = [n for unit in self.params for n in unit]
        self.shared = frozenset(n for n in uses if uses.count(n) > 1)
        self.units = tuple(self._unit(i) for i in range(len(own)))

    @property
    def _shapes_of_all(self) -> tuple[Entries, Entries]:
        return self._shapes, self._state_shapes

    def whole(self, params: Sequence[Entries], mstate: Sequence[Entries]) -> tuple[Tree, Tree]:
        """The model's own trees of parameters and state, from those of its units."""
        joined = [{n: v for unit in x for n, v in unit.items()} for x in (params, mstate)]
        return self._trees[0].build(joined[0]), self._trees[1].build(joined[1])

    def _unit(self, i: int) -> Unit:
        def apply(
            params: Entries, mstate: Entries, x: Tree, *, train: bool
        ) -> tuple[Array, Entries]:
            return self._typed(i, params, mstate, x, train).run(i, params, mstate, x)

        def walk(params: Entries, twins: Entries, mstate: Entries, x: Tree) -> Array:
            given = _with_feedback(params, twins)
            maps = {n: x for n, x in twins.items() if given[n] is params[n]}
            return self._typed(i, given, mstate, x, True).run(i, given, mstate, x, maps)[0]

        def expect(params: Entries, twins: Entries | None = None) -> None:
            self._shapes |= _shapes(_with_feedback(params, twins or {}))

        return Unit(apply, walk, expect, self.shared.intersection(self.params[i]))

    def _typed(self, i: int, params: Entries, mstate: Entries, x: Tree, train: bool) -> "_Typed":
        """The program at the shapes of unit i; the others are given its precision."""
        arrays = jax.tree.leaves(x)
        floats = [a.dtype for a in jax.tree.leaves(params) if _is_float(a.dtype)]
        floats += [a.dtype for a in arrays if _is_float(a.dtype) and i]
        dtype = jnp.result_type(*floats) if floats else jnp.dtype(jnp.float32)
        in_dtype = functools.partial(_cast, dtype=dtype)
        shapes = jax.tree.map(in_dtype, self._shapes) | _shapes(params)
        # Statistics are never of less precision than what they are of, and at least as they were.
        state = jax.tree.map(
            lambda s: _cast(s, jnp.promote_types(s.dtype, dtype)) if _is_float(s.dtype) else s,
            self._state_shapes,
        ) | _shapes(mstate)
        batch = len(arrays[0])
        full = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), in_dtype(a).dtype), self._x
        )
        return self._program(shapes, state, full if i else _shapes(x), train)

    def _program(self, params: Entries, mstate: Entries, x: Tree, train: bool) -> "_Typed":
        leaves, tree = jax.tree.flatten((params, mstate, x))
        # Layers may be traced otherwise on a mesh, with another precision of products, or for
        # another platform.
        precision = jax.config.values["jax_default_matmul_precision"]
        around = jax.sharding.get_abstract_mesh(), precision, platform_of_trace()
        key = (train, around, tree, tuple((a.shape, a.dtype) for a in leaves))
        if key not in self._programs:
            traced = self._trace(params, mstate, x, train)
            self._programs[key] = _Typed(traced, params, mstate, x)
        return self._programs[key]

    def _trace(self, params: Entries, mstate: Entries, x: Tree, train: bool) -> Any:
        def apply(params: Entries, mstate: Entries, x: Tree) -> tuple[Tree, list[Any]]:
            given = self._trees[0].build(params), self._trees[1].build(mstate)
            y, new = self._apply(*given, x, train=train)
            new = _entries(new)
            return y, [new[n] for n in sorted(mstate)]

        return jax.make_jaxpr(apply, return_shape=True)(params, mstate, x)


class _Typed:
    """The segments of a network at certain shapes, and which names their numbers stand for."""

    def __init__(self, traced: Any, params: Entries, mstate: Entries, x: Tree):
        closed, (outputs, _) = traced
        flat = Flat(closed)
        numbers = jax.tree.unflatten(
            jax.tree.structure((params, mstate, x)), list(range(flat.inputs))
        )
        self._numbers: tuple[Entries, Entries] = numbers[0], numbers[1]
        self._outputs = jax.tree.structure(outputs)
        self._state_names = sorted(mstate)
        sizes = [len(jax.tree.leaves(part)) for part in (params, mstate, outputs)]
        self.program = Program(flat, sizes[0], sizes[1], sizes[2])
        batch = len(jax.tree.leaves(x)[0])
        self._packings = [
            Packing([flat.avals[v] for v in segment.inputs], batch, mark.where)
            for segment, mark in zip(self.program.segments[1:], flat.cuts, strict=True)
        ]

    @property
    def names(self) -> list[list[set[str]]]:
        """Parameters and state of each unit."""

        def read(segment: Segment, numbers: Entries) -> set[str]:
            return {n for n, v in numbers.items() if segment.reads.intersection(jax.tree.leaves(v))}

        return [[read(s, numbers) for numbers in self._numbers] for s in self.program.segments]

    def run(
        self, i: int, params: Entries, mstate: Entries, x: Tree, twins: Entries | None = None
    ) -> tuple[Tree, Entries]:
        """What unit i makes of x, and its new state; see `Program.run` for the twins."""
        segment = self.program.segments[i]
        inputs = self._packings[i - 1].unpack(x) if i else jax.tree.leaves(x)
        known = dict(zip(segment.inputs, inputs, strict=True))
        for numbers, values in zip(self._numbers, (params, mstate), strict=True):
            known |= _by_number({n: numbers[n] for n in values}, values)
        maps = {n: v for n, v in (twins or {}).items() if _is_map(params[n])}
        swapped = _by_number({n: self._numbers[0][n] for n in maps}, maps)
        outputs, written = self.program.run(i, known, swapped)
        names = self._state_names
        new = mstate | {names[k]: v for k, v in written.items() if names[k] in mstate}
        if i == len(self._packings):
            return jax.tree.unflatten(self._outputs, outputs), new
        return self._packings[i].pack(outputs), new


def _with_feedback(params: Entries, twins: Entries) -> Entries:
    """The parameters; factors whose twin says what passes them in one value with it.

    Their layer has to pass the error back as a whole. A twin of the weights' own shapes may stand
    in for each of its arrays, wherever the model uses them.
    """
    return {
        n: WithFeedback(p, twins[n])
        if is_factors(p) and n in twins and not is_factors(twins[n])
        else p
        for n, p in params.items()
    }


class _Structure(NamedTuple):
    """How a tree is built from its entries by path."""

    tree: Any
    names: Sequence[str]

    def build(self, entries: Entries) -> Tree:
        return jax.tree.unflatten(self.tree, [entries[n] for n in self.names])


def _structure(tree: Tree) -> _Structure:
    return _Structure(jax.tree.structure(tree, is_leaf=is_factors), list(_entries(tree)))


def _entries(tree: Tree) -> Entries:
    """`Factors` and other arrays of a tree by their path."""
    named = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_factors)
    return {path_name(path): x for path, x in named}


def _by_number(numbers: Tree, values: Tree) -> dict[int, Any]:
    return dict(zip(jax.tree.leaves(numbers), jax.tree.leaves(values), strict=True))


def _is_map(value: Any) -> bool:
    """Whether a parameter is part of a linear map, and no bias or scale of a norm."""
    return is_factors(value) or value.ndim > 1


def _is_float(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), a.dtype), tree)


def _cast(shape: Any, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape.shape, dtype) if _is_float(shape.dtype) else shape
