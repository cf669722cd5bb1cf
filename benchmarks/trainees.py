"""Contestants that are trained: ours, and their peers in PyTorch, on the same batches.

    python -m benchmarks.trainees SETUP_JSON ENTRY_JSON

prints the numbers of `peak.Peak` as JSON.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peak, torch_step
from benchmarks.contestants import chain_settings
from ssa_jax.data import Dataset, Loader, load, make_loader, shrunk
from ssa_jax.runs import build
from ssa_jax.runs.config import Config
from ssa_jax.runs.network import make_model
from ssa_jax.training import costs, optim, train
from ssa_jax.types import Batch

CLASSES = 10
SIDE = 16
OURS, TORCH, BIOTORCH = "ssa_jax", "pytorch", "biotorch"
# biotorch's modes by the same name; our twin of each is the method of that name.
MODES = ("fa", "dfa", "usf", "frsf", "brsf")
RANK = 0.25
LOW_RANK = "low rank"


class Setup(NamedTuple):
    """What all contestants of a comparison share: network, batch, number of steps, first seed."""

    model: str
    batch: int
    steps: int
    seed: int = 0


class Entry(NamedTuple):
    """A library, and a method of it by the name in the table."""

    library: str
    method: str

    @property
    def factorized(self) -> bool:
        """Whether its layers are products of two thin ones."""
        return self.method in ("svd_bp", "ssa direct", "ssa", LOW_RANK)


def entries() -> list[Entry]:
    """Ours, and of the peers those that are installed."""
    names = ("bp", *MODES, "svd_bp", "ssa direct", "ssa")
    found = [Entry(OURS, name) for name in names]
    if torch_step.available():
        found += [Entry(TORCH, "bp"), Entry(TORCH, LOW_RANK)]
        if importlib.util.find_spec("biotorch"):
            found += [Entry(BIOTORCH, mode) for mode in MODES]
    return found


class Trainee(NamedTuple):
    """A network in training.

    Attributes:
      step: (batch) does one step and returns when it is done.
      accuracy: () -> share of the test images that are told right.
      params: number of trained parameters.
      every: steps between refreshes of the feedback; 0 without.
      refresh: one refresh.
    """

    step: Callable[[Any], Any]
    accuracy: Callable[[], float]
    params: int
    every: int = 0
    refresh: Callable[[], Any] = lambda: None


def data() -> Dataset:
    """CIFAR-10 of 16x16 pixels."""
    return shrunk(load("cifar10"), SIDE)


def noise(number: int = 512) -> Dataset:
    """Images of the same shape that need not be read."""
    images = np.random.default_rng(0).integers(0, 256, (number, SIDE, SIDE, 3), np.uint8)
    labels = np.arange(number, dtype=np.int32) % CLASSES
    return Dataset(images, labels, images, labels, CLASSES, crop=2, flip=True)


def config_of(setup: Setup, entry: Entry, images: Dataset) -> Config:
    """Default settings but for what the comparison fixes."""
    return Config(
        method="ssa" if entry.method == "ssa direct" else entry.method,
        model=setup.model,
        batch_size=setup.batch,
        epochs=-(-setup.steps // (images.train_size // setup.batch)),
        schedule_steps=setup.steps,
        seed=setup.seed,
        rank_init=RANK,
        feedback_lookahead=0 if entry.method == "ssa direct" else 1,
    )


def prepare(setup: Setup, entry: Entry, images: Dataset, loader: Loader) -> Trainee:
    """A contestant before its first step."""
    if entry.library == OURS:
        return _ours(config_of(setup, entry, images), images, loader)
    return _theirs(setup, entry, images, loader)


def _ours(config: Config, images: Dataset, loader: Loader) -> Trainee:
    built = build.build(config, images)
    step: Any = train.make_step(
        built.units, built.method, built.optimizer, built.weights, memory=built.memory
    )
    refresh, evaluate = train.make_refresh(built.method), train.make_eval(built.units)
    held = [built.state]

    def one(batch: Batch) -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    def renew() -> None:
        held[0] = jax.block_until_ready(refresh(held[0]))

    def accuracy() -> float:
        sums = [evaluate(held[0].params, held[0].mstate, b) for b in loader.test_batches()]
        return float(sum(s["accuracy"] for s in sums) / sum(s["count"] for s in sums))

    params = costs.parameters(built.state.params)
    return Trainee(one, accuracy, params, built.method.refresh_every, renew)


def _theirs(setup: Setup, entry: Entry, images: Dataset, loader: Loader) -> Trainee:
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    torch.manual_seed(setup.seed)
    # The weights with which ours of that seed start.
    twin = Entry(OURS, "svd_bp" if entry.factorized else "bp")
    config = config_of(setup, twin, images)
    network = torch_step.module(make_model(config, images, factorized=entry.factorized))
    if entry.library == BIOTORCH:
        network = bio_module(network, entry.method)
    loss_of = torch.nn.functional.cross_entropy
    takes_targets = (entry.library, entry.method) == (BIOTORCH, "dfa")
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=config.learning_rate, fused=True)
    rate = optim.learning_rate(chain_settings(setup.steps))
    rates = iter(np.asarray(jax.vmap(rate)(jnp.arange(setup.steps))).tolist())

    def step(batch: Any) -> float:
        inputs, labels = batch
        optimizer.param_groups[0]["lr"] = next(rates)
        optimizer.zero_grad(set_to_none=True)
        outputs = network(inputs, labels, loss_of) if takes_targets else network(inputs)
        loss = loss_of(outputs, labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    def accuracy() -> float:
        network.eval()
        right = counted = 0
        with torch.no_grad():
            for batch in loader.test_batches():
                inputs, labels = to_torch(batch)
                right += int((network(inputs).argmax(1) == labels).sum())
                counted += int((labels >= 0).sum())
        network.train()
        return right / counted

    return Trainee(step, accuracy, sum(p.numel() for p in trained))


def bio_module(network: Any, mode: str) -> Any:
    """The network with biotorch's layers in place of its own; its weights stay."""
    # Its layers for DFA take hooks that PyTorch calls deprecated.
    warnings.filterwarnings("ignore", "Using a non-full backward hook", FutureWarning)
    module = importlib.import_module("biotorch.module.biomodule")
    torch = importlib.import_module("torch")
    with contextlib.redirect_stdout(io.StringIO()):
        made = module.BioModule(network, mode=mode, copy_weights=True, output_dim=CLASSES)
    return made.to(memory_format=torch.channels_last)


def to_torch(batch: Batch) -> tuple[Any, Any]:
    """A batch of ours as tensors: images (batch, C, H, W), channels last in memory; labels."""
    torch = importlib.import_module("torch")
    inputs = torch.tensor(np.asarray(batch.images).transpose(0, 3, 1, 2))
    labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long)
    return inputs.contiguous(memory_format=torch.channels_last), labels


def batches(setup: Setup, loader: Loader) -> Generator[Batch]:
    """The augmented training batches of a seed, epoch after epoch."""
    key = jax.random.key(setup.seed)
    per_epoch = loader.train_size // setup.batch
    for step in range(setup.steps):
        if step % per_epoch == 0:
            epoch = loader.epoch(key, step // per_epoch, setup.batch)
        yield loader.batch_at(epoch, jnp.int32(step))


def one_core() -> None:
    """Binds this process to one CPU and its products to one thread; before JAX's first program.

    All programs go to the cache on disk, where there is one, so that `measure_peak` reads them.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    flags = os.environ.get("XLA_FLAGS", "")
    if "multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _warm_torch() -> None:
    """One tiny step: PyTorch imports parts of itself at the first use of an optimiser."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def measure_peak(setup: Setup, entry: Entry) -> peak.Peak:
    """The peak of this process, which should have done nothing before."""
    images = noise()
    loader = make_loader(images)
    batch: Any = next(batches(setup, loader))
    make_model(config_of(setup, Entry(OURS, "bp"), images), images, factorized=entry.factorized)
    if entry.library != OURS:
        batch = to_torch(batch)
        _warm_torch()
    if entry.library == BIOTORCH:
        importlib.import_module("biotorch.module.biomodule")

    def ready() -> Callable[[], Any]:
        trainee = prepare(setup, entry, images, loader)
        trainee.refresh()
        return lambda: trainee.step(batch)

    return peak.of(ready)


if __name__ == "__main__":
    one_core()
    about_setup, about_entry = map(json.loads, sys.argv[1:])
    print(json.dumps(measure_peak(Setup(*about_setup), Entry(*about_entry))))
