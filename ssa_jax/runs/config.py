"""The settings of a run: every flag, its default and its range, in one place."""

import collections
import dataclasses
import os
from typing import Any

from ssa_jax.data import DATASETS
from ssa_jax.data.decoding import ON_CORRUPT
from ssa_jax.data.streams import STREAMS
from ssa_jax.errors import ConfigError
from ssa_jax.factors.retractions import PROJECTIONS, RETRACTIONS
from ssa_jax.methods import METHODS, ON_FACTORS
from ssa_jax.methods.feedback import FORMS
from ssa_jax.methods.local import READOUT_UPDATES, READOUTS
from ssa_jax.methods.ssa import PATHS, UPDATES
from ssa_jax.methods.walk import BASES
from ssa_jax.models import MODELS
from ssa_jax.settings import check, setting
from ssa_jax.training import record
from ssa_jax.training.budgets import KINDS
from ssa_jax.training.optim import OPTIMIZERS
from ssa_jax.training.passes import MEMORY_MODES
from ssa_jax.training.ranks import LINEAR_TARGET, SCHEDULES
from ssa_jax.training.tasks import LOSSES


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. The defaults train SSA on CIFAR-10 within a laptop's patience."""

    recipe: str = setting(
        "none", "Named settings, the defaults of the other flags; see experiments/recipes.py."
    )
    method: str = setting("ssa", "Learning method.", choices=METHODS, open=True)
    model: str = setting("smallconv", "Network.", choices=MODELS, open=True)
    dataset: str = setting(
        "cifar10", "Data set.", choices=collections.ChainMap(DATASETS, STREAMS), open=True
    )
    loss: str = setting("cross_entropy", "Loss that gives the error.", choices=LOSSES, open=True)
    data_dir: str | None = setting(None, "TFDS folder, or TFDS_DATA_DIR, or default.", path=True)
    validation: float = setting(
        0.0, "Share of the training images held out, on which is measured in place of the test "
        "set.", low=0.0, high=0.5,
    )  # fmt: skip
    train_size: int = setting(0, "Most training images, always the same; 0: all.", low=0)
    image_size: int = setting(0, "Side that images are brought to; 0: the usual one.", low=0)
    crop_area: float = setting(0.08, "Least share of a streamed image in a crop.", above=0, high=1)
    workers: int = setting(0, "Processes that decode a streamed data set; 0: threads.", low=0)
    on_corrupt: str = setting(
        "stop",
        "At a record of a streamed data set that cannot be decoded: stop, or take the next one.",
        choices=ON_CORRUPT,
    )
    drop_path: float = setting(
        0.0, "Chance that training goes around the last block; rises with depth.", low=0.0, high=0.9
    )
    factorize: str = setting(
        "auto", "Layers on factors; auto: on for ssa and svd_bp; all: also where that is dearer.",
        choices=("auto", "on", "off", "all"),
    )  # fmt: skip
    epochs: int = setting(10, "Passes over the training set.", low=1)
    max_steps: int = setting(0, "Stop after this many steps; 0: no limit.", low=0)
    schedule_steps: int = setting(
        0, "Length of the schedules of rate and ranks in steps; 0: all epochs.", low=0
    )
    precision: str = setting(
        "float32", "What hidden units compute in; the state stays float32.",
        choices=("float32", "bfloat16"),
    )  # fmt: skip
    memory: str = setting(
        "auto",
        "Keep what units' gradients need of the forward pass, or make it again piece by piece; "
        "auto: streamed where keeping it takes over half the device's memory and that spares any.",
        choices=("auto", *MEMORY_MODES),
    )
    batch_size: int = setting(128, "Examples in a step.", low=1)
    optimizer: str = setting(
        "adam",
        "Adaptive link of the chain; an optax transformation by package.module:name has a rate of "
        "its own.",
        choices=OPTIMIZERS,
        open=True,
    )
    learning_rate: float = setting(2e-3, "Peak learning rate.", above=0.0)
    warmup_steps: int = setting(
        0, "Steps over which the rate rises to its peak; 0: 5 % of the schedule.", low=0
    )
    weight_decay: float = setting(
        0.0, "Decay of kernels and of s apart from the gradient, times the rate (AdamW).", low=0.0
    )
    first_rate: float = setting(
        1.0, "Rate of the first unit over that of the last, geometric in between.", above=0.0
    )
    seed: int = setting(0, "Seed of all randomness.", low=0)
    workdir: str | None = setting(
        None, "Results' folder; default: a new one under runs/.", path=True
    )
    compile_cache: str | None = setting(
        None, "Folder of compiled programs, or 'off'; default: JAX_COMPILATION_CACHE_DIR, else "
        "ssa_jax/jax in the user's cache folder.", path=True,
    )  # fmt: skip
    steps_per_dispatch: int = setting(
        0, "Steps in one program, where nothing is due between them; 0: 1 on a CPU, else 10.", low=0
    )
    distributed: bool = setting(
        False, "One of several processes, as the TPU pod, SLURM or Open MPI tell it."
    )
    coordinator_address: str | None = setting(
        None, "HOST:PORT of the first of several processes, where nothing tells of them."
    )
    num_processes: int = setting(0, "Their number, with --coordinator_address.", low=0)
    process_id: int = setting(-1, "This one's, from 0, with --coordinator_address.", low=-1)
    batch_statistics: str = setting(
        "global", "Rows of a batch norm: all or a device's.", choices=("global", "device")
    )
    shard_params: bool = setting(False, "Each device keeps a part of U and V of every layer.")
    stages: int = setting(1, "Devices in a row, each with some of the units.", low=1)
    micro_batches: int = setting(1, "Parts in which a batch goes through the stages.", low=1)
    resume: bool = setting(False, "Go on from the newest checkpoint in --workdir.")
    save_every: int = setting(0, "Steps between checkpoints in an epoch; 0: at its end.", low=0)
    keep_checkpoints: int = setting(2, "Newest checkpoints to keep, beside the best one.", low=1)
    on_nan: str = setting(
        "stop", "When the loss is not finite: stop, or go back to the newest checkpoint at half "
        "the rate.", choices=("stop", "rollback"),
    )  # fmt: skip
    drift_bound: float = setting(
        1e-2, "Repair U and V after an epoch where |XᵀX - I| exceeds this; 0: never.", low=0.0
    )
    watch: bool = setting(False, "Diagnose after every epoch, not at the end alone.")
    callbacks: str = setting(
        "",
        "Called with the row of each epoch: csv, wandb, or package.module:name of a function that "
        "makes one for the run's folder; several by commas.",
    )
    tensorboard: bool = setting(False, "Write events for TensorBoard to the workdir, every epoch.")
    alpha: float = setting(1.0, "Coefficient of the task term.", low=0.0)
    beta: float = setting(0.0, "Coefficient of the alignment term.", low=0.0)
    gamma: float = setting(0.0, "Coefficient of the orthogonality term.", low=0.0)
    kappa: float = setting(0.0, "Coefficient of the cosine term.", low=0.0)
    label_smoothing: float = setting(0.0, "Label smoothing of the output loss.", low=0.0, high=0.9)
    hoyer: float = setting(1e-4, "Coefficient of the Hoyer term, where scheduled.", low=0.0)
    rank_schedule: str = setting("none", "How ranks fall.", choices=SCHEDULES, open=True)
    rank_init: float = setting(0.5, "Initial rank over full rank.", above=0.0, high=1.0)
    rank_target: float = setting(
        LINEAR_TARGET, "What the linear fall of linear and hybrid leaves of the initial rank, "
        "never below the floor.", above=0.0, high=1.0,
    )  # fmt: skip
    rank_floor: float = setting(0.3, "Lowest rank over the initial one.", low=0.0, high=1.0)
    rank_budget: float = setting(
        0.0, "Size where ranks end, over the dense network's: of none from the start, of linear "
        "its target, of adaptive its budget, of the others their floor; 0: none.",
        low=0.0, high=1.0,
    )  # fmt: skip
    budget_kind: str = setting("params", "Unit of --rank_budget.", choices=KINDS)
    rank_exclude: str = setting(
        "auto",
        "Layers that keep their rank: patterns, by commas, such as '0/*'; '' for none; auto: a "
        "first layer of fewer inputs than outputs, unless there is a budget.",
    )
    rank_cuts: int = setting(0, "Cuts of the energy rule; 0: one an epoch, ten at most.", low=0)
    energy: float = setting(0.95, "Energy share that the energy rule keeps.", above=0.0, high=1.0)
    feedback: str = setting("composed", "How the error reaches a unit.", choices=PATHS)
    feedback_update: str = setting("tracked", "How the twins move.", choices=UPDATES)
    feedback_every: int = setting(10, "Steps between refreshes of the feedback.", low=1)
    feedback_rate: float = setting(
        0.01, "Rate of mutual twins and of grape's paths, and kp's decay.", low=0.0, high=0.5
    )
    feedback_form: str = setting("auto", "Form of direct paths.", choices=FORMS)
    feedback_limit_mib: int = setting(256, "Most MiB of full (auto) or low-rank paths.", low=0)
    feedback_lookahead: int | None = setting(
        None, "Units a direct signal is pulled through; default: 1, of joined units 0.", low=0
    )
    feedback_rank: float = setting(
        1.0, "Share of each layer's directions that sequential feedback takes.", above=0.0, high=1.0
    )
    feedback_basis: str = setting("spectrum", "Which: largest |s|, or the error's.", choices=BASES)
    feedback_energy: float = setting(1.0, "Share of the error's energy.", above=0.0, high=1.0)
    unit_size: int | None = setting(
        None, "Units joined to one; default: 1, in direct ssa of over 8 hidden all but 2.", low=1
    )
    readout: str = setting("predsim", "Loss of a local readout.", choices=READOUTS)
    readout_update: str = setting("learned", "How readouts move.", choices=READOUT_UPDATES)
    readout_rate: float = setting(2e-3, "Adam's rate of learned readouts.", above=0.0)
    aux_depth: int = setting(3, "Most layers of an auxiliary network of auglocal.", low=0)
    warmup_method: str = setting(
        "none", "Method of the first --warmup_epochs or --warmup_until, on the same weights.",
        choices=collections.ChainMap({"none": None}, METHODS),
    )  # fmt: skip
    warmup_epochs: int = setting(1, "Epochs of --warmup_method.", low=1)
    warmup_until: int = setting(0, "Its steps, in place of --warmup_epochs; 0: those.", low=0)
    local_weight: float = setting(0.0, "Share of local readouts in the signals of ssa.", low=0.0)
    projection: str = setting("stiefel", "Tangent projection.", choices=tuple(PROJECTIONS))
    retraction: str = setting("series", "Retraction.", choices=tuple(RETRACTIONS))
    retract_every: int = setting(1, "Steps between retractions.", low=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("path") and value:
                object.__setattr__(self, field.name, os.path.expanduser(value))

    @property
    def factorized(self) -> bool:
        """Whether the layers hold factors."""
        return self.method in ON_FACTORS if self.factorize == "auto" else self.factorize != "off"

    @property
    def staged(self) -> bool:
        """Whether steps go over stages, be it one, in micro-batches."""
        return self.stages > 1 or self.micro_batches > 1

    def validate(self) -> None:
        """Checks every field against its limits.

        Raises:
          ConfigError: one line that names the flag, its value and what it may be.
        """
        check(self)
        if self.rank_schedule == "adaptive" and self.factorized and not self.rank_budget:
            raise ConfigError("--rank_schedule=adaptive needs --rank_budget, such as 0.3")
        for flag in ("rank_budget", "shard_params"):
            if getattr(self, flag) and not self.factorized:
                raise ConfigError(f"--{flag} needs a factorised model: --factorize=on")
        if self.weight_decay and self.optimizer not in OPTIMIZERS:
            raise ConfigError("--weight_decay is for adam and momentum; others have their own")
        if self.image_size and self.dataset not in (*STREAMS, *DATASETS):
            named = ", ".join((*STREAMS, *DATASETS))
            raise ConfigError(f"--image_size is for {named}, not {self.dataset}")
        if self.steps_per_dispatch > 1 and self.dataset in STREAMS:
            raise ConfigError("--steps_per_dispatch must be 1 on a streamed data set")
        if self.resume and not self.workdir:
            raise ConfigError("--resume needs --workdir, the folder of the run to go on with")


# Flags that say where, how far and how safely to run, not what the run is; nor does the name under
# which settings were given.
_NOT_IDENTITY = (
    "recipe", "workdir", "resume", "data_dir", "max_steps", "save_every", "keep_checkpoints",
    "on_nan", "compile_cache", "watch", "callbacks", "tensorboard", "workers", "on_corrupt",
    "shard_params", "stages", "distributed", "coordinator_address", "num_processes", "process_id",
)  # fmt: skip

# What a run did before a setting was there: by default a new one changes nothing, but for these.
BEFORE = {**dataclasses.asdict(Config()), "feedback_lookahead": 0, "unit_size": 1}


def identity(config: Config | dict[str, Any]) -> dict[str, Any]:
    """The settings that two runs must share for one to go on with the other's checkpoint.

    One that a stored run lacks has the value by which it changes nothing.
    """
    values = {**BEFORE, **config} if isinstance(config, dict) else dataclasses.asdict(config)
    return {k: v for k, v in values.items() if k not in _NOT_IDENTITY}


def differences(config: Config, stored: dict[str, Any]) -> str:
    """The identity settings in which a run differs from a stored one, as one phrase."""
    return record.of_settings(identity(config), identity(stored))
