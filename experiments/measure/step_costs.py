"""What a training step costs: time, methods side by side, and memory, as the compiler plans it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.measure.timing import Contestant, contestant, side_by_side
from ssa_jax.reporting.environment import environment
from ssa_jax.runs import build, inputs
from ssa_jax.runs.config import Config
from ssa_jax.runs.inputs import Data
from ssa_jax.training import train
from ssa_jax.types import Batch, TrainState


def measure(configs: dict[str, Config], rounds: int, data: Data) -> dict[str, Any]:
    """Costs of the step of every configuration, at its initial ranks.

    `ms` is the median of a step, with its share of a refresh of the feedback: that is a program
    of its own, run every `refresh_every` steps. `bytes` is what the compiled step holds at its
    peak: arguments, outputs and temporary arrays, less the donated ones; None where the backend
    does not tell.

    Args:
      configs: by name; one data set and batch size.
      rounds: measured calls of each.
      data: that data set; a stream is not read, see `inputs.first_examples`.

    Returns:
      Hardware, versions, commit, device, batch size, and `costs` by name, with model and data set.
    """
    first = next(iter(configs.values()))
    batch = Batch(*map(jnp.asarray, inputs.first_examples(data, first.batch_size)))
    contestants: list[Contestant] = []
    costs: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        built = build.build(config, data)
        step: Any = train.make_step(
            built.units, built.method, built.optimizer, built.weights, memory=built.memory
        )
        compiled = step.lower(built.state, batch).compile()
        every = built.method.refresh_every
        costs[name] = {
            "model": config.model,
            "dataset": config.dataset,
            "bytes": _bytes(compiled.memory_analysis()),
            "refresh_every": every,
        }
        contestants.append(_step(compiled, built.state, batch))
        refresh = train.make_refresh(built.method) if every else lambda state: None
        contestants.append(contestant(refresh, built.state))
    timings = iter(side_by_side(contestants, rounds))
    for cost in costs.values():
        step_time, refresh_time = next(timings), next(timings)
        every = cost["refresh_every"]
        refresh_ms = refresh_time.median_ms if every else 0.0
        cost |= {
            "ms": step_time.median_ms + refresh_ms / max(1, every),
            "step_ms": step_time.median_ms,
            "step_min_ms": step_time.min_ms,
            "step_rounds": step_time.rounds,
            "refresh_ms": refresh_ms,
        }
    return {
        **environment(),
        "device": jax.devices()[0].device_kind,
        "batch_size": first.batch_size,
        "costs": costs,
    }


def _step(compiled: Callable[..., Any], state: TrainState, batch: Batch) -> Contestant:
    copies: list[TrainState] = []

    def prepare() -> None:
        # The step is donated its state, which deletes it.
        copies.append(jax.block_until_ready(jax.tree.map(jnp.copy, state)))

    return prepare, lambda: jax.block_until_ready(compiled(copies.pop(), batch))


def _bytes(memory: Any) -> int | None:
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
