"""Steps over stages, and the same steps on one device, for tests here and in other processes."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from helpers import CLASSES, apart, make_batch, make_method, small_model, split

from ssa_jax.models.blocks import Plain, dense
from ssa_jax.models.feedforward import Feedforward
from ssa_jax.networks.units import first_copies, sum_shared
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.mesh import make_staged_layout, on_host
from ssa_jax.parallel.pipeline import partition
from ssa_jax.stages.owners import advance
from ssa_jax.stages.step import Stages
from ssa_jax.training import optim, passes, ranks, train
from ssa_jax.training.losses import LossWeights
from ssa_jax.types import TrainState

WEIGHTS = LossWeights(1.0, 0.1, 0.1, 0.01)
BATCH = 16


def chain():
    """Nine equal layers of 12 between a first and a last one."""
    rngs = nnx.Rngs(0)
    layers = [Plain(dense(12, 12, rank=0.5, rngs=rngs), activation=nnx.relu) for _ in range(9)]
    first = Plain(dense(72, 12, rank=0.5, rngs=rngs), activation=nnx.relu, flatten=True)
    return Feedforward([first, *layers, Plain(dense(12, CLASSES, rank=None, rngs=rngs))])


def network(name):
    """Units, parameters, state, and the shape of the images."""
    if name == "chain":
        return *apart(chain()), (6, 6, 2)
    if name in ("conv", "linear", "vit"):
        return *split(name, rank=0.5), (6, 6, 2)
    options = {"blocks": 2} if name == "resnet32" else {}
    size = 16 if name == "vgg13" else 8
    model, shape = small_model(name, CLASSES, 0.25, (size, size, 3), **options)
    return *apart(model, shape), shape


def in_turn(batch, parts):
    """The micro-batches of a batch."""
    split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    return [jax.tree.map(lambda x, m=m: x[m], split) for m in range(parts)]


def one_device_step(units, method, optimizer, devices, micro_batches):
    """The same step without a mesh: micro-batch by micro-batch, the whole network each time."""

    def learned(state, mstate, batch):
        """Gradients of the units and of readouts, the state, and the loss of a micro-batch."""
        run = units, method, WEIGHTS, state.params, mstate, state.feedback, batch
        done = passes.taped(*run)
        if method.readouts is None:
            return done.gradients, (), done.mstate, done.loss

        def losses(readouts):
            hidden = zip(readouts, done.tape.outputs[:-1], strict=True)
            return sum(
                method.readouts.loss(r, i, h, done.logits, batch) for i, (r, h) in enumerate(hidden)
            )

        slopes = jax.grad(losses)(method.readouts.of(state.feedback))
        return done.gradients, slopes, done.mstate, done.loss

    def step(state, batch):
        found, states = [], []
        for rows in in_turn(batch, devices):
            mstate = state.mstate
            for micro_batch in in_turn(rows, micro_batches):
                *slopes, mstate, loss = learned(state, mstate, micro_batch)
                found.append((*slopes, loss))
            states.append(mstate)
        mean = jax.tree.map(lambda *x: sum(x) / len(x), *found)
        gradients = sum_shared(units, mean[0])
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = first_copies(units, optax.apply_updates(state.params, updates))
        feedback = advance(method, state.feedback, state.params, params, mean[1], batch)
        mstate = jax.tree.map(lambda *x: sum(x) / len(x), *states)
        return TrainState(state.step + 1, params, mstate, feedback, opt_state, state.key), mean[2]

    return jax.jit(step)


def plain_step(units, method, optimizer):
    step = train.make_step(units, method, optimizer, WEIGHTS)

    def losing(state, batch):
        state, metrics = step(jax.tree.map(jnp.copy, state), batch)
        return state, metrics["loss"]

    return losing


def cast(tree, dtype):
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def distance(state, other):
    """The largest difference of any two arrays over the largest entry."""
    pairs = zip(*(map(on_host, jax.tree.leaves(s)) for s in (state, other)), strict=True)
    return max(
        float(np.abs(a.astype(float) - b).max(initial=0) / max(1.0, np.abs(b).max(initial=0)))
        for a, b in pairs
    )


METHODS = {
    "ssa": ("ssa", {"lookahead": 0}),
    "mutual": ("ssa", {"lookahead": 0, "path": "random", "update": "mutual"}),
    "regression": ("ssa", {"lookahead": 0, "path": "regression"}),
}


def run(case, dtype):
    model, name, stages, micro_batches, *memory = case.split(":")
    stages, micro_batches = int(stages), int(micro_batches)
    units, params, mstate, shape = network(model)
    of, options = METHODS.get(name, (name, {}))
    method = make_method(of, units, params, mstate, shape, **options)
    # Ranks fall, so that twins have something to follow.
    optimizer = optim.make_optimizer(
        optim.OptimizerConfig(
            0.01, 10, 5, optimizer="momentum", warmup_steps=1, schedule=ranks.SCHEDULES["linear"],
            rank_schedule="linear", rank_target=0.5,
        )
    )  # fmt: skip
    state = train.init_state(method, optimizer, params, mstate, jax.random.key(0))
    state = cast(state, dtype)
    batches = [cast(make_batch(BATCH, seed, shape), dtype) for seed in range(3)]
    layout = make_staged_layout(stages)
    step = one_device_step(units, method, optimizer, layout.devices, micro_batches)
    if layout.devices == micro_batches == 1 and method.readouts is None:
        step = plain_step(units, method, optimizer)
    refresh = train.make_refresh(method)
    other, wanted = jax.tree.map(jnp.copy, state), []
    for k, batch in enumerate(batches):
        other = refresh(other) if k == 1 else other
        other, loss = step(other, batch)
        wanted.append(float(loss))
    with layout.active():
        bounds = partition([1] * len(units), stages)
        example = jax.eval_shape(lambda: batches[0])
        over = Stages(
            units, method, optimizer, WEIGHTS, layout, bounds, micro_batches, example, *memory
        )
        here = layout.place(state)
        staged = over.divide(here)
        exact = distance(over.whole(staged), here) == 0
        held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(staged.parts))
        total = sum(x.nbytes for x in jax.tree.leaves(here) if hasattr(x, "nbytes"))
        losses, step = [], over.step.lower(staged, batches[0]).compile()
        for k, batch in enumerate(batches):
            staged = over.refresh(staged) if k == 1 else staged
            staged, metrics = step(staged, batch)
            losses.append(float(metrics["loss"]))
        found = over.whole(staged)
    return {
        "exact": exact,
        "losses": float(np.abs(np.subtract(losses, wanted)).max()),
        "state": distance(found, other),
        "moved": distance(other.params, state.params),
        "held": held / total,
        "sent": collections.Counter(c.kind for c in collectives(step.as_text())),
    }
