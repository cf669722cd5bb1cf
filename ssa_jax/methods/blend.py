"""A method whose hidden signals are helped by those of another."""

from collections.abc import Sequence
from typing import Any

import jax

from ssa_jax.forward import Tape
from ssa_jax.methods.base import Method

Array = jax.Array
Tree = Any


def blend(main: Method, helper: Method, weight: float) -> Method:
    """δ_i = δ_i(main) + weight · δ_i(helper) for hidden units; e for the last one.

    Twins, refresh and its period are those of `main`.
    """

    def init(key: Array, params: Tree, mstate: Tree) -> tuple[Tree, Tree]:
        key_main, key_helper = jax.random.split(key)
        return main.init(key_main, params, mstate), helper.init(key_helper, params, mstate)

    def signals(
        feedback: tuple[Tree, Tree], params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        ours, theirs = (
            method.signals(state, params, tape, error, batch)
            for method, state in zip((main, helper), feedback, strict=True)
        )
        mixed = (a + weight * b for a, b in zip(ours[:-1], theirs[:-1], strict=True))
        return (*mixed, error)

    def update(feedback: tuple[Tree, Tree], *moved: Any) -> tuple[Tree, Tree]:
        return main.update(feedback[0], *moved), helper.update(feedback[1], *moved)

    def refresh(feedback: tuple[Tree, Tree], params: Tree, mstate: Tree) -> tuple[Tree, Tree]:
        return main.refresh(feedback[0], params, mstate), feedback[1]

    return main._replace(
        init=init,
        signals=signals,
        update=update,
        refresh=refresh,
        twins=lambda feedback: main.twins(feedback[0]),
    )
