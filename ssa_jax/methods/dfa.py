"""Direct methods with fixed random feedback: from the error, or from the targets."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ssa_jax.methods import feedback as fb
from ssa_jax.methods.base import FeedbackOptions, Method, Network, all_direct

Array = jax.Array
Tree = Any


def dfa(network: Network, options: FeedbackOptions) -> Method:
    """Direct feedback alignment: δ_i = e · R_i (Nøkland 2016).

    R_i is fixed and Gaussian with variance 1/classes, (classes, *shape of h_i); per channel it
    is (classes, 1, 1, channels), and all positions of a map get the same signal.

    Raises:
      ValueError: an unknown form.
    """
    return _random(network, options, lambda error, batch: error)


def drtp(network: Network, options: FeedbackOptions) -> Method:
    """Direct random target projection: δ_i = -(y/batch) · R_i (Frenkel et al. 2021).

    y (batch, classes) is the one-hot target and R_i as in `dfa`: hidden units learn without
    waiting for the output. The sign is the target's in the error e = (softmax - y)/batch, which
    the last unit still gets.

    Raises:
      ValueError: an unknown form.
    """

    def targets(error: Array, batch: Any) -> Array:
        return -network.encode(batch.labels, error) / len(error)

    return _random(network, options, targets)


def _random(
    network: Network, options: FeedbackOptions, sent: Callable[[Array, Any], Array]
) -> Method:
    plan = fb.plan(network.shapes, options.form, options.limit)

    def init(key: Array, params: Tree, mstate: Tree) -> Sequence[fb.Path]:
        del params, mstate
        return fb.random_paths(key, network.shapes, [None] * len(network.shapes), plan)

    def direct(paths: Sequence[fb.Path], error: Array, batch: Any, i: int) -> Array:
        return fb.send(sent(error, batch), paths[i], network.shapes[i])

    signals = all_direct(direct, len(network.units))
    return Method(init=init, signals=signals, direct=direct, note=str(plan))
