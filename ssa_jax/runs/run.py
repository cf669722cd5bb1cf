"""One run, from a config to a summary."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from ssa_jax.parallel import processes
from ssa_jax.parallel.compiling import Compiling, leave_products_to_cublas, use_cache
from ssa_jax.parallel.interrupt import Interruptible, interruptible
from ssa_jax.reporting import tensorboard
from ssa_jax.reporting.progress import Progress
from ssa_jax.runs import build, inputs, network, workdir
from ssa_jax.runs.config import Config, identity
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.runs.inputs import Data
from ssa_jax.runs.loop import Loop
from ssa_jax.runs.trainer import Trainer
from ssa_jax.runs.workdir import Workdir
from ssa_jax.training import unitwise
from ssa_jax.training.checkpoint import Checkpoints

Row = dict[str, Any]


def run(config: Config, data: Data | None = None) -> Row:
    """Trains one configuration and returns its summary, which is also in its workdir.

    Args:
      config: the run.
      data: its data set, where the caller has it already.

    Raises:
      ConfigError, DataError, WorkdirError: nothing was overwritten.
      CheckpointError: none can be used, or none be written; those that were whole still are.
      NotFiniteError: the loss or a parameter became NaN or infinite, and `on_nan` is "stop" or
        did not help; the newest checkpoint is the last good state.
      KeyboardInterrupt: after Ctrl-C, and `Terminated` after SIGTERM: the state is saved, and the
        message says how to go on.
    """
    return train_given(config, data)[0]


def train_given(
    config: Config, data: Data | None = None, given: Given = NOTHING
) -> tuple[Row, Trainer]:
    """`run`, with objects in place of names; also the trainer, with the state at the end."""
    data = _prepare(config, data)
    layout = processes.layout(config)
    built = build.build(config, data, given=given)
    # What is kept says what the network decided.
    config = built.config
    with interruptible() as interrupt, Compiling() as compiling, layout.active():
        trainer = Trainer(config, data, built, compiling, layout, given)
        with _opened(config, trainer, interrupt) as loop:
            loop.begin()
            introduce(config, loop)
            return loop.go(), trainer


def _prepare(config: Config, data: Data | None) -> Data:
    """Checks a config and sets up what its run needs; its data, as the config wants them."""
    config.validate()
    if config.tensorboard:
        tensorboard.require()
    leave_products_to_cublas()
    use_cache(config.compile_cache)
    return inputs.of_run(config, data)


@contextlib.contextmanager
def _opened(config: Config, trainer: Trainer, interrupt: Interruptible) -> Iterator[Loop]:
    """A run in its workdir, which is closed at the end of the block, its checkpoints written."""
    open_folder = workdir.reopen if config.resume else workdir.create
    with contextlib.ExitStack() as stack:

        def open_and_hold() -> Workdir:
            folder = open_folder(config)
            stack.enter_context(workdir.held(folder.path))
            return folder

        folder = workdir.of_all(open_and_hold)
        checkpoints = Checkpoints(folder.checkpoints, config.keep_checkpoints, identity(config))
        stack.enter_context(checkpoints)
        events = folder.path / "tensorboard" if config.tensorboard and folder.ours else None
        progress = stack.enter_context(Progress(config, folder.rows, events))
        yield Loop(config, trainer, folder, checkpoints, interrupt, progress)


def introduce(config: Config, loop: Loop) -> None:
    """Prints what the run is, and what cannot be had of what was asked for."""
    trainer, built, state = loop.trainer, loop.trainer.built, loop.trainer.state
    size = network.network_costs(built.units, state.params, state.mstate, trainer.data)
    stored = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes"))
    joined = f" of up to {n} neighbours" if (n := config.unit_size or 1) > 1 else ""
    print(
        f"{config.method}: {config.model} on {config.dataset}, "
        f"{len(built.units)} units{joined}, "
        f"{size.params:,} parameters ({loop.dense.params:,} dense), "
        f"on {jax.device_count()} {jax.default_backend()} device(s), about "
        f"{(built.held + stored) / 2**20:.0f} MiB a step; results in {loop.folder.path}\n"
        f"compiling the first step",
        flush=True,
    )
    if built.memory == "streamed" and (why := _whole_updates(built)):
        print(
            f"memory: streamed, but {why}, so the gradients of all are held at once; "
            "activations are not",
            flush=True,
        )
    if note := built.method.note:
        print(f"feedback: {note}{_reach(built)}", flush=True)


def _reach(built: build.Built) -> str:
    """How far gradients are exact where signals are direct, and what decides it."""
    if built.method.direct is None:
        return ""
    size, ahead = built.config.unit_size or 1, built.method.ahead
    found = [f"exact within joined units of up to {size}"] if size > 1 else []
    found += [f"{ahead} unit{'s' * (ahead > 1)} ahead"] if ahead else []
    return f"; {', '.join(found)} (unit_size, feedback_lookahead)" if found else ""


def _whole_updates(built: build.Built) -> str:
    """Why a streamed step cannot update one unit at a time; empty where it can."""
    if any(unit.shared for unit in built.units):
        return "units share parameters"
    alone = unitwise.split(built.optimizer, built.state.params)
    return "" if alone else "the optimiser looks at all units together, or does not say otherwise"
