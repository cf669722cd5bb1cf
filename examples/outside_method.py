"""A learning method from outside: it makes one teaching signal a unit, and nothing else.

    python examples/outside_method.py
    python -m experiments.cifar --method=examples.outside_method:delayed --model=mlp

Here every hidden unit gets the signal that direct feedback alignment made for the batch before:
the error need not have arrived yet when a unit learns.
"""

import jax
import jax.numpy as jnp

import ssa_jax
from ssa_jax.methods import FeedbackOptions, Method, Network
from ssa_jax.methods.feedback import plan, random_paths, send


def delayed(network: Network, options: FeedbackOptions) -> Method:
    """Direct feedback alignment (Nøkland 2016) with the mean error of the batch before."""
    shapes, n = network.shapes, len(network.shapes)
    form = plan(shapes, options.form, options.limit)

    def init(key, params, mstate):
        return random_paths(key, shapes, [None] * n, form), jnp.zeros(shapes[-1])

    def signals(feedback, params, tape, error, batch):
        paths, old = feedback
        mixed = 0.5 * error + 0.5 * old
        return (*(send(mixed, p, s) for p, s in zip(paths, shapes, strict=False)), error)

    def update(feedback, before, after, tape, batch):
        error = jax.nn.softmax(tape.outputs[-1]) - network.encode(batch.labels, tape.outputs[-1])
        return feedback[0], error.mean(0) / len(error)

    return Method(init=init, signals=signals, update=update)


def main() -> ssa_jax.Run:
    """Trains a perceptron on digits."""
    run = ssa_jax.fit("mlp", "digits", method=delayed, epochs=10)
    print(run.history[-1]["test_accuracy"])
    return run


if __name__ == "__main__":
    main()
