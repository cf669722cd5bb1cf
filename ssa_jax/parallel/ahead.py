"""Programs compiled for accelerators that this machine does not have, and what they hold.

XLA compiles from a description of a device. What a program is, its kernels, loops, collectives
and memory, is then known without one; how long it takes is not, but for a bound from its rates.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ssa_jax.errors import ConfigError
from ssa_jax.factors.linalg import traced_for
from ssa_jax.parallel.collectives import collectives
from ssa_jax.parallel.mesh import AXIS, Layout, staged_mesh

Tree = Any


class Rates(NamedTuple):
    """What a device does at most, by its maker.

    Attributes:
      memory: bytes.
      bandwidth: of that, bytes a second.
      products: multiply-accumulates a second of float32 arrays as jax multiplies them by default
        (TF32 on a GPU, one pass of bfloat16 on a TPU).
    """

    memory: float
    bandwidth: float
    products: float


# NVIDIA's data sheet of the H100 SXM (dense TF32); Google Cloud's pages on TPU v5e and v5p.
RATES = {
    "h100": Rates(80e9, 3.35e12, 495e12 / 2),
    "v5e": Rates(16e9, 819e9, 197e12 / 2),
    "v5p": Rates(95e9, 2765e9, 459e12 / 2),
}

# What XLA asks a GPU about itself: its limits, from CUDA's tables for compute capability 9.0.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: as it was asked for.
      layout: of a mesh of them.
      platform: as jax names theirs.
      rates: of one.
      options: of the compiler. On a GPU products are not tuned, which needs the device; a run
        that tunes them compiles longer.
    """

    name: str
    layout: Layout
    platform: str
    rates: Rates
    options: dict[str, Any]


def target(name: str, stages: int = 0) -> Target:
    """``"h100"``, ``"h100x8"`` for several, or a slice as ``"v5e:4x4"`` or ``"v5p:4x4x4"``.

    Args:
      name: of them.
      stages: in which they stand in rows, of a step over stages; else 0.

    Raises:
      ConfigError: an unknown name, stages that do not divide the devices, or a compiler that is not
        installed.
    """
    found = re.fullmatch(r"(h100)(?:x([1-9]\d*))?|(v5e|v5p):.+", name)
    if found is None:
        known = "h100, v5e:AxB or v5p:AxBxC"
        raise ConfigError(f"a target is {known}, got {name!r}; several GPUs are h100xN")
    gpu, number, tpu = found.groups()
    # A plug-in asks for its device before it compiles for one, unless another platform is chosen.
    jax.config.update("jax_platforms", "cpu")
    try:
        devices = _gpus(name, number or "1") if gpu else _tpu(name)
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError) as e:
        extra = "aot-cuda" if gpu else "aot-tpu"
        raise ConfigError(
            f"jax cannot compile for {name} here ({str(e).splitlines()[0][:120]}); the compiler "
            f"comes with pip install '.[{extra}]', and the device is not needed"
        ) from e
    n = len(devices.devices)
    if n % max(1, stages):
        raise ConfigError(f"--stages must divide the {n} devices of {name}, got {stages}")
    if stages:
        mesh = staged_mesh(devices.devices, stages)
    else:
        mesh = topologies.make_mesh(devices, (n,), (AXIS,))
        mesh = jax.sharding.Mesh(mesh.devices, (AXIS,), axis_types=(AxisType.Auto,))
    options = {"xla_gpu_autotune_level": 0} if gpu else {}
    return Target(name, Layout(mesh), "cuda" if gpu else "tpu", RATES[gpu or tpu], options)


def _gpus(name: str, number: str) -> Any:
    options = {"target_config": _H100, "topology": f"1x1x{number}"}
    return topologies.get_topology_desc(platform="cuda", topology_name=name, **options)


def _tpu(name: str) -> Any:
    # libtpu looks for the machine that it is in, and has to be told that it is in none.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


class Compiled(NamedTuple):
    """What a program for a target is.

    Attributes:
      trace_s: seconds to trace and lower it here.
      compile_s: seconds to compile it here.
      kernels: fusions, calls of libraries and copies of a step, launched one by one.
      products: shapes of matrix products and convolutions that differ, each of which a GPU tunes.
      loops: while loops; each turn of one waits for its condition.
      conditionals: choices between programs.
      collectives: operations between devices.
      collective_bytes: of their results on a device.
      bytes: that a device holds while it runs: arguments, results and what lies between.
    """

    trace_s: float
    compile_s: float
    kernels: int
    products: int
    loops: int
    conditionals: int
    collectives: int
    collective_bytes: int
    bytes: int


class TooLarge(NamedTuple):
    """A program that the compiler refuses, since it needs more memory than the device has.

    Attributes:
      trace_s: seconds to trace and lower it here.
      compile_s: seconds until it was refused.
      bytes: that it asks for on a device, where the compiler says so: of what lies between alone.
    """

    trace_s: float
    compile_s: float
    bytes: int | None


# XLA for TPUs: "the total memory required for HLO temporaries (53.67G) exceeds available HBM", or
# "Ran out of memory in memory space hbm. Used 24.36G of 15.48G hbm".
_REFUSED = "RESOURCE_EXHAUSTED"
_ASKED = re.compile(r"(?:required for [^(]*\(|Used )(?P<number>[\d.]+)(?P<unit>[KMGT]?)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _asked(message: str) -> int | None:
    """Bytes that a refused program asks for, by the compiler's message."""
    found = _ASKED.search(message)
    return round(float(found["number"]) * _UNITS[found["unit"]]) if found else None


_KERNEL = re.compile(r" (fusion|custom-call|copy|dot|convolution)(-start)?\(")
_DEFINED = re.compile(r"^ *(?:ROOT )?(?P<name>%[\w.-]+) = (?P<rest>.*)$", re.MULTILINE)
_PRODUCT = re.compile(r" (?:dot|convolution)\(|custom_call_target=\"__(?:cublas|cudnn)")


def _products(text: str) -> set[str]:
    """Matrix products and convolutions of a program, each as what it does to which shapes."""
    # Without layouts, and without what says where an operation comes from.
    plain = re.sub(r"(?<=\])\{[^{}]*\}|, metadata=.*|, backend_config=.*", "", text)
    made = {match["name"]: match["rest"] for match in _DEFINED.finditer(plain)}

    def shape(name: re.Match[str]) -> str:
        return made.get(name[0], "").split(" ")[0]

    return {re.sub(r"%[\w.-]+", shape, rest) for rest in made.values() if _PRODUCT.search(rest)}


def compiled(program: Callable[..., Any], args: Tree, where: Target) -> Compiled | TooLarge:
    """Compiles a jitted function for a target and reads off what came out.

    Args:
      program: jitted.
      args: its arguments, of arrays or shapes with shardings; see `shaped`.
      where: the target.

    Raises:
      JaxRuntimeError: the compiler fails, but for want of the device's memory.
    """
    several = where.layout.devices * where.layout.stages > 1
    begun = time.perf_counter()
    with where.layout.active() if several else Layout().active(), traced_for(where.platform):
        lowered = program.lower(*args)  # type: ignore[attr-defined]
        traced = time.perf_counter()
        try:
            done = lowered.compile(compiler_options=where.options)
        except jax.errors.JaxRuntimeError as e:
            if _REFUSED not in str(e):
                raise
            spent = time.perf_counter() - traced
            return TooLarge(round(traced - begun, 2), round(spent, 2), _asked(str(e)))
    seconds = time.perf_counter() - traced
    text = done.as_text()
    entry = text[text.index("ENTRY") :]
    sent = collectives(text)
    memory = done.memory_analysis()
    return Compiled(
        round(traced - begun, 2),
        round(seconds, 2),
        len(_KERNEL.findall(entry)),
        len(_products(text)),
        len(re.findall(r" while\(", text)),
        len(re.findall(r" conditional\(", text)),
        len(sent),
        sum(c.bytes for c in sent),
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


def shaped(tree: Tree, where: Target, *, rows: bool = False) -> Tree:
    """Shapes of the arrays of a tree as they lie on a target: as a state, or spread by rows."""
    layout = where.layout
    assert layout.mesh is not None
    by_rows = NamedSharding(layout.mesh, P(AXIS))

    def one(x: Any, at: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows if rows else at)

    return jax.tree.map(one, tree, layout.shardings(tree))
