"""Several processes of `benchmarks.gpu_worker` side by side, each of which may die or hang."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
# JAX otherwise takes most of a GPU's memory for the first process.
_SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Weights are made in JAX and copied; the device is PyTorch's.
_BESIDE_TORCH = {"JAX_PLATFORMS": "cpu"}


class Worker:
    """A process, the rows that it has said and what became of it.

    Attributes:
      case: what it was asked for.
      ready: its first row, once it is there.
    """

    def __init__(self, case: Row, log: Path, events: "queue.Queue[tuple[Worker, Row | None]]"):
        self.case, self._log = case, log
        self.ready: Row | None = None
        extra = _SHARED | (_BESIDE_TORCH if case["kind"] == "torch" else {})
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_worker", json.dumps(case)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT,
                env={**os.environ, **extra},
            )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=(events,), daemon=True)
        self._listener.start()

    def _listen(self, events: "queue.Queue[tuple[Worker, Row | None]]") -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            events.put((self, json.loads(line)))
        events.put((self, None))

    def ask(self) -> None:
        """Asks for one more timing."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> None:
        """Ends the process, if it has not ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        # What the process started itself may hold its output open a while.
        self._listener.join(timeout=2)
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        if not self._listener.is_alive():
            self._process.stdout.close()

    def last_words(self) -> str:
        """The last line of its errors."""
        lines = [x.strip() for x in self._log.read_text(errors="replace").splitlines() if x.strip()]
        return f"exit {self._process.wait()}: {lines[-1][:300] if lines else 'no message'}"


class Crew:
    """Starts workers, hears them, and leaves none behind.

    Args:
      logs: folder of their errors.
      jobs: how many may prepare at once; by default one for two CPUs.
    """

    def __init__(self, logs: Path, jobs: int | None = None):
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self._jobs = jobs or max(2, (os.cpu_count() or 2) // 2)
        self._events: queue.Queue[tuple[Worker, Row | None]] = queue.Queue()
        self._workers: list[Worker] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()

    def hear(self, cases: Sequence[Row], until: float) -> Iterator[tuple[Row, Worker | None, Any]]:
        """What workers say while they start: (case, worker, row).

        A worker's place is free for the next once it is ready or has ended. The row is None of
        one that ended; worker and row are None of a case that had no turn.

        Args:
          cases: in the order in which they start.
          until: of `time.monotonic`, after which no more is waited for.
        """
        waiting, busy = list(cases), set[Worker]()
        while waiting or busy:
            while waiting and len(busy) < self._jobs and time.monotonic() < until:
                busy.add(self._start(waiting.pop(0)))
            try:
                worker, row = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if row and row.get("ready"):
                worker.ready = row
            if row is None or worker.ready:
                busy.discard(worker)
            yield worker.case, worker, row
        for worker in busy:
            worker.end()
            yield worker.case, worker, {"late": True}
        for case in waiting:
            yield case, None, None

    def time(self, worker: Worker, seconds: float) -> Row | None:
        """One timing of a worker that is ready; None of one that has ended or takes too long."""
        try:
            worker.ask()
            while True:
                said, row = self._events.get(timeout=seconds)
                if said is worker:
                    return row
        except (OSError, queue.Empty):
            worker.end()
            return None

    def _start(self, case: Row) -> Worker:
        log = self._logs / f"{len(list(self._logs.iterdir())):03d}-{case['name']}.log"
        worker = Worker(case, log, self._events)
        self._workers.append(worker)
        return worker
