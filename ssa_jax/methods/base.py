"""The interface of a learning method: it makes teaching signals and nothing else."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ssa_jax.networks.forward import Tape, Visited, visited
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any
Direct = Callable[[Tree, Array, Any, int], Array]
# (unit i, δ_i) -> δ_{i-1}
Through = Callable[[Visited, Array], Array]


def _keep(feedback: Tree, *_: Any) -> Tree:
    return feedback


def _no_twins(feedback: Tree) -> None:
    del feedback


def _nothing(feedback: Tree) -> dict[str, Any]:
    del feedback
    return {}


class Resize(NamedTuple):
    """Of feedback whose shapes follow what is measured: looked at between epochs.

    Attributes:
      sizes: (feedback, params, mstate) -> a tree of integers that are wanted; can be jitted.
      to: (feedback, sizes) -> feedback of such shapes, to be refreshed; itself where it stays.
    """

    sizes: Callable[[Tree, Tree, Tree], Tree]
    to: Callable[[Tree, Tree], Tree]


class Readouts(NamedTuple):
    """Losses of the units' own behind readouts that learn on them (see `methods.local`).

    Attributes:
      of: feedback -> the readouts, one tree a hidden unit.
      loss: (readout, i, h_i, outputs, batch) -> ℓ_i, whose gradient by h_i is δ_i.
      update: (feedback, gradients of the readouts) -> feedback: what `Method.update` does.
    """

    of: Callable[[Tree], Sequence[Tree]]
    loss: Callable[[Tree, int, Array, Array, Any], Array]
    update: Callable[[Tree, Sequence[Tree]], Tree]


class Method(NamedTuple):
    """A learning method on one network.

    Attributes:
      init: (key, params, mstate) -> feedback, its own state, any pytree.
      signals: (feedback, params, tape, error, batch) -> one cotangent per unit output.
      update: (feedback, before, after, tape, batch) -> feedback, in every step, when the
        weights have moved from `before` (where the tape was made) to `after`.
      refresh: (feedback, params, mstate) -> feedback, every `refresh_every` steps and after a
        compaction; runs outside the step, so it may be costly.
      refresh_every: 0 for never.
      resize: for a method whose feedback changes its shapes while it trains; else None.
      twins: feedback -> parameter trees that the alignment term pulls towards, or None.
      direct: (feedback, error, batch, i) -> δ_i of hidden unit i, for a method whose signals
        need the error alone and whose update leaves the tape unread: such a method can train
        without a tape (see `train.make_step`). None for the others.
      down: (feedback, params) -> how a signal walks down through one unit, for a method whose
        signals are made so from the error, and whose update leaves the tape unread: such a method
        can train with a few units' tape at a time. None for the others.
      ahead: units that a direct signal is pulled back through exactly before it is used; those
        of `signals` are.
      readouts: for a method whose signals are gradients of losses of the units' own; else None.
      note: what a run should report of the feedback, in a few words; may be empty.
      tell: feedback -> what an epoch's row says of it, by name.
    """

    init: Callable[[Array, Tree, Tree], Tree]
    signals: Callable[[Tree, Tree, Tape, Array, Any], Sequence[Array]]
    update: Callable[[Tree, Tree, Tree, Tape, Any], Tree] = _keep
    refresh: Callable[[Tree, Tree, Tree], Tree] = _keep
    refresh_every: int = 0
    resize: Resize | None = None
    twins: Callable[[Tree], Tree | None] = _no_twins
    direct: Direct | None = None
    down: Callable[[Tree, Tree], Through] | None = None
    ahead: int = 0
    readouts: Readouts | None = None
    note: str = ""
    tell: Callable[[Tree], dict[str, Any]] = _nothing


def streams(method: Method) -> bool:
    """Whether the method can train without the tape of the whole network."""
    return method.direct is not None or method.down is not None


def all_direct(direct: Direct, units: int) -> Callable[..., Sequence[Array]]:
    """The `signals` of a direct method on n units: those of every hidden unit, and the error."""

    def signals(
        feedback: Tree, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        del params, tape
        return (*(direct(feedback, error, batch, i) for i in range(units - 1)), error)

    return signals


def all_down(steps: Sequence[Callable[[Array], Array]], error: Array) -> list[Array]:
    """The signals of all units: δ_n = e, δ_{i-1} = step_i(δ_i), a step for all but the first."""
    deltas = [error]
    for step in reversed(steps):
        deltas.insert(0, step(deltas[0]))
    return deltas


def walking(
    init: Callable[[Array, Tree, Tree], Tree], down: Callable[[Tree, Tree], Through]
) -> Method:
    """The method whose error walks down from unit to unit, see `all_down`."""

    def signals(feedback: Tree, params: Tree, tape: Tape, error: Array, batch: Any) -> list[Array]:
        del batch
        through = down(feedback, params)
        above = visited(tape, params)[1:]
        return all_down([functools.partial(through, unit) for unit in above], error)

    return Method(init=init, signals=signals, down=down)


def one_hot(labels: Array, outputs: Array) -> Array:
    """Labels (batch,) as rows of the shape of the outputs (batch, classes)."""
    return jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)


def softmax_error(outputs: Array, labels: Array) -> Array:
    """The gradient of the mean softmax cross-entropy by the outputs, (batch, classes)."""
    return (jax.nn.softmax(outputs) - one_hot(labels, outputs)) / len(outputs)


def newest(examples: Tree, batch: Any) -> Tree:
    """The first of a batch's images, or of images and labels, in place of as many of before."""
    seen = (batch.images, batch.labels)[: len(examples)]

    # By their numbers: rows of a slice that lie on other devices would be sent one by one, what is
    # gathered is part of the sum over the devices that a step makes anyway.
    def first(x: Array, old: Array) -> Array:
        return jnp.take(x, jnp.arange(len(old)), axis=0)

    return jax.tree.map(first, seen, examples)


class Network(NamedTuple):
    """What a method may know of its network when it is made.

    Attributes:
      units: the units.
      shapes: output shape of each unit for one example, the last one (classes,).
      inputs: a few of the training inputs, for what is measured on some before the first step.
      encode: (targets, outputs) -> targets in the outputs' shape, for methods that send those.
      targets: of these inputs, for methods that need their errors; None where there are none.
      error: (outputs, targets) -> e, the gradient of the mean loss by the outputs.
    """

    units: Sequence[Unit]
    shapes: Sequence[tuple[int, ...]]
    inputs: Tree
    encode: Callable[[Array, Array], Array] = one_hot
    targets: Tree = None
    error: Callable[[Array, Array], Array] = softmax_error


class FeedbackOptions(NamedTuple):
    """How the feedback of a method is built and moved; each method reads what concerns it.

    Attributes:
      path: ``"composed"``, ``"regression"``, ``"sequential"`` or ``"random"`` (see `methods.ssa`).
      update: ``"fixed"``, ``"mutual"`` or ``"tracked"``.
      every: steps between refreshes of tracked twins and of composed paths.
      rate: the twins' own rate under ``"mutual"``, kp's decay of the difference, and how far the
        paths of grape turn in a step.
      form: form of direct paths, a name in `feedback.FORMS`.
      limit: bytes that full paths may take under the form ``"auto"``.
      lookahead: units that a direct signal of ssa is pulled back through exactly.
      rank: share of each layer's singular directions that a sequential walk goes through.
      basis: which, ``"spectrum"`` or ``"error"`` (see `methods.walk`).
      energy: share of the error's energy that passes a layer; 1: `rank` alone says how much.
      readout: ``"pred"``, ``"sim"`` or ``"predsim"`` (see `methods.local`).
      readout_update: ``"learned"`` or ``"fixed"``.
      readout_rate: Adam's rate of learned readouts.
      aux_depth: most layers of an auxiliary network (see `methods.auglocal`).
    """

    path: str = "composed"
    update: str = "tracked"
    every: int = 10
    rate: float = 0.01
    form: str = "auto"
    limit: int = 256 * 2**20
    lookahead: int = 0
    rank: float = 1.0
    basis: str = "spectrum"
    energy: float = 1.0
    readout: str = "predsim"
    readout_update: str = "learned"
    readout_rate: float = 2e-3
    aux_depth: int = 3


def require_choice(flag: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError unless the value of a setting is one of its choices."""
    if value not in choices:
        raise ValueError(f"{flag} must be one of {', '.join(choices)}, got {value!r}")
