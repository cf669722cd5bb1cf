"""Direct paths by regression of the true signals on the output error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLASSES, IMAGE, make_batch, make_method, max_difference, split

from ssa_jax.methods import FeedbackOptions, Network, chain, regression
from ssa_jax.methods.base import softmax_error
from ssa_jax.methods.composed import composed_paths
from ssa_jax.methods.feedback import plan
from ssa_jax.methods.ssa import ssa
from ssa_jax.networks.forward import forward, output_shapes
from ssa_jax.training.tasks import CROSS_ENTROPY, output_error
from ssa_jax.training.train import true_gradients

EXAMPLES = 32


def passed(units, params, mstate, batch):
    """Errors (batch, classes) and the true signals of all hidden units."""
    logits, _, tape = forward(units, params, mstate, batch.images)
    _, error = output_error(CROSS_ENTROPY, logits, batch.labels)
    return error, chain(tape, error)[:-1], tape


def observed(units, params, mstate, batches, form="full"):
    shapes = output_shapes(units, params, mstate, IMAGE)
    stored = plan(shapes, form, 0)
    paths, gram = regression.empty(shapes, stored)
    for batch in batches:
        paths, gram = regression.regress(
            paths, gram, units, params, None, mstate, batch.images,
            lambda y, batch=batch: softmax_error(y, batch.labels), stored,
        )  # fmt: skip
    return paths, gram


def ridge(errors, signals, weights):
    """The ridge regression of signals on errors, in float64, each batch with a weight."""
    gram = sum(w * e.T @ e for w, e in zip(weights, errors, strict=True))
    moments = sum(w * e.T @ d for w, e, d in zip(weights, errors, signals, strict=True))
    eye = regression.RIDGE * np.trace(gram) / CLASSES * np.eye(CLASSES)
    return np.linalg.solve(gram + eye, moments)


@pytest.mark.parametrize("form", ["full", "channel"])
def test_paths_are_the_ridge_regression_of_all_passes_the_older_the_less(form):
    units, params, mstate = split("conv", 0.5)
    batches = [make_batch(EXAMPLES, seed) for seed in range(3)]
    seen = [passed(units, params, mstate, batch) for batch in batches]
    errors = [np.asarray(e, np.float64) for e, *_ in seen]
    paths, _ = observed(units, params, mstate, batches, form)
    for i, path in enumerate(paths):
        signals = [np.asarray(s[i], np.float64) for _, s, _ in seen]
        if form == "channel" and signals[0].ndim == 4:
            signals = [s.mean((1, 2), keepdims=True) for s in signals]
        flat = [s.reshape(EXAMPLES, -1) for s in signals]
        wanted = ridge(errors, flat, [regression.KEEP**2, regression.KEEP, 1.0])
        got = np.asarray(path).reshape(CLASSES, -1)
        assert np.abs(got - wanted).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("rank", [2, CLASSES])
def test_low_rank_paths_are_the_regression_on_the_errors_directions(rank):
    """Sums of a pass before are turned into the new directions; of all of them nothing is lost."""
    units, params, mstate = split("conv", 0.5)
    shapes = output_shapes(units, params, mstate, IMAGE)
    whole_form = plan(shapes, "full", 0)
    low = whole_form._replace(rank=rank)
    full, got = observed(units, params, mstate, []), regression.empty(shapes, low)
    gram, sums, q = np.zeros((rank, rank)), [], np.eye(CLASSES, rank)
    for seed, its in enumerate([params, split("conv", 0.5, seed=3)[1]]):
        batch = make_batch(EXAMPLES, seed)
        error_of = partial(softmax_error, labels=batch.labels)
        rest = (units, its, None, mstate, batch.images, error_of)
        full, got = (
            regression.regress(*full, *rest, whole_form),
            regression.regress(*got, *rest, low),
        )
        error, signals, _ = passed(units, its, mstate, batch)
        basis = got[0][-1].basis
        last = composed_paths(units, its, None, mstate, batch.images, whole_form)[-1]
        leading = jnp.linalg.svd(last.reshape(CLASSES, -1))[0][:, :rank]
        assert jnp.allclose(basis @ basis.T, leading @ leading.T, atol=1e-4)
        turn, q = np.asarray(basis).T @ q, np.asarray(basis, np.float64)
        e = np.asarray(error, np.float64) @ q
        seen = [e.T @ np.asarray(s, np.float64).reshape(EXAMPLES, -1) for s in signals]
        before = [regression.KEEP * turn @ s for s in sums] or [0] * len(seen)
        sums = [b + s for b, s in zip(before, seen, strict=True)]
        gram = regression.KEEP * turn @ gram @ turn.T + e.T @ e
        ridged = gram + regression.RIDGE * np.trace(gram) / rank * np.eye(rank)
    for path, total, whole in zip(got[0], sums, full[0], strict=True):
        core = np.asarray(path.core).reshape(rank, -1)
        wanted = np.linalg.solve(ridged, total)
        assert np.abs(core - wanted).max() < 1e-3 * np.abs(wanted).max()
        if rank == CLASSES:
            dense = jnp.tensordot(path.basis, path.core, 1)
            assert jnp.abs(dense - whole).max() < 1e-3 * jnp.abs(whole).max()
    assert rank == CLASSES or np.linalg.norm(turn, 2) > np.linalg.norm(turn, -2) + 1e-3


def test_no_other_map_of_the_error_is_nearer_to_the_signals():
    units, params, mstate = split("conv", 0.5)
    batch = make_batch(EXAMPLES, 3)
    error, signals, _ = passed(units, params, mstate, batch)
    paths, _ = observed(units, params, mstate, [batch])
    composed = make_method("ssa", units, params, mstate).init(jax.random.key(0), params, mstate)

    def miss(path, signal):
        return float(jnp.sum(jnp.square(jnp.tensordot(error, path, 1) - signal)))

    for path, mean, signal in zip(paths, composed.paths, signals, strict=True):
        # Where what follows is linear both are exact, but for the ridge.
        best = miss(path, signal) - regression.RIDGE * float(jnp.sum(jnp.square(signal)))
        assert best < miss(mean, signal)
        for seed in range(3):
            noise = 0.05 * jnp.abs(path).max() * jax.random.normal(jax.random.key(seed), path.shape)
            assert best < miss(path + noise, signal)


@pytest.mark.parametrize("rank", [None, 0.5])
def test_it_is_backpropagation_on_a_linear_network(rank):
    units, params, mstate = split("linear", rank)
    batch = make_batch(EXAMPLES, 4)
    method = make_method("ssa", units, params, mstate, path="regression")
    feedback = method.update(
        method.init(jax.random.key(0), params, mstate), params, params, None, batch
    )
    feedback = method.refresh(feedback, params, mstate)
    error, _, tape = passed(units, params, mstate, batch)
    signals = method.signals(feedback, params, tape, error, batch)
    true = true_gradients(units, params, mstate, batch)
    for pullback, signal, wanted in zip(tape.pullbacks, signals, true, strict=True):
        gradient = pullback(signal)[0]
        # The ridge shortens a signal by about its own share.
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted))
        assert max_difference(gradient, wanted) < 20 * regression.RIDGE * scale


def test_errors_of_zero_leave_paths_finite_and_as_they_were():
    units, params, mstate = split("conv", 0.5)
    batch = make_batch(EXAMPLES, 5)
    paths, gram = observed(units, params, mstate, [batch])
    full = plan(output_shapes(units, params, mstate, IMAGE), "full", 0)
    rest = (units, params, None, mstate, batch.images, jnp.zeros_like, full)
    again, _ = regression.regress(paths, gram, *rest)
    for path, after in zip(paths, again, strict=True):
        assert float(jnp.abs(after - path).max()) < 1e-3 * float(jnp.abs(path).max())
    blank = regression.empty(output_shapes(units, params, mstate, IMAGE), full)
    still, _ = regression.regress(*blank, *rest)
    assert all(bool((path == 0).all()) for path in still)


def test_a_network_without_targets_is_refused():
    units, params, mstate = split("conv", 0.5)
    network = Network(units, output_shapes(units, params, mstate, IMAGE), make_batch(4).images)
    with pytest.raises(ValueError, match="feedback=regression needs targets"):
        ssa(network, FeedbackOptions(path="regression"))
