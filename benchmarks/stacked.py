"""Do equal units pay better stacked, as one `jax.vmap`, than one after the other?

    python -m benchmarks.stacked [--quick] [--json FILE] [--notes TEXT]

The hidden units of a chain of equal ones at batch 128, on factors at rank 0.25, each with an input
and a teaching signal of its own, as a direct local method has them. Parts: the gradients of all
units; projection and retraction of all factors; both with Adam, which is the whole update. Stacked
arguments are stacked beforehand, as a program that keeps its state so would have them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.contestants import Entry, build
from benchmarks.networks import Case
from benchmarks.programs import Row, compare, main
from ssa_jax import transforms
from ssa_jax.networks.forward import output_shapes, visit
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any

BATCH = 128
ENTRY = Entry("ssa", 0.25)
CASES = (
    Case("mlp", BATCH, depth=7), Case("mlp", BATCH, depth=17),
    Case("conv_chain", BATCH, depth=5), Case("conv_chain", BATCH, depth=9),
)  # fmt: skip


def stack(trees: list[Tree]) -> Tree:
    """Equal trees as one, every array with a leading axis over them."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def one_gradient(unit: Unit) -> Callable[..., Tree]:
    """(params, mstate, x, signal) -> the gradient of one unit at its signal."""
    return lambda params, mstate, x, signal: visit(unit, params, mstate, x)[1](signal)[0]


def manifold() -> optax.GradientTransformation:
    """Projection and retraction alone."""
    return optax.chain(
        transforms.project_to_tangent("stiefel"),
        optax.scale(-1e-3),
        transforms.retract(),
    )


def whole() -> optax.GradientTransformation:
    """The chain of a default run but for its schedule."""
    return transforms.stiefel_adam(1e-3)


def alike(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal units, all with the names of the first, which say where in the model it is."""
    return [dict(zip(units[0], unit.values(), strict=True)) for unit in units]


def measure(case: Case, rounds: int) -> list[Row]:
    """The rows of one chain. Its first unit, whose input is an image, and its last stay out."""
    built = build(case, ENTRY)
    unit, units = built.units[1], slice(1, -1)
    params, mstate = (alike(t[units]) for t in (built.state.params, built.state.mstate))
    shapes = output_shapes(*built[:1], built.state.params, built.state.mstate, case.input_shape)
    keys = jax.random.split(jax.random.key(0), 2 * len(params)).reshape(2, -1)
    xs, signals = (
        [jax.random.normal(k, (case.batch, *shapes[1])) for k in of_kind] for of_kind in keys
    )
    gradient = one_gradient(unit)

    def in_turn(params: Tree, mstate: Tree, xs: Tree, signals: Tree) -> Tree:
        return [gradient(*a) for a in zip(params, mstate, xs, signals, strict=True)]

    def update(chain: optax.GradientTransformation) -> Callable[..., Tree]:
        return lambda g, state, p: optax.apply_updates(p, chain.update(g, state, p)[0])

    def step(gradients: Callable[..., Tree], chain: optax.GradientTransformation) -> Any:
        return lambda p, m, x, d, state: update(chain)(gradients(p, m, x, d), state, p)

    apart = (params, mstate, xs, signals)
    together = tuple(stack(t) for t in apart)
    both = {"in turn": apart, "stacked": together}
    of_chain = {
        kind: {name: (a[0], chain.init(a[0]), a[0]) for name, a in both.items()}
        for kind, chain in (("manifold", manifold()), ("whole", whole()))
    }
    stacked = jax.vmap(gradient)
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gradients": ({"in turn": in_turn, "stacked": stacked}, both),
        "manifold": (dict.fromkeys(both, update(manifold())), of_chain["manifold"]),
        "update": (
            {"in turn": step(in_turn, whole()), "stacked": step(stacked, whole())},
            {name: (*a, of_chain["whole"][name][1]) for name, a in both.items()},
        ),
    }
    return [
        {"model": case.model, "units": len(params), "batch": case.batch, "part": name, **row}
        for name, (functions, arguments) in parts.items()
        for row in compare(functions, arguments, rounds, "form", "ratio_to_in_turn")
    ]


def rows(quick: bool) -> Iterator[list[Row]]:
    """Of one chain after the other."""
    for case in CASES[:1] if quick else CASES:
        yield measure(case._replace(batch=4) if quick else case, rounds=3 if quick else 9)


if __name__ == "__main__":
    main(__doc__, rows)
