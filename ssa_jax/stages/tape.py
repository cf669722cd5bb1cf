"""What a stage keeps of a forward pass until the gradient of that micro-batch, by memory mode."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ssa_jax.parallel import buffers
from ssa_jax.parallel.buffers import Buffers
from ssa_jax.stages.owners import dependencies
from ssa_jax.stages.state import zeros
from ssa_jax.stages.work import Common, Given, Network, Start, boundary_out, learn, stage_input

Array = jax.Array
Tree = Any


def _pullback(unit: Any, params: Tree, mstate: Tree, x: Tree) -> tuple[Array, Any, Tree]:
    """Output, pullback to the parameters alone, new state."""
    y, pullback, state = jax.vjp(
        lambda p: unit.apply(p, mstate, x, train=True), params, has_aux=True
    )
    return y, pullback, state


class Tape(NamedTuple):
    """Of each unit, which arrays of its pullback are made of data, and not of parameters alone.

    The others are made anew from the parameters: kept for every micro-batch they would weigh as
    much as these.

    Attributes:
      of_data: by unit, by leaf of the pullback.
      outputs: whether the units' outputs are kept too, for terms that read them.
      shapes: by stage, of what is kept of a micro-batch.
    """

    of_data: Sequence[Sequence[bool]]
    outputs: bool
    shapes: Sequence[Sequence[Any]]

    @property
    def sizes(self) -> buffers.Sizes:
        """Of the buffers of a micro-batch."""
        return buffers.sizes(self.shapes)


def tape_of(net: Network) -> Tape:
    """What a taped step keeps."""
    params, mstate = (
        jax.tree.unflatten(net.parts[n].structure, net.parts[n].leaves)
        for n in ("params", "mstate")
    )
    outputs = bool(net.weights.kappa) or net.method.readouts is not None
    of_data, of_units = [], []
    for i, unit in enumerate(net.units):
        size = len(jax.tree.leaves(params[i]))

        def leaves(p: Tree, m: Tree, x: Tree, unit: Any = unit) -> list[Array]:
            return jax.tree.leaves(_pullback(unit, p, m, x)[1])

        given = params[i], mstate[i], net.shapes[i]
        of_data.append([any(k >= size for k in used) for used in dependencies(leaves, *given)])
        shapes = jax.eval_shape(leaves, *given)
        kept = [x for x, data in zip(shapes, of_data[-1], strict=True) if data]
        of_units.append(kept + [net.shapes[i + 1]] * outputs)
    of_stages = [[x for i in group for x in of_units[i]] for group in net.groups]
    return Tape(of_data, outputs, of_stages)


def forward(
    net: Network, tape: Tape, s: int, params: Buffers, images: Tree, start: Start
) -> tuple[Array, Array, Buffers, Buffers]:
    """Stage s in training mode: what goes up, the outputs, its state, and what it keeps."""
    p, m = net.view(s, params=params, mstate=start.mstate)
    h, m, kept = stage_input(net, s, images, start.x), list(m), []
    for i in net.groups[s]:
        h, pullback, m[i] = _pullback(net.units[i], p[i], m[i], h)
        leaves = zip(jax.tree.leaves(pullback), tape.of_data[i], strict=True)
        kept += [leaf for leaf, data in leaves if data] + [h] * tape.outputs
    up, outputs = boundary_out(net, s, h)
    return up, outputs, net.parts["mstate"].pack(s, tuple(m)), buffers.pack(kept, tape.sizes)


def gradient(
    net: Network, tape: Tape, s: int, params: Buffers, feedback: Buffers, common: Common,
    kept: Buffers, given: Given,
) -> tuple[Tree, Tree]:  # fmt: skip
    """The gradients of stage s and of its readouts for one micro-batch, from what was kept."""
    (p,) = net.view(s, params=params)
    part = net.parts["mstate"]
    m = jax.tree.unflatten(part.structure, [zeros(x) for x in part.leaves])
    arrays = iter(buffers.unpack(kept, tape.shapes[s]))

    def visited(i: int, x: Any) -> tuple[Array, Any]:
        blank = jax.tree.map(zeros, net.shapes[i])
        y, pullback, _ = _pullback(net.units[i], p[i], m[i], blank)
        leaves, structure = jax.tree.flatten(pullback)
        pairs = zip(leaves, tape.of_data[i], strict=True)
        whole = jax.tree.unflatten(
            structure, [next(arrays) if data else leaf for leaf, data in pairs]
        )
        return next(arrays) if tape.outputs else y, lambda signal: whole(signal)[0]

    return learn(net, s, feedback, common, given, None, visited)
