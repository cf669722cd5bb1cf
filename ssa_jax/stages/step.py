"""The training step over stages, and the way of a state into it and out of it."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssa_jax.methods import Method
from ssa_jax.networks.forward import outputs_of
from ssa_jax.networks.units import Unit
from ssa_jax.parallel.buffers import Buffers
from ssa_jax.parallel.mesh import AXIS, STAGE, Layout
from ssa_jax.parallel.pipeline import Work, flow
from ssa_jax.stages import state as states
from ssa_jax.stages import tape as taped
from ssa_jax.stages import work
from ssa_jax.stages.owners import Owners, advance, owners
from ssa_jax.stages.state import Shapes, StagedState
from ssa_jax.stages.tape import tape_of
from ssa_jax.stages.update import Own, update
from ssa_jax.stages.work import Given, Network, Start
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.tasks import mean_loss
from ssa_jax.training.train import measured
from ssa_jax.types import Batch, TrainState

Array = jax.Array
Tree = Any


class Stages:
    """A network over the stages of a mesh.

    A step is that of `train.make_step` on micro-batches: gradients are means over them, and of a
    batch norm every micro-batch of every device that shares the batch has its own statistics; the
    running ones move from micro-batch to micro-batch, and are averaged over the devices.

    Args:
      units: the network.
      method: whose signals need nothing but the error, or the units' own readouts; see
        `choose.check`.
      optimizer: a chain that treats units alone.
      weights: of the local loss.
      layout: of a mesh with stages.
      bounds: of the stages, as `pipeline.partition` gives them.
      micro_batches: M; together with the devices that share it they divide a batch.
      example: shapes of a batch, of any number of rows.
      memory: ``"taped"`` keeps what the gradients of at most S micro-batches need, ``"streamed"``
        their inputs alone, and passes forward once more.

    Attributes:
      step: (state, batch) -> (state, metrics), jitted; its state is donated, as `refresh`'s is.
      refresh: state -> state, the method's.
      divide: `TrainState` -> `StagedState`, and `whole` the way back, both exact.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        method: Method,
        optimizer: Any,
        weights: LossWeights,
        layout: Layout,
        bounds: Sequence[int],
        micro_batches: int,
        example: Batch,
        memory: str = "streamed",
    ):
        assert layout.mesh is not None
        self.units, self.method, self.optimizer = units, method, optimizer
        self.weights, self.mesh, self.devices = weights, layout.mesh, layout.devices
        self.groups = [range(a, b) for a, b in itertools.pairwise(bounds)]
        self.micro_batches, self.example, self.memory = micro_batches, example, memory
        self._owners: dict[Shapes, Owners] = {}
        self.step = jax.jit(self._step, donate_argnums=0)
        self.refresh = jax.jit(self._refresh, donate_argnums=0)
        self.divide = jax.jit(self._divide)
        self.whole = jax.jit(self._whole)

    def owners(self, shapes: Shapes) -> Owners:
        """Which stage has what of a state of these shapes."""
        if shapes not in self._owners:
            state = shapes.tree()
            outputs = self._unit_shapes(state, self.example.images)[-1]
            self._owners[shapes] = owners(
                self.method, self.optimizer, self.groups, state, self.example, outputs
            )
        return self._owners[shapes]

    def _unit_shapes(self, state: TrainState, images: Tree) -> list[Any]:
        """Of the input of every unit, and of the outputs."""
        outputs = outputs_of(self.units, state.params, state.mstate, images, train=True)
        return [jax.eval_shape(lambda x: x, images), *outputs]

    def _divide(self, state: TrainState) -> StagedState:
        return states.divided(state, self.owners(states.shapes_of(state)), self.mesh)

    def _whole(self, staged: StagedState) -> TrainState:
        return self._everywhere(states.whole(staged, self.owners(staged.shapes)))

    def _everywhere(self, tree: Tree) -> Tree:
        return lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    def _refresh(self, staged: StagedState) -> StagedState:
        """The method's refresh, for which every device meets parameters and feedback of all."""
        owned = self.owners(staged.shapes)
        state = self._everywhere(states.whole(staged, owned)._replace(opt_state=()))
        feedback = self.method.refresh(state.feedback, state.params, state.mstate)
        part = states.parts_of(staged.shapes, owned)["feedback"]
        leaves = jax.tree.leaves(feedback)
        new = dataclasses.replace(
            staged,
            parts=staged.parts | {"feedback": part.of_all(feedback)},
            common=tuple(leaves[k] for k in owned.common),
        )
        return states.placed(new, self.mesh)

    def _step(self, staged: StagedState, batch: Batch) -> tuple[StagedState, dict[str, Array]]:
        spread, everywhere, rows = P(STAGE), P(), P(AXIS)
        over = jax.shard_map(
            functools.partial(self._on_device, staged.shapes),
            mesh=self.mesh,
            in_specs=(spread, everywhere, rows),
            out_specs=(spread, rows),
            check_vma=False,
        )
        parts, outputs = over(staged.parts, staged.common, batch)
        new = dataclasses.replace(
            staged, step=staged.step + 1, parts=parts, common=self._common(staged, batch)
        )
        task = self.weights.task
        loss = mean_loss(task, outputs, batch.labels)
        metrics = {"loss": loss, **measured(task, outputs, batch.labels)}
        return states.placed(new, self.mesh), self._everywhere(metrics)

    def _common(self, staged: StagedState, batch: Batch) -> tuple[Array, ...]:
        """What is no unit's own of the feedback after a step, of the whole batch."""
        owned = self.owners(staged.shapes)
        state = staged.shapes.tree()
        # Made of nothing that a stage has, so zeros stand for that.
        blank = jax.tree.map(states.zeros, state._replace(opt_state=()))
        leaves, structure = jax.tree.flatten(blank.feedback)
        for k, x in zip(owned.common, staged.common, strict=True):
            leaves[k] = x
        feedback = jax.tree.unflatten(structure, leaves)
        readouts = self.method.readouts.of(feedback) if self.method.readouts else ()
        new = advance(self.method, feedback, blank.params, blank.params, readouts, batch)
        leaves = jax.tree.leaves(new)
        return tuple(leaves[k] for k in owned.common)

    def _on_device(
        self, shapes: Shapes, parts: dict[str, Buffers], common: tuple[Array, ...], batch: Batch
    ) -> tuple[dict[str, Buffers], Array]:
        """A step on one device: all ticks, then the update of its stage."""
        own = jax.tree.map(lambda x: x[0], parts)
        in_turn = jax.tree.map(lambda x: x.reshape(self.micro_batches, -1, *x.shape[1:]), batch)
        state, owned = shapes.tree(), self.owners(shapes)
        one = jax.eval_shape(lambda b: jax.tree.map(lambda x: x[0], b), in_turn)
        net = Network(
            self.units, self.method, self.optimizer, self.weights, self.groups,
            states.parts_of(shapes, owned), self._unit_shapes(state, one.images),
        )  # fmt: skip
        shared = tuple(zip(owned.common, common, strict=True))
        mstate, total, outputs = self._passes(net, own, shared, in_turn)
        scale = 1 / (self.micro_batches * self.devices)
        total = jax.tree.map(lambda x: lax.psum(x * scale, AXIS), total)
        moved = work.on_stage(
            [functools.partial(self._update, net, shared, s) for s in range(len(self.groups))],
            None, own, total, batch,
        )  # fmt: skip
        new = {"params": moved.params, "mstate": self._averaged(mstate),
               "feedback": moved.feedback, "opt_state": moved.opt_state}  # fmt: skip
        outputs = outputs.reshape(-1, *outputs.shape[2:])
        return jax.tree.map(lambda x: x[None], new), outputs

    def _averaged(self, mstate: Buffers) -> Buffers:
        """Running statistics, the mean of those of all devices that share the batch."""
        return {
            n: lax.pmean(x, AXIS) if jnp.issubdtype(x.dtype, jnp.inexact) else x
            for n, x in mstate.items()
        }

    def _update(
        self, net: Network, shared: work.Common, s: int, own: dict[str, Buffers],
        total: work.Learned, batch: Batch,
    ) -> Own:  # fmt: skip
        mine = Own(own["params"], own["feedback"], own["opt_state"])
        return update(net, s, mine, total, shared, batch)

    def _passes(
        self, net: Network, own: dict[str, Buffers], shared: work.Common, in_turn: Batch
    ) -> tuple[Buffers, work.Learned, Array]:
        """All micro-batches through all stages; the stage's state, its gradients, the outputs."""
        boundary, outputs, stages = net.boundary(), net.outputs, range(len(self.groups))
        x = jnp.zeros(boundary.shape, boundary.dtype)
        forwards, backwards, kept = self._modes(net, own, shared, x)

        def of(m: Array) -> Batch:
            m = jnp.maximum(m, 0)
            return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, m, 0, False), in_turn)

        def forward(m: Array, x: Array, mstate: Buffers) -> Any:
            def nothing(images: Tree, start: Start) -> Any:
                return (
                    jnp.zeros_like(x), jnp.zeros(outputs.shape, outputs.dtype), start.mstate,
                    jax.tree.map(jnp.zeros_like, kept),
                )  # fmt: skip

            branches: list[Any] = [functools.partial(forwards, s) for s in stages]
            return work.on_stage([*branches, nothing], m >= 0, of(m).images, Start(x, mstate))

        def gradient(m: Array, kept: Tree, outputs: Array, total: work.Learned) -> work.Learned:
            def stage(s: int, kept: Tree, given: Given, total: work.Learned) -> work.Learned:
                return work.add(net, s, total, backwards(s, kept, given))

            branches: list[Any] = [functools.partial(stage, s) for s in stages]
            branches.append(lambda kept, given, total: total)
            return work.on_stage(branches, m >= 0, kept, Given(outputs, of(m)), total)

        steps, total = Work(forward, gradient), work.start(net)
        return flow(steps, len(stages), self.micro_batches, x, own["mstate"], kept, total)

    def _modes(
        self, net: Network, own: dict[str, Buffers], shared: work.Common, x: Array
    ) -> tuple[Callable[..., Any], Callable[..., Any], Tree]:
        """Forward passes and gradients of stages by the mode of memory, and zeros of what is kept.

        (s, images, start) -> as `Work.forward`; (s, kept, given) -> gradients.
        """
        params, feedback = own["params"], own["feedback"]
        if self.memory == "streamed":
            return (
                lambda s, images, start: work.forward(net, s, params, images, start),
                lambda s, kept, given: work.gradient(net, s, params, feedback, shared, kept, given),
                Start(x, jax.tree.map(jnp.zeros_like, own["mstate"])),
            )
        tape = tape_of(net)
        return (
            lambda s, images, start: taped.forward(net, tape, s, params, images, start),
            lambda s, kept, given: taped.gradient(
                net, tape, s, params, feedback, shared, kept, given
            ),
            {name: jnp.zeros(n, name) for name, n in tape.sizes.items()},
        )
