"""The folder of a run: config.json, metrics.jsonl, summary.json, checkpoints/, plots/."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from ssa_jax.parallel import mesh
from ssa_jax.reporting.environment import commit, hardware
from ssa_jax.runs.config import Config, differences
from ssa_jax.training.record import versions

LOCK = ".lock"


class WorkdirError(ValueError):
    """The folder cannot be written, or belongs to another run."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none that can be read."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


class Workdir:
    """Files of one run. Created by `create` or `reopen`.

    Attributes:
      ours: whether this process writes them.
    """

    ours = True

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.plots = path / "plots"

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file whole or not at all."""
        write_json(self.path / name, value)

    def log(self, row: dict[str, Any]) -> None:
        """Appends one object to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """The objects of metrics.jsonl in order of epochs, of several of one epoch the last.

        A last line cut short by a crash is left out.
        """
        file = self.path / "metrics.jsonl"
        rows = []
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        by_epoch = {row["epoch"]: row for row in rows}
        return [by_epoch[epoch] for epoch in sorted(by_epoch)]

    def keep_rows(self, epochs: int) -> None:
        """Drops what was logged after `epochs` epochs, which a resumed run will log again."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["epoch"] <= epochs]
        write_text(self.path / "metrics.jsonl", "".join(kept))


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds a run's folder against other processes that would write it.

    The lock is the system's and this process's own: it ends with it, however it ends, and does not
    pass to its children.

    Raises:
      WorkdirError: another process holds it.
    """
    with (path / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            other = file.read().strip() or "that has not said its number"
            raise WorkdirError(
                f"{path} is in use by process {other}; stop it or wait for its end, or give "
                "another --workdir"
            ) from e
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Elsewhere(Workdir):
    """The workdir in a process that leaves it to the first one: rows are kept in memory."""

    ours = False

    def __init__(self, path: Path):
        super().__init__(path)
        self._rows: list[dict[str, Any]] = []

    def write_json(self, name: str, value: Any) -> None:
        """Writes nothing."""

    def log(self, row: dict[str, Any]) -> None:
        """Keeps one object."""
        self._rows.append(row)

    def rows(self) -> list[dict[str, Any]]:
        """What was logged by this process."""
        return list(self._rows)

    def keep_rows(self, epochs: int) -> None:
        """Drops what was logged after `epochs` epochs."""
        self._rows = [row for row in self._rows if row["epoch"] <= epochs]


def of_all(opened: Callable[[], Workdir]) -> Workdir:
    """The folder that the first process opens, or its error, in all of them.

    Raises:
      WorkdirError: what `opened` raises in the first process.
    """
    if jax.process_count() == 1:
        return opened()
    folder, error = None, ""
    if jax.process_index() == 0:
        try:
            folder = opened()
        except WorkdirError as e:
            error = str(e)
    path = mesh.from_first(str(folder.path.resolve()) if folder else "")
    error = mesh.from_first(error)
    if error:
        raise WorkdirError(error)
    return folder or Elsewhere(Path(path))


def create(config: Config) -> Workdir:
    """A new folder for a run, with its config.json.

    Raises:
      WorkdirError: it cannot be written, or holds something already.
    """
    path = Path(config.workdir or default_path(config, f"seed{config.seed}"))
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A process killed in this function leaves a temporary file or a lock at most.
        if any(p.suffix != ".tmp" and p.name != LOCK for p in path.iterdir()):
            raise WorkdirError(_occupied(path, config))
        workdir = Workdir(path)
        workdir.write_json("config.json", _record(config))
        for folder in (workdir.checkpoints, workdir.plots):
            folder.mkdir()
    except OSError as e:
        raise WorkdirError(f"cannot write to {path}: {e.strerror}; give another --workdir") from e
    return workdir


def reopen(config: Config) -> Workdir:
    """The folder of an earlier run of the same settings.

    Raises:
      WorkdirError: there is no such run, or its settings differ.
    """
    path = Path(str(config.workdir))
    stored = stored_config(path)
    if stored is None:
        raise WorkdirError(f"{path} holds no run to resume: config.json is missing or damaged")
    check_same(path, config, stored)
    if not os.access(path, os.W_OK):
        raise WorkdirError(f"cannot write to {path}")
    workdir = Workdir(path)
    for folder in (workdir.checkpoints, workdir.plots):
        folder.mkdir(exist_ok=True)
    return workdir


def check_same(path: Path, config: Config, stored: dict[str, Any]) -> None:
    """Raises WorkdirError where the settings stored in a folder are those of another run."""
    if different := differences(config, stored):
        raise WorkdirError(f"{path} is a run of another configuration: {different}")


def default_path(config: Config, which: str) -> Path:
    """A new folder under runs/ for a run, or for several, `which` being the end of its name."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{stamp}-{config.dataset}-{config.model}-{config.method}-{which}"
    path = Path("runs") / name
    return path if not path.exists() else path.with_name(f"{name}-{os.getpid()}")


def runs_in(folder: Path) -> list[Path]:
    """The folder of a run by itself; of a folder of several seeds, theirs in order."""
    seeds = {
        int(path.name.removeprefix("seed")): path
        for path in folder.glob("seed*")
        if path.name.removeprefix("seed").isdigit() and stored_config(path)
    }
    single = not seeds or (folder / "config.json").exists()
    return [folder] if single else [seeds[seed] for seed in sorted(seeds)]


def stored_config(path: Path) -> dict[str, Any] | None:
    """The config of the run in a folder, or None where there is none that can be read."""
    config = read_json(path / "config.json").get("config")
    return config if isinstance(config, dict) else None


def _occupied(path: Path, config: Config) -> str:
    stored = stored_config(path)
    if stored is None:
        return f"{path} is not empty and holds no run; give another --workdir"
    different = differences(config, stored)
    what = f"of another configuration ({different})" if different else "of these settings"
    return f"{path} holds a run {what}; give another --workdir" + (
        "" if different else ", or --resume to go on with it"
    )


def _record(config: Config) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
