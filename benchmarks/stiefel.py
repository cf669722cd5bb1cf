"""How long is one Stiefel step, and how near does it land, against geoopt and riemannax?

    python -m benchmarks.stiefel [--quick] [--json FILE] [--threads 1 2] [--cases 576x64 VGG-13]

One step is: a given gradient, the tangent direction of the optimiser, the retraction. All
contestants start every step from the same point, in turn, in one process for each case and
number of threads. Compilation is excluded. `of_geoopt_qr` divides by the median of geoopt's rule
of the same name with QR; its Adam has one second moment a matrix, so only "adam (matrix)" does
the same work. `error` is max|XᵀX - I| after the step, in float64.
Peers that are not installed are left out: `pip install '.[peers]'`.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.measure.timing import side_by_side
from experiments.show import markdown
from ssa_jax.reporting.environment import environment

Matrices = dict[str, np.ndarray]

SHAPES = [(576, 64), (1152, 128), (2304, 256)]
VGG13_CHANNELS = [3, 64, 64, 128, 128, 256, 256, 512, 512, 512, 512]
RATES = {"sgd": 1e-2, "momentum": 1e-2, "adam": 1e-3, "muon": 1e-2}
RETRACTIONS = ["series", "newton_schulz", "cholesky_qr2", "qr", "polar", "cayley"]


class Contestant(NamedTuple):
    """One row before it is measured.

    Attributes:
      library: whose step it is.
      optimizer: which rule.
      retraction: how it lands.
      step: one step from the starting point; blocks until done.
      result: the matrices after the last step.
      prepare: puts the starting point back, off the clock.
    """

    library: str
    optimizer: str
    retraction: str
    step: Callable[[], Any]
    result: Callable[[], list[np.ndarray]]
    prepare: Callable[[], Any] = lambda: None


def vgg13_shapes() -> list[tuple[int, int]]:
    """Shapes of U and V of the ten 3x3 convolutions at half of full rank."""
    pairs = itertools.pairwise(VGG13_CHANNELS)
    return [(3 * side, round(0.5 * min(3 * c, 3 * n))) for c, n in pairs for side in (n, c)]


def cases(quick: bool) -> dict[str, list[tuple[int, ...]]]:
    """Case -> shapes of its matrices; stacked: one array for all of a shape."""
    if quick:
        return {"96x16": [(96, 16)], "stack of 2": [(2, 96, 16)]}
    layers = vgg13_shapes()
    stacks = [(layers.count(shape), *shape) for shape in dict.fromkeys(layers)]
    single: dict[str, list[tuple[int, ...]]] = {f"{n}x{r}": [(n, r)] for n, r in SHAPES}
    return {**single, "VGG-13": list(layers), "VGG-13 stacked": list(stacks)}


def inputs(shapes: list[tuple[int, ...]]) -> tuple[Matrices, Matrices]:
    """Orthonormal matrices, and gradients with columns of about unit length."""
    rng = np.random.default_rng(0)
    points, grads = {}, {}
    for i, shape in enumerate(shapes):
        points[str(i)] = np.linalg.qr(rng.standard_normal(shape))[0].astype(np.float32)
        grads[str(i)] = (rng.standard_normal(shape) / np.sqrt(shape[-2])).astype(np.float32)
    return points, grads


def ours(points: Matrices, grads: Matrices) -> list[Contestant]:
    """Every optimiser with Newton-Schulz, and gradient descent with every retraction."""
    import jax
    import optax

    from ssa_jax import transforms

    sgd, adam = transforms.stiefel_sgd, transforms.stiefel_adam
    chains = [("sgd", r, sgd(RATES["sgd"], retraction=r, mask=True)) for r in RETRACTIONS]
    chains += [
        ("momentum", RETRACTIONS[0], sgd(RATES["momentum"], 0.9, mask=True)),
        *(
            (f"adam ({kind})", RETRACTIONS[0], adam(RATES["adam"], second_moment=kind, mask=True))
            for kind in ("elementwise", "column", "matrix")
        ),
        ("muon", RETRACTIONS[0], transforms.stiefel_muon(RATES["muon"], mask=True)),
    ]
    x, g = jax.device_put((points, grads))

    def contestant(name: str, retraction: str, chain: Any) -> Contestant:
        @jax.jit
        def step(x: Any, state: Any) -> Any:
            updates, state = chain.update(g, state, x)
            return optax.apply_updates(x, updates), state

        state = chain.init(x)
        return Contestant(
            "ssa_jax",
            name,
            retraction,
            lambda: jax.block_until_ready(step(x, state)),
            lambda: [np.asarray(y) for y in step(x, state)[0].values()],
        )

    return [contestant(*chain) for chain in chains]


def geoopt(points: Matrices, grads: Matrices, threads: int) -> list[Contestant]:
    """RSGD and RAdam on geoopt's two Stiefel manifolds: Euclidean with QR, and its default."""
    try:
        peer, torch = importlib.import_module("geoopt"), importlib.import_module("torch")
    except ImportError:
        return []
    torch.set_num_threads(threads)

    def contestant(name: str, canonical: bool) -> Contestant:
        manifold = peer.Stiefel(canonical=canonical)
        start = [torch.tensor(p) for p in points.values()]
        slope = [torch.tensor(g) for g in grads.values()]
        leaves = [peer.ManifoldParameter(p.clone(), manifold=manifold) for p in start]
        rule = peer.optim.RiemannianAdam if name == "adam (matrix)" else peer.optim.RiemannianSGD
        momentum = {"momentum": 0.9} if name == "momentum" else {}
        optimizer = rule(leaves, lr=RATES[name.split()[0]], **momentum)

        def prepare() -> None:
            with torch.no_grad():
                for leaf, p, g in zip(leaves, start, slope, strict=True):
                    leaf.copy_(p)
                    leaf.grad = g.clone()

        def result() -> list[np.ndarray]:
            return [leaf.detach().numpy() for leaf in leaves]

        retraction = "default" if canonical else "qr"
        return Contestant("geoopt", name, retraction, optimizer.step, result, prepare)

    names = ["sgd", "momentum", "adam (matrix)"]
    return [contestant(name, canonical) for name in names for canonical in (False, True)]


def riemannax(points: Matrices, grads: Matrices) -> list[Contestant]:
    """Its gradient descent and Adam, under jit. The wheel of 0.0.3 has no top package."""
    import jax

    try:
        importlib.metadata.version("riemannax")
        manifolds = importlib.import_module("manifolds")
        optimizers = importlib.import_module("optimizers")
    except ImportError:
        return []
    if any(p.ndim != 2 for p in points.values()):
        return []
    x, g = jax.device_put((points, grads))

    def contestant(name: str, rule: Any) -> Contestant:
        init, update = rule(learning_rate=RATES[name.split()[0]], use_retraction=True)

        @jax.jit
        def step(x: Any, states: Any) -> Any:
            out = {}
            for key, p in x.items():
                manifold = manifolds.Stiefel(*p.shape)
                out[key] = update(manifold.proj(p, g[key]), states[key], manifold)
            return out

        states = {key: init(p) for key, p in x.items()}
        return Contestant(
            "riemannax",
            name,
            "qr",
            lambda: jax.block_until_ready(step(x, states)),
            lambda: [np.asarray(s.x) for s in step(x, states).values()],
        )

    return [
        contestant("sgd", optimizers.riemannian_gradient_descent),
        contestant("adam (elementwise)", optimizers.riemannian_adam),
    ]


def works(peer: Contestant) -> bool:
    """Whether a peer's step runs at all; one that raises is told and left out."""
    peer.prepare()
    try:
        peer.step()
    except RuntimeError as e:
        print(f"{peer.library} {peer.optimizer} ({peer.retraction}) fails: {e}", file=sys.stderr)
        return False
    return True


def error(matrices: list[np.ndarray]) -> float:
    """Largest |XᵀX - I|, in float64."""
    wide = [m.astype(np.float64) for m in matrices]
    return max(float(np.abs(np.swapaxes(m, -1, -2) @ m - np.eye(m.shape[-1])).max()) for m in wide)


def measure(threads: int, quick: bool, chosen: list[str]) -> list[dict[str, Any]]:
    """The rows of some cases; call in a process that was set up for so many threads."""
    rows = []
    for case, shapes in cases(quick).items():
        if chosen and case not in chosen:
            continue
        points, grads = inputs(shapes)
        peers_found = [*geoopt(points, grads, threads), *riemannax(points, grads)]
        found = [*ours(points, grads), *filter(works, peers_found)]
        times = side_by_side([(c.prepare, c.step) for c in found], rounds=3 if quick else 15)
        peers = {
            c.optimizer.split()[0]: t.median_ms
            for c, t in zip(found, times, strict=True)
            if (c.library, c.retraction) == ("geoopt", "qr")
        }
        for c, t in zip(found, times, strict=True):
            peer = peers.get(c.optimizer.split()[0])
            rows.append(
                {
                    "case": case,
                    "threads": threads,
                    "library": c.library,
                    "optimizer": c.optimizer,
                    "retraction": c.retraction,
                    "median_ms": round(t.median_ms, 4),
                    "min_ms": round(t.min_ms, 4),
                    "rounds": t.rounds,
                    "of_geoopt_qr": round(t.median_ms / peer, 3) if peer else None,
                    "error": error(c.result()),
                }
            )
    return rows


def in_process(threads: int, quick: bool, chosen: list[str]) -> list[dict[str, Any]]:
    """`measure` in a fresh process that sees only so many CPUs and threads."""
    flags = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, "-m", "benchmarks.stiefel", "--only", str(threads)]
        command += ["--json", out.name, "--cases", *chosen, *(["--quick"] if quick else [])]
        subprocess.run(command, env=env, check=True)
        return json.load(out)["rows"]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    return markdown.of_records([{**row, "error": f"{row['error']:.1e}"} for row in rows])


def write(file: str | None, rows: list[dict[str, Any]]) -> None:
    """Writes what is measured so far, with what it was measured on."""
    if file:
        about = environment("torch", "geoopt", "riemannax")
        Path(file).write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def main() -> None:
    """Measures every number of threads that this machine has, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--json", help="write versions and rows to this file")
    parser.add_argument("--cases", nargs="*", default=[], help="only these, such as 576x64")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    if args.only:
        os.sched_setaffinity(0, cpus[: args.only])
        rows = measure(args.only, args.quick, args.cases)
    else:
        counts = [n for n in args.threads if n <= len(cpus)]
        for skipped in sorted(set(args.threads) - set(counts)):
            print(f"skipping {skipped} threads: only {len(cpus)} CPUs", file=sys.stderr)
        rows = []
        for case, n in itertools.product(args.cases or cases(args.quick), counts):
            rows += in_process(n, args.quick, [case])
            write(args.json, rows)
        print(table(rows))
    write(args.json, rows)


if __name__ == "__main__":
    main()
