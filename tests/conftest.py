"""Settings of the whole test run, made before NumPy and JAX are imported."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile much and compute little: with LLVM's optimisation off they take less time.
# What XLA itself does to a program, fusion and buffers among it, is as in use.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# A test that asks for a cache of compiled programs turns it on again.
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
