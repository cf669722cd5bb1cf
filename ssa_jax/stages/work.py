"""What a stage does with its units: passes, gradients, its update."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ssa_jax.methods import Method
from ssa_jax.networks.forward import after, visit
from ssa_jax.networks.units import Unit
from ssa_jax.parallel import buffers
from ssa_jax.parallel.buffers import Buffers
from ssa_jax.parallel.mesh import STAGE
from ssa_jax.stages.state import Part
from ssa_jax.training import losses, tasks
from ssa_jax.training.losses import LossWeights
from ssa_jax.types import Batch

Array = jax.Array
Tree = Any
Common = Sequence[tuple[int, Array]]


class Network(NamedTuple):
    """All that the stages of a step are made of.

    Attributes:
      units: all units.
      method: makes the signals.
      optimizer: treats units alone.
      weights: of the local loss.
      groups: numbers of the units of each stage.
      parts: how the state is divided.
      shapes: of the inputs of each unit for one micro-batch, and of the outputs.
    """

    units: Sequence[Unit]
    method: Method
    optimizer: Any
    weights: LossWeights
    groups: Sequence[range]
    parts: dict[str, Part]
    shapes: Sequence[Any]

    @property
    def outputs(self) -> Any:
        """Shape and dtype of the outputs of a micro-batch."""
        return self.shapes[-1]

    def view(self, s: int, **own: Buffers) -> list[Tree]:
        """Parts of the state, by name in this order, as stage s sees them."""
        return [self.parts[name].tree(s, part) for name, part in own.items()]

    def boundary(self) -> Any:
        """Shape and dtype of what goes from stage to stage: rows as long as the longest."""
        crossing = [self.shapes[group[0]] for group in self.groups[1:]]
        dtype = jnp.result_type(*(x.dtype for x in crossing)) if crossing else jnp.float32
        width = max((x.size // x.shape[0] for x in crossing), default=0)
        return jax.ShapeDtypeStruct((self.outputs.shape[0], width), dtype)


def stage_input(net: Network, s: int, images: Tree, x: Array) -> Tree:
    """The input of the first unit of stage s: a micro-batch of images, or what came from below."""
    if s == 0:
        return images
    shape = net.shapes[net.groups[s][0]]
    width = shape.size // shape.shape[0]
    return x[:, :width].reshape(shape.shape).astype(shape.dtype)


def boundary_out(net: Network, s: int, h: Array) -> tuple[Array, Array]:
    """What the output h of stage s is to the stage above, and as outputs: zeros but of the last."""
    boundary = net.boundary()
    if s == len(net.groups) - 1:
        return jnp.zeros(boundary.shape, boundary.dtype), h
    flat = h.reshape(len(h), -1).astype(boundary.dtype)
    flat = jnp.pad(flat, ((0, 0), (0, boundary.shape[1] - flat.shape[1])))
    return flat, jnp.zeros(net.outputs.shape, net.outputs.dtype)


class Start(NamedTuple):
    """Where a forward pass of a stage begins, which is all that a streamed one keeps."""

    x: Array
    mstate: Buffers


def forward(
    net: Network, s: int, params: Buffers, images: Tree, start: Start
) -> tuple[Array, Array, Buffers, Start]:
    """Stage s in training mode: what goes up, the outputs, its state, and what it keeps."""
    p, m = net.view(s, params=params, mstate=start.mstate)
    h, m = stage_input(net, s, images, start.x), list(m)
    for i in net.groups[s]:
        h, m[i] = net.units[i].apply(p[i], m[i], h, train=True)
    return *boundary_out(net, s, h), net.parts["mstate"].pack(s, tuple(m)), start


class Learned(NamedTuple):
    """Sums over micro-batches of gradients: of a stage's parameters and of its readouts."""

    params: Buffers
    readouts: Buffers


class Given(NamedTuple):
    """What a gradient is made of beside what the stage has: outputs and a micro-batch."""

    outputs: Array
    batch: Batch


# (i, input of unit i) -> its output, and the pullback to its parameters.
Visit = Callable[[int, Tree], tuple[Array, Callable[[Array], Tree]]]


def gradient(
    net: Network, s: int, params: Buffers, feedback: Buffers, common: Common, start: Start,
    given: Given,
) -> tuple[Tree, Tree]:  # fmt: skip
    """The gradients of stage s and of its readouts for one micro-batch, by another forward pass.

    As in `passes.streamed` each unit's comes as the pass meets it, and holds nothing of the others.
    """
    p, m = net.view(s, params=params, mstate=start.mstate)

    def visited(i: int, x: Tree) -> tuple[Array, Callable[[Array], Tree]]:
        y, pullback, _ = visit(net.units[i], p[i], m[i], x)
        return y, lambda signal: pullback(signal)[0]

    x = stage_input(net, s, given.batch.images, start.x)
    return learn(net, s, feedback, common, given, x, visited)


def learn(
    net: Network, s: int, feedback: Buffers, common: Common, given: Given, x: Tree, visited: Visit
) -> tuple[Tree, Tree]:
    """The task terms' gradients of the units of stage s in turn.

    Returns:
      one tree a unit of the stage, and one a readout of it.
    """
    own_feedback = net.parts["feedback"].tree(s, feedback, common)
    error = tasks.output_error(net.weights.task, given.outputs, given.batch.labels)[1]
    of_units, of_readouts, last = [], [], len(net.units) - 1
    for i in net.groups[s]:
        h, pullback = visited(i, x)
        signal = error
        if i < last:
            signal, readout = _signal(net, own_feedback, h, error, given, i)
            of_readouts += readout
        of_units.append(pullback(losses.cotangent(h, signal, net.weights, last=i == last)))
        x, error = after((h, error), of_units[-1])
    return of_units, of_readouts


def _signal(
    net: Network, feedback: Tree, h: Array, error: Array, given: Given, i: int
) -> tuple[Array, list[Tree]]:
    """The signal of hidden unit i, and the gradient of its readout where it has one."""
    readouts, direct = net.method.readouts, net.method.direct
    if readouts is not None:
        own = readouts.of(feedback)[i]
        slopes = jax.grad(readouts.loss, (0, 2))
        readout, signal = slopes(own, i, h, given.outputs, given.batch)
        return signal, [readout]
    assert direct is not None
    return direct(feedback, error, given.batch, i), []


def start(net: Network) -> Learned:
    """Sums of nothing yet."""
    sizes = net.parts["params"].sizes, readout_sizes(net)
    return Learned(*({n: jnp.zeros(k, n) for n, k in size.items()} for size in sizes))


def readout_shapes(net: Network, s: int) -> list[Any]:
    """Of the leaves of the readouts of stage s."""
    if net.method.readouts is None:
        return []
    part = net.parts["feedback"]
    of = net.method.readouts.of(jax.tree.unflatten(part.structure, part.leaves))
    return jax.tree.leaves([of[i] for i in net.groups[s] if i < len(net.units) - 1])


def readout_sizes(net: Network) -> buffers.Sizes:
    """Of the buffers of a stage's readouts."""
    return buffers.sizes([readout_shapes(net, s) for s in range(len(net.groups))])


def add(net: Network, s: int, total: Learned, learned: tuple[Tree, Tree]) -> Learned:
    """The sums with the gradients of one micro-batch more."""
    sizes = net.parts["params"].sizes, readout_sizes(net)
    flat = (
        buffers.pack(jax.tree.leaves(trees), size)
        for trees, size in zip(learned, sizes, strict=True)
    )
    return jax.tree.map(jnp.add, total, Learned(*flat))


def on_stage(branches: Sequence[Callable[..., Any]], active: Array | None, *args: Any) -> Any:
    """What the branch of this device's stage makes of the arguments.

    Stages of equal units have equal programs, each of which is there once. Not to be
    differentiated: what is told apart is the programs, not their derivatives.

    Args:
      branches: one a stage; where there is `active`, one more for a stage that is not.
      active: whether the stage does anything; None: all do.
      args: of the branch.
    """
    stage = lax.axis_index(STAGE)
    if active is not None:
        stage = jnp.where(active, stage, len(branches) - 1)
    keys = [_program(branch, args) for branch in branches]
    distinct = list(dict.fromkeys(keys))
    which = jnp.array([distinct.index(key) for key in keys])
    return lax.switch(which[stage], [branches[keys.index(key)] for key in distinct], *args)


def _program(branch: Callable[..., Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """What a branch does with the arguments and the arrays that it has from around it."""
    program = jax.make_jaxpr(branch)(*args)
    # Without places in memory, which are those of functions that only a derivative would call.
    text = re.sub(r"0x[0-9a-f]+", "", str(program))
    return text, *(id(array) for array in program.consts)
