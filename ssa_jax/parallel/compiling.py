"""How programs are compiled, their cache on disk, and what compiling cost."""

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from ssa_jax.errors import ConfigError

# What stands between a traced function and a running program; tracing is left out, since JAX
# counts that of a function inside another twice. A program that the cache on disk holds spends
# its reading time in the second.
_EVENTS = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
OFF = "off"
# Programs that compile for so long are kept: a network is made by many that take less than the
# second from which on JAX keeps them.
KEPT_FROM_S = 0.1
# For each shape of a product on a GPU, Triton's tuner compiles dozens of kernels, and a network on
# factors has many shapes: 147 s for a step of VGG-13 on an H200, 25 s with cuBLAS alone.
_GPU_PRODUCTS = "--xla_gpu_enable_triton_gemm"


class Compiling:
    """Counts the compilations of the step, and the seconds that all programs took.

    Calling it counts one compilation. As a context it listens to JAX's own clock.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.seconds = 0.0

    def __call__(self) -> None:
        self.steps += 1

    def __enter__(self) -> "Compiling":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in _EVENTS:
            self.seconds += duration_secs


class Ahead:
    """Compiles programs in the background, before they are first called.

    Their calls then find them in JAX's own caches, and are what they are without it. One that
    fails to compile does so again where it is called, where its error is to be heard.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    @staticmethod
    def pays() -> bool:
        """Whether the host has nothing else to do: steps on a CPU would only become slower."""
        return jax.default_backend() != "cpu"

    def begin(
        self, calls: Sequence[tuple[Any, tuple[Any, ...]]],
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:  # fmt: skip
        """Compiles jitted programs for arguments such as these, one after the other.

        Args:
          calls: programs with their arguments, of which nothing is kept but their shapes.
          context: in which they are called; a thread does not take over those of another.
        """
        shapes = [(program, jax.tree.map(_shape, arguments)) for program, arguments in calls]

        def compile_all() -> None:
            with context():
                for program, arguments in shapes:
                    # Of a process that ends.
                    if not threading.main_thread().is_alive():
                        return
                    with contextlib.suppress(Exception):
                        program.lower(*arguments).compile()

        self.wait()
        # No daemon: an interpreter that ends while XLA compiles aborts.
        self._thread = threading.Thread(target=compile_all)
        self._thread.start()

    def wait(self) -> None:
        """Until all are compiled; nothing where none was begun."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    # JAX looks compiled programs up by where their arguments lie, too, if these may not move.
    sharding = x.sharding if x.committed else None
    weak = x.aval.weak_type
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding, weak_type=weak)


def leave_products_to_cublas() -> None:
    """Takes Triton out of the products of a GPU, unless XLA_FLAGS says something of it.

    Has an effect before JAX's first use of a device, and none on a CPU or TPU.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _GPU_PRODUCTS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_GPU_PRODUCTS}=false".strip()


def use_cache(folder: str | None) -> None:
    """Keeps compiled programs in a folder, so that a later run of the same shapes only reads them.

    Args:
      folder: where; `OFF` for nowhere. None leaves it to JAX where its own setting says
        something, and is ssa_jax/jax in the user's cache folder where it does not.

    Raises:
      ConfigError: the folder cannot be written.
    """
    if folder == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    settings = jax.config.values
    chosen = settings["jax_compilation_cache_dir"]
    if folder is None and (chosen or not settings["jax_enable_compilation_cache"]):
        return
    path = Path(folder) if folder else user_cache() / "jax"
    try:
        path.mkdir(parents=True, exist_ok=True)
        writable = os.access(path, os.W_OK)
    except OSError:
        writable = False
    if not writable and folder:
        raise ConfigError(f"--compile_cache: cannot write to {path}; name another folder, or off")
    if writable:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", str(path))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM_S)


def user_cache() -> Path:
    """The folder of this package in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ssa_jax"
