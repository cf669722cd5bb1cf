"""What a stage makes of its gradients: its units and its feedback after a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssa_jax.networks.units import first_copies, sum_shared
from ssa_jax.parallel import buffers
from ssa_jax.parallel.buffers import Buffers
from ssa_jax.stages.owners import advance
from ssa_jax.stages.state import zeros
from ssa_jax.stages.work import Common, Learned, Network, readout_shapes
from ssa_jax.training import losses, unitwise
from ssa_jax.types import Batch

Tree = Any


class Own(NamedTuple):
    """The buffers of a stage that its update moves."""

    params: Buffers
    feedback: Buffers
    opt_state: Buffers


def update(
    net: Network, s: int, own: Own, learned: Learned, common: Common, batch: Batch
) -> Own:  # fmt: skip
    """Stage s after a step: the chain on its units' gradients, then its feedback."""
    group, units = net.groups[s], net.units
    params = net.parts["params"].tree(s, own.params)
    feedback = net.parts["feedback"].tree(s, own.feedback, common)
    twins = net.method.twins(feedback)
    slopes = net.parts["params"].tree(s, learned.params)
    gradients = [
        jax.tree.map(
            jnp.add,
            slopes[i],
            jax.grad(losses.regulariser)(params[i], twins and twins[i], net.weights),
        )
        for i in group
    ]
    mine = [units[i] for i in group]
    summed = dict(zip(group, sum_shared(mine, gradients), strict=True))
    slopes = tuple(summed.get(i, ()) for i in range(len(units)))
    alone = unitwise.states(net.optimizer, params, [group])[0]
    shapes = net.parts["opt_state"].shapes(s)
    opt_state = jax.tree.unflatten(jax.tree.structure(alone), buffers.unpack(own.opt_state, shapes))
    of_mine = unitwise.only(params, group)
    updates, opt_state = net.optimizer.update(slopes, opt_state, of_mine)
    moved = optax.apply_updates(of_mine, updates)
    copied = dict(zip(group, first_copies(mine, [moved[i] for i in group]), strict=True))
    new = tuple(copied.get(i, p) for i, p in enumerate(params))
    readouts = _readout_gradients(net, s, learned.readouts)
    feedback = advance(net.method, feedback, params, new, readouts, batch)
    return Own(
        net.parts["params"].pack(s, new),
        net.parts["feedback"].pack(s, feedback),
        buffers.pack(jax.tree.leaves(opt_state), net.parts["opt_state"].sizes),
    )


def _readout_gradients(net: Network, s: int, sums: Buffers) -> Tree:
    """Of all readouts; zeros of those of other stages."""
    if net.method.readouts is None:
        return ()
    part = net.parts["feedback"]
    shapes = net.method.readouts.of(jax.tree.unflatten(part.structure, part.leaves))
    own = iter(buffers.unpack(sums, readout_shapes(net, s)))

    def of(i: int, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: next(own) if i in net.groups[s] else zeros(x), tree)

    return tuple(of(i, tree) for i, tree in enumerate(shapes))
