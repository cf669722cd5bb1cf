"""Settings of the whole test run, made before NumPy and JAX are imported."""

import os
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile much and compute little: with LLVM's optimisation off, and with the plainer of the
# code generators of fusions where jaxlib still has both, they take less time.
# What XLA itself does to a program, fusion and buffers among it, is as in use. The plug-in for GPUs
# aborts at flags that it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * (metadata.version("jaxlib").startswith("0.10.") and not find_spec("jax_cuda12_plugin")),
)
# Most of their time is compiling, and many tests and both workers compile the same programs: they
# share a cache, which lasts from run to run.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def other_peoples_code():
    """What Flax and users write broadcasts as it likes."""
    with jax.numpy_rank_promotion("allow"):
        yield
