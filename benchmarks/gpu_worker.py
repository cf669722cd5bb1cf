"""One contestant of `benchmarks.gpu` in a process of its own, which can be ended if it hangs.

    python -m benchmarks.gpu_worker CASE_JSON

Lines of JSON on its standard output: ``ready`` with what was compiled, then one line of timings
for every line that it reads; of a training a line an epoch. All else goes to standard error.
"""

import contextlib
import functools
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import bare

Row = dict[str, Any]
Say = Callable[[Row], None]
# Does so many steps, and returns when they are done.
Steps = Callable[[int], None]

# Of one timing, so that neither the clock nor a wait for the device counts.
ROUND_S = 0.25
MOST_STEPS = 50
# Of an epoch's row.
KEPT = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
        "images_per_second", "compile_s", "wall_s", "angles", "drift")  # fmt: skip


def _own_output() -> Say:
    """Standard output for the reports alone: whatever else is printed goes to standard error."""
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(row: Row) -> None:
        kept.write(json.dumps(row) + "\n")
        kept.flush()

    return say


def _take_turns(say: Say, steps: Steps, more: Callable[[], Row]) -> None:
    """Times some steps for every line read, as many as `ROUND_S` has room for."""
    number = 0
    for _ in sys.stdin:
        if not number:
            steps(3)
            start = time.perf_counter()
            steps(1)
            number = max(3, min(MOST_STEPS, math.ceil(ROUND_S / (time.perf_counter() - start))))
        start = time.perf_counter()
        steps(number)
        say({"step_ms": 1e3 * (time.perf_counter() - start) / number, "steps": number, **more()})


def step(case: Row, say: Say) -> None:
    """A training step as a run with these settings has it, and its refresh of the feedback."""
    import jax
    import jax.numpy as jnp

    from benchmarks.gpu_data import noise
    from benchmarks.networks import Case, random_batch
    from ssa_jax.runs.build import build
    from ssa_jax.runs.config import Config
    from ssa_jax.training import train

    config = Config(**case["settings"])
    begun = time.perf_counter()
    built = build(config, noise(2 * config.batch_size, 2))
    state = jax.block_until_ready(built.state)
    known: Row = {"build_s": time.perf_counter() - begun}
    batch = random_batch(Case(config.model, config.batch_size))
    program = train.make_step(
        built.units, built.method, built.optimizer, built.weights, memory=built.memory
    )
    compiled = _compile(program, (state, batch), "", known)
    every, refresh = built.method.refresh_every, None
    if every:
        refresh = _compile(train.make_refresh(built.method), (state,), "refresh_", known)
    memory = compiled.memory_analysis()
    known["temp_bytes"] = None if memory is None else memory.temp_size_in_bytes
    known["loops"] = compiled.as_text().count(" while(")
    device = jax.devices()[0]
    say({"ready": True, "device": device.device_kind, "platform": device.platform, **known})
    # The step is donated its state: each goes on from what the last one left.
    held = [jax.tree.map(jnp.copy, state)]

    def steps(count: int) -> None:
        for _ in range(count):
            held[0], metrics = compiled(held[0], batch)
        jax.block_until_ready((held[0], metrics))

    def more() -> Row:
        stats = device.memory_stats() or {}
        found: Row = {"peak_bytes": stats.get("peak_bytes_in_use"), "every": every}
        if refresh is not None:
            jax.block_until_ready(refresh(state))
            start = time.perf_counter()
            jax.block_until_ready(refresh(state))
            found["refresh_ms"] = 1e3 * (time.perf_counter() - start)
        return found

    _take_turns(say, steps, more)


def _compile(program: Any, args: tuple[Any, ...], prefix: str, known: Row) -> Any:
    """The compiled program; notes the seconds of both parts of the way there."""
    begun = time.perf_counter()
    lowered = program.lower(*args)
    traced = time.perf_counter()
    compiled = lowered.compile()
    known[f"{prefix}trace_s"] = traced - begun
    known[f"{prefix}compile_s"] = time.perf_counter() - traced
    return compiled


def torch(case: Row, say: Say) -> None:
    """Backpropagation of the same network in PyTorch, products in TF32 or bfloat16."""
    import numpy as np

    from benchmarks import torch_step
    from benchmarks.networks import Case, network, random_batch

    torch = importlib.import_module("torch")
    cuda = torch.cuda.is_available()
    where = "cuda" if cuda else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    made = Case(case["model"], case["batch"])
    batch = random_batch(made)
    plain = torch_step.module(network(made, None)).to(where)
    images = torch.tensor(np.asarray(batch.images).transpose(0, 3, 1, 2), device=where)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.tensor(np.asarray(batch.labels), dtype=torch.long, device=where)
    optimizer = torch.optim.Adam(plain.parameters(), 1e-3, fused=True)
    net = torch.compile(plain) if case["compiled"] else plain
    mixed = case["precision"] == "bfloat16"

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(where, torch.bfloat16, enabled=mixed):
                outputs = net(images)
            torch.nn.functional.cross_entropy(outputs.float(), labels).backward()
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()

    begun = time.perf_counter()
    steps(1)
    device = torch.cuda.get_device_name() if cuda else "cpu"
    # What is compiled and chosen in the first step, with the step itself.
    known = {"compile_s": time.perf_counter() - begun, "platform": "gpu" if cuda else "cpu"}
    say({"ready": True, "device": device, **known})

    def more() -> Row:
        return {"peak_bytes": torch.cuda.max_memory_allocated() if cuda else None}

    _take_turns(say, steps, more)


def train(case: Row, say: Say) -> None:
    """A run of `ssa_jax.fit`, reported epoch by epoch."""
    import jax

    from benchmarks.gpu_data import join
    from ssa_jax.runs.fit import fit

    data = join(Path(case["data"]))
    device = jax.devices()[0]
    about: Row = {"device": device.device_kind, "platform": device.platform,
                  "train_size": data.train_size}  # fmt: skip
    begun = time.perf_counter()

    def tell(row: Row) -> None:
        say({**about, **{name: row[name] for name in KEPT if name in row}})

    run = fit(case["model"], data, callbacks=[tell], compile_cache="off", **case["settings"])
    summary = run.summary
    final = {name: summary.get(name) for name in ("test_accuracy", "params_ratio", "macs_ratio")}
    wall = time.perf_counter() - begun
    say({**about, "final": True, **final, "compile_s": summary.get("compile_s"), "wall_s": wall})


def main() -> None:
    """Runs the case of the command line."""
    say = _own_output()
    case = json.loads(sys.argv[1])
    if case["kind"] != "torch":
        # PyTorch needs none of it, and asks which libraries there are.
        bare.stand_in()
    from ssa_jax.parallel import compiling

    compiling.leave_products_to_cublas()
    compiling.use_cache(compiling.OFF)
    kinds = {"step": step, "torch": torch, "train": train}
    with contextlib.suppress(BrokenPipeError):
        functools.partial(kinds[case["kind"]], case)(say)


if __name__ == "__main__":
    main()
