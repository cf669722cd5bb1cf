"""Every optimiser with every retraction against optima in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import RETRACTIONS, orthonormal

from ssa_jax import transforms
from ssa_jax.factors import Factors, to_dense

STEPS = 600
OPTIMIZERS = {
    "sgd": (transforms.stiefel_sgd, 0.1, {}),
    "momentum": (transforms.stiefel_sgd, 0.02, {"momentum": 0.9, "nesterov": True}),
    "adam_elementwise": (transforms.stiefel_adam, 0.05, {}),
    "adam_column": (transforms.stiefel_adam, 0.05, {"second_moment": "column"}),
    "adam_matrix": (transforms.stiefel_adam, 0.05, {"second_moment": "matrix"}),
    "muon": (transforms.stiefel_muon, 0.1, {"decay": 0.8}),
}


def problem():
    """(start, loss of each problem, its least value), the three as one tree.

    eigenspace: the r largest eigenvalues of A bound tr(XᵀAX). procrustes: the rotation X, here
    held by its rows, that takes P to Q = X*P. spectrum: of the matrices with singular values s,
    the nearest to W has its singular vectors, at the distance ‖s - σ(W)‖.
    """
    rng = np.random.default_rng(0)
    q = np.asarray(orthonormal(rng, (7, 7)))
    eigenvalues = np.array([3.0, 2.5, 2.0, 1.0, 0.6, 0.3, 0.1])
    a = jnp.asarray((q * eigenvalues) @ q.T, jnp.float32)
    points = jnp.asarray(rng.standard_normal((4, 12)), jnp.float32)
    rotation = np.linalg.qr(np.eye(4) + 0.3 * rng.standard_normal((4, 4)))
    rotation = jnp.asarray(rotation[0] * np.sign(np.diag(rotation[1])), jnp.float32)
    left, right = orthonormal(rng, (6, 3)), orthonormal(rng, (5, 3))
    sigma, s = jnp.array([2.5, 1.5, 0.7]), jnp.array([2.0, 1.2, 0.5])
    w = (left * sigma[None, :]) @ right.T

    def losses(x):
        given = Factors(x["spectrum"].u, s, x["spectrum"].v)
        return {
            "eigenspace": -jnp.sum(x["eigenspace"] * (a @ x["eigenspace"])),
            "procrustes": jnp.mean(jnp.square(x["procrustes"] @ points - rotation @ points)),
            "spectrum": jnp.sum(jnp.square(to_dense(given) - w)),
        }

    start = {
        "eigenspace": orthonormal(rng, (7, 3)),
        "procrustes": jnp.eye(4),
        "spectrum": Factors(orthonormal(rng, (6, 3)), s, orthonormal(rng, (5, 3))),
    }
    least = {
        "eigenspace": -eigenvalues[:3].sum(),
        "procrustes": 0.0,
        "spectrum": float(jnp.sum(jnp.square(s - sigma))),
    }
    optimum = {
        "eigenspace": q[:, :3] @ q[:, :3].T,
        "procrustes": rotation,
        "spectrum": (left * s[None, :]) @ right.T,
    }
    return start, losses, least, optimum


def pair(name, retraction):
    """A case of the grid; slow where optimiser and retraction both differ from the usual."""
    usual = name == "sgd" or retraction == "series"
    return pytest.param(name, retraction, marks=() if usual else pytest.mark.long)


@pytest.mark.parametrize(
    ("name", "retraction"), [pair(name, r) for name in OPTIMIZERS for r in RETRACTIONS]
)
def test_reaches_the_closed_form(name, retraction):
    start, losses, least, optimum = problem()
    factory, rate, kwargs = OPTIMIZERS[name]
    mask = {"eigenspace": "columns", "procrustes": "rows"}
    rate = optax.cosine_decay_schedule(rate, STEPS)
    chain = factory(rate, retraction=retraction, mask=mask, **kwargs)

    def step(carry, _):
        x, state = carry
        g = jax.grad(lambda x: sum(losses(x).values()))(x)
        u, state = chain.update(g, state, x)
        return (optax.apply_updates(x, u), state), None

    @jax.jit
    def solve(x):
        (x, _), _ = jax.lax.scan(step, (x, chain.init(x)), length=STEPS)
        return x, losses(x)

    x, reached = solve(start)
    for key, value in least.items():
        assert abs(float(reached[key]) - value) < 1e-4, key
    found = {
        "eigenspace": x["eigenspace"] @ x["eigenspace"].T,
        "procrustes": x["procrustes"],
        "spectrum": to_dense(x["spectrum"]._replace(s=start["spectrum"].s)),
    }
    for key, value in optimum.items():
        np.testing.assert_allclose(found[key], value, atol=1e-4, err_msg=key)
