"""What a run would be on devices that this machine does not have: its programs, compiled."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssa_jax.errors import ConfigError
from ssa_jax.factors import PAYS, named_leaves
from ssa_jax.factors.linalg import traced_for
from ssa_jax.parallel import ahead
from ssa_jax.parallel.ahead import Compiled, Target, TooLarge
from ssa_jax.runs.build import Built, Devices, build
from ssa_jax.runs.config import Config
from ssa_jax.stages.programs import over_stages, step_of_all
from ssa_jax.stages.state import shardings
from ssa_jax.training import costs, ranks, train
from ssa_jax.types import Batch

Tree = Any


class Planned(NamedTuple):
    """One program of a run on a target.

    Attributes:
      program: ``"initialisation"``, ``"step"``, ``"refresh"``, ``"evaluation"``, or, where ranks
        fall, ``"compaction"``: to the share of them from which on it pays.
      compiled: what the compiler made of it, or why it did not.
      macs: multiply-accumulates of all devices together; of a step over stages as if each did the
        work of the costliest in every tick.
      best_s: seconds that the rates of a device allow at best: of its share of the products, or of
        reading and writing what it holds, whichever is longer; None of one that is too large.
    """

    program: str
    compiled: Compiled | TooLarge
    macs: int
    best_s: float | None


def planned(
    built: Built, example: Any, batch_size: int, where: Target, micro_batches: int = 1
) -> Iterator[Planned]:
    """The programs of a run, compiled one after the other; trains nothing.

    Args:
      built: the run.
      example: shape and dtype of one input, (1, ...).
      batch_size: examples in a step of all devices, which divide it.
      where: the target, with stages for a run that has `bounds`.
      micro_batches: of a run over stages.

    Raises:
      ConfigError: a batch that the devices do not divide.
    """
    parts = where.layout.devices * micro_batches
    if batch_size % parts:
        what = "devices" if micro_batches == 1 else "micro-batches of the devices"
        raise ConfigError(
            f"--batch_size must be a multiple of the {parts} {what} of {where.name}, got "
            f"{batch_size}"
        )

    devices = where.layout.devices * where.layout.stages
    for name, program, args in _programs(built, example, batch_size, where, micro_batches):
        # What is counted is what is compiled, in the forms that layers take on the target.
        with traced_for(where.platform):
            made, macs = ahead.compiled(program, args, where), costs.macs(program, *args)
        # The program of a stage counts as the costliest one, in every tick.
        macs *= devices if name == "step" and built.bounds else 1
        best = None
        if isinstance(made, Compiled):
            share = macs / devices / where.rates.products
            best = max(share, made.bytes / where.rates.bandwidth)
        yield Planned(name, made, macs, best)


def _programs(
    built: Built, example: Any, batch_size: int, where: Target, micro_batches: int
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Names, programs and the shapes of their arguments, of those that the run has."""

    def examples() -> Batch:
        images = jnp.zeros((batch_size, *example.shape[1:]))
        return Batch(images, jnp.zeros(batch_size, jnp.int32))

    def initialisation(params: Tree, mstate: Tree, key: jax.Array) -> Any:
        feedback = built.method.init(key, params, mstate)
        return feedback, built.optimizer.init(params)

    state = ahead.shaped(built.state, where)
    rows = ahead.shaped(jax.eval_shape(examples), where, rows=True)
    keep, whole, returning = where.layout.keep, where.layout.whole, where.layout.returning
    step, stepped = _step(built, state, rows, where, micro_batches)
    yield "initialisation", jax.jit(initialisation), (state.params, state.mstate, state.key)
    yield "step", step, (stepped, rows)
    if built.method.refresh_every:
        yield "refresh", returning(keep, train.make_refresh(built.method)), (state,)
    evaluation = returning(whole, train.make_eval(built.units, built.task))
    yield "evaluation", evaluation, (state.params, state.mstate, rows)
    if any(map(built.cuts_at, range(built.total_steps))):
        yield "compaction", returning(keep, _compaction(state.params)), (state,)


def _compaction(params: Tree) -> Any:
    """The first compaction of a run whose ranks fall alike, by the least that pays."""
    stored = {name: f.rank for name, f in named_leaves(params).items()}
    return ranks.make_compaction({k: np.arange(max(1, int(PAYS * stored[k]))) for k in stored})


def _step(
    built: Built, state: Tree, rows: Batch, where: Target, micro_batches: int
) -> tuple[Any, Tree]:
    """The step of a run, over stages or not, and shapes of the state that it takes."""
    if not built.bounds:
        return step_of_all(built, built.method, where.layout), state
    stages = over_stages(built, built.bounds, micro_batches, where.layout, rows)
    with where.layout.active():
        staged = jax.eval_shape(stages.divide, state)
    assert where.layout.mesh is not None
    places = shardings(staged, where.layout.mesh)
    return stages.step, jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), staged, places
    )


def lines(config: Config, data: Any, name: str) -> Iterator[str]:
    """The plan of a run on a target in words, a program a line.

    Raises:
      ConfigError: a target that there is not, or cannot be compiled for here.
    """
    where = ahead.target(name, config.stages if config.staged else 0)
    where = where._replace(layout=where.layout._replace(shard_factors=config.shard_params))
    number = where.layout.devices * where.layout.stages
    built = build(config, data, devices=Devices(number, where.rates.memory))
    parts = config.micro_batches
    for one in planned(built, data.example, config.batch_size, where, parts):
        how = ", streamed" if one.program == "step" and built.memory == "streamed" else ""
        yield f"{one.program}: {_words(one, where.rates.memory)}{how}"


def _words(one: Planned, memory: float) -> str:
    c, device = one.compiled, f"{memory / 2**30:.0f} a device"
    if isinstance(c, TooLarge) or one.best_s is None:
        asked = "more" if c.bytes is None else f"{c.bytes / 2**30:.2f} GiB"
        return f"DOES NOT FIT: the compiler asks for {asked}, of {device}"
    fits = "fits in" if c.bytes <= memory else "DOES NOT FIT:"
    return (
        f"{fits} {c.bytes / 2**30:.2f} GiB of {device}, "
        f"{c.kernels} kernels, {c.loops} loops, {c.conditionals} conditionals, "
        f"{c.collectives} collectives of {c.collective_bytes / 2**20:.1f} MiB, "
        f"{c.trace_s + c.compile_s:.0f} s to compile here, at best {1e3 * one.best_s:.2f} ms"
    )
