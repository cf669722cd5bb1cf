"""Inputs that the tests of projections, retractions and transforms share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssa_jax import transforms
from ssa_jax.factors import Factors, retractions

SHAPES = {"tall": (9, 4), "column": (5, 1), "square": (6, 6), "batched": (3, 7, 2)}

RETRACTIONS = [name for name in retractions.RETRACTIONS if name != "none"]


def orthonormal(rng, shape, dtype=jnp.float32):
    """A random (..., n, r) with orthonormal columns, exact to float64."""
    return jnp.asarray(np.linalg.qr(rng.standard_normal(shape))[0], dtype)


def normal(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def drift(x):
    """Max |XᵀX - I|, computed in float64."""
    x = np.asarray(x, np.float64)
    return np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1])).max()


MASK = {"rows": "rows", "bias": False}


def tree(dtype=jnp.float32, seed=0):
    """Parameters with factors, stacked wide matrices and a vector, and their gradients."""
    rng = np.random.default_rng(seed)
    params = {
        "layer": Factors(
            orthonormal(rng, (4, 2), dtype),
            jnp.asarray([2.0, 1.0], dtype),
            orthonormal(rng, (3, 2), dtype),
        ),
        "rows": orthonormal(rng, (2, 3, 2), dtype).mT,
        "bias": jnp.asarray([0.5, -0.5], dtype),
    }
    grads = {
        "layer": Factors(*(normal(rng, x.shape, dtype) for x in params["layer"])),
        "rows": normal(rng, (2, 2, 3), dtype),
        "bias": normal(rng, (2,), dtype),
    }
    return params, grads


ALIGNED = {"layer": Factors(jnp.ones((4, 2)), jnp.ones(2), jnp.ones((3, 2))), "rows": None}

# name: factory, its arguments, and those that `inject_hyperparams` must leave alone.
TRANSFORMS = {
    "project_to_tangent": (transforms.project_to_tangent, {}, ()),
    "retract": (transforms.retract, {}, ("every",)),
    "retract_every": (transforms.retract, {"method": "cholesky_qr2", "every": 2}, ("every",)),
    "trace": (transforms.trace, {"decay": 0.9, "nesterov": True}, ()),
    **{
        f"scale_by_riemannian_adam_{kind}": (
            transforms.scale_by_riemannian_adam,
            {"second_moment": kind},
            (),
        )
        for kind in ("column", "matrix")
    },
    "scale_by_stiefel_muon": (transforms.scale_by_stiefel_muon, {}, ("steps",)),
    "add_orthogonality_penalty": (transforms.add_orthogonality_penalty, {"weight": 0.1}, ()),
    "add_alignment": (
        transforms.add_alignment,
        {"weight": 0.1, "target": {**ALIGNED, "bias": None}},
        (),
    ),
    "add_hoyer": (transforms.add_hoyer, {"weight": 0.1, "kind": "squared"}, ()),
    "truncate_rank": (transforms.truncate_rank, {"target": 0.9}, ("every",)),
    "truncate_stable_rank": (transforms.truncate_stable_rank, {}, ("every",)),
    "adapt_rank": (
        transforms.adapt_rank,
        {"inner": optax.sgd(0.1), "budget": 8.0, "every": 1},
        ("inner", "cost", "every", "until", "least"),
    ),
    "orthogonality_drift": (transforms.orthogonality_drift, {}, ("every",)),
    # QR compiles fastest; the other retractions have rows of their own.
    **{
        factory.__name__: (factory, {"learning_rate": 0.1, "retraction": "qr"}, ("every",))
        for factory in (transforms.stiefel_sgd, transforms.stiefel_adam, transforms.stiefel_muon)
    },
    "ssa": (
        transforms.ssa,
        {"learning_rate": 0.1, "hoyer": 0.01, "target": 0.9, "retraction": "qr"},
        ("truncate_every", "retract_every"),
    ),
}


def arguments(name):
    """Keyword arguments of a transform for the parameters of `tree`."""
    kwargs = dict(TRANSFORMS[name][1])
    if name != "add_alignment":
        kwargs["mask"] = MASK
    return kwargs


def make(name):
    return TRANSFORMS[name][0](**arguments(name))


def run(transform, params, grads, steps=3):
    """(parameters, state, updates) after some steps on constant gradients."""
    state = transform.init(params)

    @jax.jit
    def step(params, state):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    for _ in range(steps):
        params, state, updates = step(params, state)
    return params, state, updates
