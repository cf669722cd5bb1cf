"""Every term of the local loss: its value as written, its gradient as autodiff's."""

import jax
import jax.numpy as jnp
import pytest
from helpers import make_batch, max_difference, output_error, split

from ssa_jax import factors
from ssa_jax.methods import twins as tw
from ssa_jax.networks.forward import forward
from ssa_jax.training import losses, tasks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.passes import local_gradients


def setup():
    units, params, mstate = split("conv", 0.5)
    batch = make_batch()
    _logits, _, tape = forward(units, params, mstate, batch.images)
    signals = [jnp.sin(3 * h) for h in tape.outputs]
    # Off the manifold, so that the orthogonality term is not zero.
    twins = tw.init_twins(jax.random.key(1), params)
    params = factors.map_factors(lambda f: f._replace(u=1.1 * f.u), params)
    _, _, tape = forward(units, params, mstate, batch.images)
    return units, params, mstate, batch, tape, signals, twins


def written_loss(units, params, mstate, tape, signals, twins, weights, i):
    """The local loss of unit i as the documentation writes it."""

    def loss(p):
        h, _ = units[i].apply(p, mstate[i], tape.inputs[i], train=True)
        total = weights.alpha * jnp.sum(h * signals[i])
        if i < len(units) - 1:
            a, b = (x.reshape(len(x), -1) for x in (h, signals[i]))
            cosines = jnp.sum(a * b, 1) / jnp.linalg.norm(a, axis=1) / jnp.linalg.norm(b, axis=1)
            total += weights.kappa * jnp.mean(cosines)
        for w, b in zip(factors.leaves(p), factors.leaves(twins[i]), strict=True):
            total += weights.beta * sum(jnp.sum((x - y) ** 2) for x, y in zip(w, b, strict=True))
            for x in (w.u, w.v):
                gram = x.T @ x
                total += weights.gamma * jnp.sum((gram - jnp.eye(gram.shape[0])) ** 2)
        return total

    return loss


@pytest.mark.parametrize(
    "weights",
    [
        LossWeights(1.0, 0.0, 0.0),
        LossWeights(0.0, 1.0, 0.0),
        LossWeights(0.0, 0.0, 1.0),
        LossWeights(0.0, 0.0, 0.0, 1.0),
        LossWeights(0.7, 0.3, 0.2, 0.5),
    ],
    ids=["task", "alignment", "orthogonality", "cosine", "together"],
)
def test_local_gradients_are_those_of_the_written_loss(weights):
    units, params, mstate, _, tape, signals, twins = setup()
    ours = local_gradients(params, twins, tape, signals, weights)
    for i, gradient in enumerate(ours):
        loss = written_loss(units, params, mstate, tape, signals, twins, weights, i)
        assert max_difference(gradient, jax.grad(loss)(params[i])) < 1e-4


def test_terms_have_their_written_values():
    _, params, _, _, tape, signals, twins = setup()
    f, b = (tree[0]["units/0/map/kernel"] for tree in (params, twins))
    terms = losses.local_terms(params[0], twins[0], tape.outputs[0], signals[0])
    assert terms["task"] == pytest.approx(float(jnp.sum(tape.outputs[0] * signals[0])), rel=1e-4)
    # UᵀU = 1.21 I of rank r and VᵀV = I.
    assert terms["orthogonality"] == pytest.approx(0.21**2 * f.rank, rel=1e-3)
    assert terms["hoyer"] == pytest.approx(float(jnp.abs(f.s).sum() / jnp.linalg.norm(f.s)), 1e-5)
    distance = sum(float(jnp.sum((x - y) ** 2)) for x, y in zip(f, b, strict=True))
    assert terms["alignment"] == pytest.approx(distance, rel=1e-5)
    assert losses.alignment_term(params[0], params[0]) == 0


def test_no_alignment_without_twins():
    _, params, _, _, tape, signals, _ = setup()
    assert "alignment" not in losses.local_terms(params[0], None, tape.outputs[0], signals[0])
    assert losses.regulariser(params[0], None, LossWeights(1, 1, 0)) == 0


def test_output_error_is_softmax_minus_onehot_over_the_batch():
    logits = jax.random.normal(jax.random.key(0), (6, 4))
    labels = jnp.array([0, 1, 2, 3, 0, 1])
    loss, error = output_error(logits, labels)
    assert jnp.allclose(error, (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 4)) / 6, atol=1e-7)
    picked = jnp.log(jax.nn.softmax(logits))[jnp.arange(6), labels]
    assert loss == pytest.approx(-float(jnp.mean(picked)), rel=1e-5)


def test_cosine_ignores_lengths_and_is_finite_at_zero():
    h = jax.random.normal(jax.random.key(0), (4, 3, 2))
    signal = jax.random.normal(jax.random.key(1), (4, 3, 2))
    assert float(losses.cosine_term(5 * h, 0.1 * signal)) == pytest.approx(
        float(losses.cosine_term(h, signal)), rel=1e-5
    )
    assert float(losses.cosine_term(h, -h)) == pytest.approx(-1, abs=1e-6)
    dead = h.at[0].set(0)
    gradient = jax.grad(losses.cosine_term)(dead, signal)
    assert bool(jnp.isfinite(gradient).all())
    assert float(jnp.abs(gradient[0]).max()) == 0


def test_smoothed_loss_has_the_smoothed_targets():
    logits = jax.random.normal(jax.random.key(0), (6, 5))
    labels = jnp.arange(6) % 5
    loss, error = tasks.output_error(tasks.cross_entropy(0.1), logits, labels)
    targets = 0.9 * jax.nn.one_hot(labels, 5) + 0.1 / 5
    assert float(loss) == pytest.approx(
        float(-jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), 1))), rel=1e-5
    )
    assert jnp.allclose(error, (jax.nn.softmax(logits) - targets) / 6, atol=1e-6)
