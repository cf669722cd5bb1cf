"""Two methods at work on one network: at once, or one after the other."""

from collections.abc import Sequence
from typing import Any

import jax

from ssa_jax.methods.base import Method, Resize, Through, streams
from ssa_jax.networks.forward import Tape

Array = jax.Array
Tree = Any
Both = tuple[Tree, Tree]


def blend(main: Method, helper: Method, weight: float) -> Method:
    """δ_i = δ_i(main) + weight · δ_i(helper) for hidden units; e for the last one.

    Twins and the refresh's period are those of `main`.
    """

    def signals(
        feedback: Both, params: Tree, tape: Tape, error: Array, batch: Any
    ) -> Sequence[Array]:
        ours, theirs = (
            method.signals(state, params, tape, error, batch)
            for method, state in zip((main, helper), feedback, strict=True)
        )
        mixed = (a + weight * b for a, b in zip(ours[:-1], theirs[:-1], strict=True))
        return (*mixed, error)

    return _of_both(main, helper, 0)._replace(signals=signals, direct=None, down=None)


def relay(first: Method, then: Method) -> tuple[Method, Method]:
    """Two methods on one shared state: training begins with one and goes on with the other.

    Both feedbacks follow the weights all the time, by the period of the one at work: at the
    change the caller refreshes once. The probe of either may look at the state at any time.
    """
    return _of_both(first, then, 0), _of_both(first, then, 1)


def _of_both(a: Method, b: Method, leader: int) -> Method:
    """The leader's signals, twins and period, on the state of both."""
    lead = (a, b)[leader]

    def init(key: Array, params: Tree, mstate: Tree) -> Both:
        key_a, key_b = jax.random.split(key)
        return a.init(key_a, params, mstate), b.init(key_b, params, mstate)

    def signals(feedback: Both, *inputs: Any) -> Sequence[Array]:
        return lead.signals(feedback[leader], *inputs)

    def direct(feedback: Both, error: Array, batch: Any, i: int) -> Array:
        assert lead.direct is not None
        return lead.direct(feedback[leader], error, batch, i)

    def down(feedback: Both, params: Tree) -> Through:
        assert lead.down is not None
        return lead.down(feedback[leader], params)

    def update(feedback: Both, *moved: Any) -> Both:
        return a.update(feedback[0], *moved), b.update(feedback[1], *moved)

    def refresh(feedback: Both, params: Tree, mstate: Tree) -> Both:
        return a.refresh(feedback[0], params, mstate), b.refresh(feedback[1], params, mstate)

    resize = None
    if lead.resize is not None:
        sizes, to = lead.resize
        resize = Resize(
            lambda feedback, *state: sizes(feedback[leader], *state),
            lambda feedback, wanted: _with(feedback, leader, to(feedback[leader], wanted)),
        )
    return lead._replace(
        init=init,
        signals=signals,
        update=update,
        refresh=refresh,
        resize=resize,
        twins=lambda feedback: lead.twins(feedback[leader]),
        tell=lambda feedback: lead.tell(feedback[leader]),
        # The update of either may read the tape.
        direct=direct if lead.direct and streams(a) and streams(b) else None,
        down=down if lead.down and streams(a) and streams(b) else None,
        readouts=None,
    )


def _with(feedback: Both, leader: int, own: Tree) -> Both:
    """Both feedbacks, the leader's in its place; the same object where it is what it was."""
    if own is feedback[leader]:
        return feedback
    return (feedback[0], own) if leader else (own, feedback[1])
