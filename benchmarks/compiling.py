"""How long does a run's training step take to compile, in a fresh process without a cache?

    python -m benchmarks.compiling [--quick] [--json FILE] [--notes TEXT]

Each row is the median of three processes: seconds to make the state (``build_s``), to trace and
lower the step, to compile it, and the last two together (``step_s``); beside them the loops and
conditionals of the compiled program. Batch 128 of CIFAR-10's shape; the mlp also on the digits'.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.programs import Row, main

CASES = (
    ("mlp", "digits", "bp", "none"),
    ("mlp", "digits", "ssa", "hybrid"),
    ("mlp", "cifar10", "ssa", "hybrid"),
    ("smallconv", "cifar10", "bp", "none"),
    ("smallconv", "cifar10", "ssa", "none"),
    ("smallconv", "cifar10", "ssa", "hybrid"),
)
SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3)}
PROCESSES = 3


def once(model: str, dataset: str, method: str, schedule: str) -> Row:
    """The measures of this process."""
    import jax
    import jax.numpy as jnp

    from ssa_jax.runs import build
    from ssa_jax.runs.config import Config
    from ssa_jax.runs.fitted import Described
    from ssa_jax.training import train
    from ssa_jax.types import Batch

    jax.config.update("jax_enable_compilation_cache", False)
    config = Config(
        model=model, dataset=dataset, method=method, rank_schedule=schedule, feedback_lookahead=1
    )
    data = Described(SHAPES[dataset], 10, 50_000, "float32", None)
    begun = time.perf_counter()
    built = jax.block_until_ready(build.build(config, data))
    ready = time.perf_counter()
    step = train.make_step(
        built.units, built.method, built.optimizer, built.weights, memory=built.memory
    )
    batch = Batch(jnp.zeros((128, *data.image_shape)), jnp.zeros(128, jnp.int32))
    traced = time.perf_counter()
    lowered = step.lower(built.state, batch)
    lowering = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    text = program.as_text()
    return {
        "build_s": ready - begun,
        "trace_s": lowering - traced,
        "compile_s": done - lowering,
        "step_s": done - traced,
        "loops": text.count(" while("),
        "conditionals": text.count(" conditional("),
    }


def measure(quick: bool) -> Iterator[list[Row]]:
    """One row a case."""
    for case in CASES[:1] if quick else CASES:
        command = [sys.executable, "-m", "benchmarks.compiling", "once", *case]
        found = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(1 if quick else PROCESSES)
        ]
        names = ("model", "data", "method", "schedule")
        row: Row = dict(zip(names, case, strict=True))
        yield [row | {n: round(statistics.median(f[n] for f in found), 2) for n in found[0]}]


if __name__ == "__main__":
    if sys.argv[1:2] == ["once"]:
        print(json.dumps(once(*sys.argv[2:])))
    else:
        main(__doc__, measure)
