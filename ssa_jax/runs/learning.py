"""The task, the method and the optimiser that a config names."""

import math
from typing import Any

import optax

from ssa_jax.errors import ConfigError
from ssa_jax.methods import METHODS, FeedbackOptions, Method, Network, blend, relay
from ssa_jax.methods.base import streams
from ssa_jax.plugins import find
from ssa_jax.runs.config import Config
from ssa_jax.runs.given import NOTHING, Given
from ssa_jax.training.optim import OPTIMIZERS
from ssa_jax.training.tasks import LOSSES, Task, cross_entropy, from_function


def make_tasks(config: Config, given: Given = NOTHING) -> tuple[Task, Task]:
    """The task whose loss is descended, and the one that is measured: the same, not smoothed.

    Raises:
      ConfigError: a smoothing of another loss than cross-entropy.
    """
    loss = given.loss or find("loss", config.loss, LOSSES)
    if config.label_smoothing and loss is not cross_entropy:
        raise ConfigError(
            f"--label_smoothing is for --loss=cross_entropy, not --loss={config.loss}"
        )
    if loss is cross_entropy:
        return cross_entropy(config.label_smoothing), cross_entropy()
    if loss in LOSSES.values():
        loss = loss()
    task = loss if isinstance(loss, Task) else from_function(loss)
    return task, task


def optimizer_of(config: Config, given: Given) -> Any:
    """A name in `OPTIMIZERS`, or a whole optax optimiser."""
    if given.optimizer is None and config.optimizer in OPTIMIZERS:
        return config.optimizer
    optimizer = given.optimizer or find("optimizer", config.optimizer, OPTIMIZERS)
    if not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optimizer()
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ConfigError(f"--optimizer={config.optimizer} is no optax.GradientTransformation")
    return optimizer


# Losses that compare every output with a target of its own.
_ONE_TO_ONE = ("mean_squared_error", "binary_cross_entropy")


def check_outputs(task: Task, shape: tuple[int, ...], wanted: int) -> None:
    """Raises ConfigError for a model whose outputs do not fit the targets."""
    given = math.prod(shape)
    if task.classes and shape[-1] < wanted:
        raise ConfigError(
            f"the model gives {shape[-1]} outputs, and the data have {wanted} classes, labels 0 to "
            f"{wanted - 1}; give it an output for each"
        )
    if task.name in _ONE_TO_ONE and given != wanted:
        raise ConfigError(
            f"the model gives {given} outputs for an example, and the data have {wanted} targets; "
            f"{task.name} compares one with one"
        )


def make_methods(config: Config, network: Network, given: Given = NOTHING) -> tuple[Method, Method]:
    """The methods that a config names, of its warm-up and of the rest; one and the same without.

    Blended with local readouts where it asks for them.
    """
    assert config.feedback_lookahead is not None, "the network decides it"
    options = FeedbackOptions(
        path=config.feedback,
        update=config.feedback_update,
        every=config.feedback_every,
        rate=config.feedback_rate,
        form=config.feedback_form,
        limit=config.feedback_limit_mib * 2**20,
        lookahead=config.feedback_lookahead,
        rank=config.feedback_rank,
        basis=config.feedback_basis,
        energy=config.feedback_energy,
        readout=config.readout,
        readout_update=config.readout_update,
        readout_rate=config.readout_rate,
        aux_depth=config.aux_depth,
    )
    method = (given.method or find("method", config.method, METHODS))(network, options)
    if config.method == "ssa" and config.local_weight:
        method = blend(method, METHODS["local"](network, options), config.local_weight)
    warmup = method
    if config.warmup_method != "none":
        warmup = METHODS[config.warmup_method](network, options)
    if config.memory == "streamed":
        _require_streams({"method": method, "warmup_method": warmup}, config)
    return (method, method) if warmup is method else relay(warmup, method)


def _require_streams(methods: dict[str, Method], config: Config) -> None:
    """Raises ValueError for the first of the methods, by flag, whose steps cannot be streamed."""
    for flag, method in methods.items():
        if not streams(method):
            raise ValueError(
                "--memory=streamed needs signals made of the output error, and "
                f"--{flag}={getattr(config, flag)}, as set here, reads the tape of the forward "
                "pass; give --memory=taped or auto"
            )
