"""Which stage has which arrays of a training state."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from ssa_jax.methods import Method
from ssa_jax.training import unitwise
from ssa_jax.types import Batch, TrainState

Tree = Any
# Numbers of leaves of each stage, among all leaves of a part of the state.
Numbers = tuple[tuple[int, ...], ...]


class Owners(NamedTuple):
    """The leaves of each part of a `TrainState` by stage.

    Attributes:
      params, mstate, feedback, opt_state: of every stage, the numbers of its leaves in their
        tree's order; of the optimiser those of `unitwise.states`, what stages share in each.
      common: leaves of the feedback that are no unit's own, such as examples.
    """

    params: Numbers
    mstate: Numbers
    feedback: Numbers
    opt_state: Numbers
    common: tuple[int, ...]


def owners(
    method: Method, optimizer: Any, groups: Sequence[Sequence[int]], shapes: TrainState,
    batch: Batch, outputs: Any,
) -> Owners:  # fmt: skip
    """Finds the owners of all arrays of a state.

    Args:
      method: with signals of the error, or of readouts.
      optimizer: a chain that treats units alone.
      groups: the units of each stage.
      shapes: of the state.
      batch: shapes of a batch.
      outputs: shape of its outputs.

    Raises:
      ValueError: the feedback of a unit is made of what several stages have.
    """
    places = {path: k for k, path in enumerate(unitwise.by_path(shapes.opt_state))}
    states = unitwise.states(optimizer, shapes.params, groups)
    feedback, common = _of_feedback(method, groups, shapes, batch, outputs)
    return Owners(
        _of_units(shapes.params, groups),
        _of_units(shapes.mstate, groups),
        feedback,
        tuple(tuple(places[path] for path in unitwise.by_path(state)) for state in states),
        common,
    )


def _numbered(tree: Tree) -> Tree:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))


def _of_units(trees: Sequence[Tree], groups: Sequence[Sequence[int]]) -> Numbers:
    numbers = _numbered(tuple(trees))
    return tuple(tuple(jax.tree.leaves([numbers[i] for i in group])) for group in groups)


def _of_feedback(
    method: Method, groups: Sequence[Sequence[int]], shapes: TrainState, batch: Batch, outputs: Any
) -> tuple[Numbers, tuple[int, ...]]:
    stage_of = {i: s for s, group in enumerate(groups) for i in group}
    read, made = _read(method, shapes, batch, outputs), _made_from(method, shapes, batch)
    units = [read.get(k, set()) | of_units for k, (_, of_units) in enumerate(made)]
    stages = [{stage_of[i] for i in of_leaf} for of_leaf in units]
    for k, (leaves, _) in enumerate(made):
        # What no stage has all have, as it was before the step.
        elsewhere = set().union(*(stages[j] for j in leaves)) - stages[k]
        if len(stages[k]) > 1 or elsewhere:
            raise ValueError(
                "an array of the feedback is made of what several stages have; give --stages=1, "
                "or a method whose feedback is each unit's own"
            )
    mine = tuple(
        tuple(k for k, owner in enumerate(stages) if s in owner) for s in range(len(groups))
    )
    return mine, tuple(k for k, owner in enumerate(stages) if not owner)


def _read(method: Method, shapes: TrainState, batch: Batch, outputs: Any) -> dict[int, set[int]]:
    """By leaf of the feedback, the units that read it for their signal or have it for a twin."""
    numbers, found = _numbered(shapes.feedback), dict[int, set[int]]()
    hidden = range(len(shapes.params) - 1)
    read: dict[int, Sequence[int]] = {i: [] for i in range(len(shapes.params))}
    twins = method.twins(numbers)
    if twins is not None:
        read = {i: jax.tree.leaves(twin) for i, twin in enumerate(twins)}
    for i in hidden:
        read[i] = [*read[i], *_of_signal(method, shapes, batch, outputs, i)]
    for i, leaves in read.items():
        for k in leaves:
            found.setdefault(k, set()).add(i)
    return found


def _of_signal(method: Method, shapes: TrainState, batch: Batch, outputs: Any, i: int) -> list[int]:
    """Leaves of the feedback that the signal of hidden unit i is made of."""
    if method.readouts is not None:
        return jax.tree.leaves(method.readouts.of(_numbered(shapes.feedback))[i])
    assert method.direct is not None
    direct = method.direct
    (used,) = dependencies(
        lambda feedback, error, batch: direct(feedback, error, batch, i),
        shapes.feedback, outputs, batch,
    )  # fmt: skip
    return [k for k in used if k < len(jax.tree.leaves(shapes.feedback))]


def _made_from(method: Method, shapes: TrainState, batch: Batch) -> list[tuple[set[int], set[int]]]:
    """Of the new value of every leaf of the feedback what it is made of.

    That is leaves of the feedback, and units by their parameters or readouts.
    """
    size = len(jax.tree.leaves(shapes.feedback))
    readouts = method.readouts
    sources = shapes.params if readouts is None else readouts.of(shapes.feedback)
    unit_of = [i for i, tree in enumerate(sources) for _ in jax.tree.leaves(tree)]

    def update(feedback: Tree, sources: Tree, batch: Batch) -> Tree:
        return advance(method, feedback, sources, sources, sources, batch)

    made = dependencies(update, shapes.feedback, tuple(sources), batch)
    return [
        (
            {v for v in used if v < size},
            {unit_of[v - size] for v in used if size <= v < size + len(unit_of)},
        )
        for used in made
    ]


def advance(
    method: Method, feedback: Tree, before: Tree, after: Tree, readouts: Tree, batch: Batch
) -> Tree:
    """The feedback after a step.

    Args:
      method: whose it is.
      feedback: before the step.
      before, after: parameters.
      readouts: gradients of the readouts, of a method that has some.
      batch: of the step.
    """
    if method.readouts is not None:
        return method.readouts.update(feedback, readouts)
    # What a method with direct signals does not read.
    tape: Any = None
    return method.update(feedback, before, after, tape, batch)


# Programs within a program, whose results are each made of some of the arguments.
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call")


def dependencies(fn: Callable[..., Tree], *args: Tree) -> list[set[int]]:
    """For every result of a function the numbers of the arrays that it is made of."""
    return _made_of(jax.make_jaxpr(fn)(*args).jaxpr)


def _made_of(jaxpr: Any) -> list[set[int]]:
    known: dict[Any, set[int]] = {v: {k} for k, v in enumerate(jaxpr.invars)}

    def of(v: Any) -> set[int]:
        return set() if hasattr(v, "val") else known.get(v, set())

    for eqn in jaxpr.eqns:
        made = [set().union(*map(of, eqn.invars))] * len(eqn.outvars)
        if eqn.primitive.name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            uses = _made_of(inner.jaxpr)
            made = [set().union(*(of(eqn.invars[k]) for k in used)) for used in uses]
        known |= dict(zip(eqn.outvars, made, strict=True))
    return [of(v) for v in jaxpr.outvars]
