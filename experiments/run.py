"""The training loop of one run, from a config to a summary."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments import build, plots, workdir
from experiments.compiling import Compiling, use_cache
from experiments.config import Config
from experiments.flags import NotFiniteError
from experiments.interrupt import Interruptible
from experiments.workdir import Workdir
from ssa_jax import data as data_lib
from ssa_jax import metrics, ranks, train
from ssa_jax.checkpoint import Checkpoints
from ssa_jax.data import Dataset, Loader
from ssa_jax.train import Batch, TrainState

Array = jax.Array
Row = dict[str, Any]

# Examples of the fixed batch on which angles and loss terms are measured.
PROBE_SIZE = 512


class Programs(NamedTuple):
    """The jitted functions of a run."""

    step: train.Step
    refresh: Callable[[TrainState], TrainState]
    evaluate: Callable[..., dict[str, Array]]
    probe: Callable[[TrainState, Batch], metrics.Probe]


def run(config: Config, data: Dataset | None = None) -> Row:
    """Trains one configuration and returns its summary, which is also in its workdir.

    Args:
      config: the run.
      data: its data set, where the caller has it already.

    Raises:
      ConfigError, DataError, WorkdirError, CheckpointError: nothing was overwritten.
      NotFiniteError: the loss or a parameter became NaN or infinite; the newest checkpoint is
        the last good state.
      KeyboardInterrupt: after Ctrl-C, with a message that says how to go on.
    """
    config.validate()
    use_cache(config.compile_cache)
    data = data or data_lib.load(config.dataset, config.data_dir)
    built = build.build(config, data)
    folder = workdir.reopen(config) if config.resume else workdir.create(config)
    checkpoints = Checkpoints(folder.checkpoints)
    with Interruptible() as interrupt, Compiling() as compiling:
        try:
            return _Run(config, data, built, folder, checkpoints, interrupt, compiling).go()
        finally:
            checkpoints.close()


class _Run:
    """The state of a run between epochs."""

    def __init__(
        self,
        config: Config,
        data: Dataset,
        built: build.Built,
        folder: Workdir,
        checkpoints: Checkpoints,
        interrupt: Interruptible,
        compiling: Compiling,
    ):
        self.config, self.data, self.built = config, data, built
        self.folder, self.checkpoints, self.interrupt = folder, checkpoints, interrupt
        self.compiling = compiling
        self.programs = Programs(
            train.make_step(
                built.units, built.method, built.optimizer, built.weights, self.compiling
            ),
            train.make_refresh(built.method),
            train.make_eval(built.units),
            metrics.make_probe(built.units, built.method, built.weights),
        )
        self.loader: Loader = data_lib.make_loader(data)
        self.state, self.epoch, self.earlier_s = built.state, 0, 0.0
        self.dense = build.dense_costs(config, data)
        self.started = time.monotonic()

    def go(self) -> Row:
        """Trains to the end and writes the summary, whatever the end is."""
        if self.config.resume:
            self.epoch, self.state = self.checkpoints.restore(self.state)
            self.folder.keep_rows(self.epoch)
            self.earlier_s = max((row["wall_s"] for row in self.folder.rows()), default=0.0)
        else:
            # The last good state of a run that fails in its first epoch.
            self.checkpoints.save(0, self.state)
        if self.built.method.note:
            print(f"feedback: {self.built.method.note}", flush=True)
        try:
            while self.epoch < self.config.epochs and not self._stopped():
                self._epoch()
        except NotFiniteError:
            self._finish("not_finite")
            raise
        except KeyboardInterrupt:
            self._finish("interrupted")
            raise KeyboardInterrupt(
                f"interrupted; {self.epoch} epochs are kept, go on with the same flags and "
                f"--workdir={self.folder.path} --resume"
            ) from None
        return self._finish("stopped" if self.epoch < self.config.epochs else "finished")

    def _stopped(self) -> bool:
        return 0 < self.config.max_steps <= int(self.state.step)

    def _epoch(self) -> None:
        begun = time.monotonic()
        row = self._train_epoch()
        seconds = time.monotonic() - begun
        row |= self._evaluate()
        self._check_finite(row["test_loss"], train.all_finite(self.state))
        row |= self._probe()
        row |= self._compact(row)
        row |= {
            "epoch": self.epoch + 1,
            "step": int(self.state.step),
            "ranks": train.ranks(self.state.params),
            "images_per_second": row["images"] / seconds,
            "compiles": self.compiling.steps,
            "compile_s": self.compiling.seconds,
            "wall_s": self.earlier_s + time.monotonic() - self.started,
        }
        complete = row["images"] == self.built.steps_per_epoch * self.config.batch_size
        self.folder.log(row)
        print(_line(row, self.config.epochs), flush=True)
        if complete:
            self.epoch += 1
            self.checkpoints.save(self.epoch, self.state)

    def _train_epoch(self) -> Row:
        """One pass over the training set, in the order that seed and epoch give."""
        size = self.config.batch_size
        order_key, crop_key = jax.random.split(self.state.key)
        order = np.asarray(data_lib.epoch_order(order_key, self.epoch, self.loader.train_size))
        every = self.built.method.refresh_every
        first = self.epoch * self.built.steps_per_epoch
        last = first + self.built.steps_per_epoch
        if self.config.max_steps:
            last = min(last, self.config.max_steps)
        history: list[dict[str, Array]] = []
        with tqdm(
            total=(last - first) * size,
            unit="img",
            desc=f"epoch {self.epoch + 1}/{self.config.epochs}",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for step in range(first, last):
                self.interrupt.check()
                if every and step % every == 0:
                    self.state = self.programs.refresh(self.state)
                index = order[(step - first) * size : (step - first + 1) * size]
                batch = self.loader.train_batch(jax.random.fold_in(crop_key, step), index)
                self.state, measured = self.programs.step(self.state, batch)
                # One step late, so that the device never waits for the host.
                if history:
                    self._check_finite(history[-1]["loss"])
                history.append(measured)
                bar.update(size)
        self._check_finite(history[-1]["loss"])
        mean = {k: float(np.mean([float(h[k]) for h in history])) for k in ("loss", "accuracy")}
        return {
            "train_loss": mean["loss"],
            "train_accuracy": mean["accuracy"],
            "images": len(history) * size,
            "learning_rate": float(self.built.learning_rate(last - 1)),
            **_truncations(history),
        }

    def _check_finite(self, loss: Any, rest: bool = True) -> None:
        if math.isfinite(float(loss)) and rest:
            return
        raise NotFiniteError(
            f"loss or parameters are not finite in epoch {self.epoch + 1}; the state after epoch "
            f"{self.epoch} is kept in {self.folder.checkpoints}; try a lower --learning_rate than "
            f"{self.config.learning_rate}"
        )

    def _evaluate(self) -> Row:
        results = [
            self.programs.evaluate(self.state.params, self.state.mstate, batch)
            for batch in self.loader.test_batches()
        ]
        n = len(self.data.test_labels)
        return {
            "test_loss": sum(float(r["loss"]) for r in results) / n,
            "test_accuracy": sum(int(r["correct"]) for r in results) / n,
        }

    def _probe(self) -> Row:
        index = np.arange(min(PROBE_SIZE, self.loader.train_size))
        probe = self.programs.probe(self.state, self.loader.fixed_batch(index))
        return {
            "angles": _degrees(probe.angles),
            "weight_angles": _degrees(probe.weight_angles),
            "signal_angles": _degrees(probe.signal_angles),
            "subspace_angles": _degrees(probe.subspace_angles),
            "gradient_ratios": [float(r) for r in probe.gradient_ratios],
            "signal_ratios": [float(r) for r in probe.signal_ratios],
            "drift": float(probe.drift),
            **{f"local_{k}": [float(x) for x in v] for k, v in probe.terms.items()},
        }

    def _compact(self, evaluated: Row) -> Row:
        """Slices away what truncation zeroed, and evaluates again to show that nothing moved."""
        # Once the schedules have ended ranks are stored as they are: a budget is met exactly, and
        # no step is compiled for them any more.
        last = int(self.state.step) >= self.built.total_steps
        chosen = ranks.selection(self.state.params, 1 if last else None)
        if not chosen:
            return {}
        # Paths that were built at the old ranks are built anew; every other shape was sliced.
        self.state = self.programs.refresh(ranks.compact(self.state, chosen))
        return {
            "test_accuracy_before_compaction": evaluated["test_accuracy"],
            "test_loss_before_compaction": evaluated["test_loss"],
            **self._evaluate(),
        }

    def _finish(self, status: str) -> Row:
        rows = self.folder.rows()
        last: Row = rows[-1] if rows else {}
        size = build.network_costs(
            self.built.units, self.state.params, self.state.mstate, self.data
        )
        config = self.config
        summary = {
            "status": status,
            "method": config.method,
            "model": config.model,
            "dataset": config.dataset,
            "seed": config.seed,
            "epochs": self.epoch,
            "steps": int(self.state.step),
            "factorized": config.factorized,
            "rank_schedule": config.rank_schedule,
            "feedback": config.feedback if config.method == "ssa" else None,
            "feedback_note": self.built.method.note,
            "test_accuracy": last.get("test_accuracy"),
            "train_loss": last.get("train_loss"),
            "angles": last.get("angles"),
            "weight_angles": last.get("weight_angles"),
            "signal_angles": last.get("signal_angles"),
            "drift": last.get("drift"),
            "params": size.params,
            "params_ratio": size.params / self.dense.params,
            "macs": size.macs,
            "macs_ratio": size.macs / self.dense.macs,
            "ranks": train.ranks(self.state.params),
            "rank_fraction": build.rank_fraction(self.state.params),
            "compiles": self.compiling.steps,
            "compile_s": self.compiling.seconds,
            "wall_s": self.earlier_s + time.monotonic() - self.started,
            "commit": workdir.commit(),
            "workdir": str(self.folder.path),
        }
        self.folder.write_json("summary.json", summary)
        print(
            f"step compiled {self.compiling.steps} times; all programs took "
            f"{self.compiling.seconds:.1f} s to compile",
            flush=True,
        )
        if rows:
            plots.draw(rows, self.folder.plots)
        return summary


def _truncations(history: list[dict[str, Array]]) -> Row:
    """How many steps truncated, and the loss before and after where it rose most."""
    before, after = (
        np.array([float(h.get(f"loss_{when}_truncation", math.nan)) for h in history])
        for when in ("before", "after")
    )
    cuts = np.flatnonzero(~np.isnan(before))
    if not cuts.size:
        return {}
    worst = cuts[np.argmax((after - before)[cuts])]
    return {
        "truncations": int(cuts.size),
        "loss_before_truncation": float(before[worst]),
        "loss_after_truncation": float(after[worst]),
    }


def _degrees(angles: Iterable[Array | None]) -> list[float | None]:
    return [None if a is None else round(float(a), 3) for a in angles]


def _line(row: Row, epochs: int) -> str:
    hidden = row["angles"][:-1]
    stored = list(row["ranks"].values())
    parts = [
        f"epoch {row['epoch']}/{epochs}",
        f"loss {row['train_loss']:.4f}",
        f"test {100 * row['test_accuracy']:.2f} %",
        f"angle {sum(hidden) / max(1, len(hidden)):.1f}°",
        f"ranks {stored}" if stored else "",
        f"{row['images_per_second']:.0f} img/s",
        f"{row['wall_s']:.0f} s",
    ]
    return "  ".join(p for p in parts if p)
