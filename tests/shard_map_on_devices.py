"""Run by its test in a process of its own with two host devices: steps inside `jax.shard_map`.

Every device has layers of its own, and moves them as it would without the others.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from stiefel_cases import normal, orthonormal

from ssa_jax import transforms
from ssa_jax.factors import Factors, retractions
from ssa_jax.layers import lowering

CHAINS = {
    **{
        f"sgd, {name}": transforms.stiefel_sgd(0.1, 0.9, retraction=name)
        for name in retractions.RETRACTIONS
    },
    "adam": transforms.stiefel_adam(0.1),
    "muon": transforms.stiefel_muon(0.1),
    "ssa": transforms.ssa(0.1, hoyer=0.1, target=0.9),
    "ssa, every other step": transforms.ssa(
        0.1, hoyer=0.1, target=0.9, truncate_every=2, retract_every=2
    ),
    "adapt_rank": transforms.adapt_rank(optax.sgd(0.1), 10.0, every=2),
    "truncate_stable_rank": transforms.truncate_stable_rank(every=2),
    "orthogonality_drift": transforms.orthogonality_drift(every=2),
    "add_orthogonality_penalty": transforms.add_orthogonality_penalty(0.1),
}


def alone(function, *args):
    """Of each device's part by itself."""
    parts = [function(*jax.tree.map(lambda a, i=i: a[i : i + 1], args)) for i in range(2)]
    return jax.tree.map(lambda *a: jnp.concatenate(a), *parts)


def main():
    assert jax.device_count() == 2
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rng = np.random.default_rng(0)
    f = Factors(orthonormal(rng, (2, 8, 3)), jnp.ones((2, 3)), orthonormal(rng, (2, 6, 3)))
    g = jax.tree.map(lambda x: normal(rng, x.shape), f)

    def steps(chain, f, g):
        f, g = jax.tree.map(lambda a: a[0], (f, g))
        state = chain.init(f)
        for _ in range(3):
            u, state = chain.update(g, state, f)
            f = optax.apply_updates(f, u)
        return jax.tree.map(lambda a: a[None], f)

    def gradient(x, kernel):
        return jax.grad(lambda k: jnp.sum(lowering.conv(x[0], k[0], (1, 1), "SAME") ** 2))(kernel)

    lowering._CHUNK_BYTES = 1
    functions = {
        name: (lambda f, g, chain=chain: steps(chain, f, g), f, g) for name, chain in CHAINS.items()
    }
    functions["conv"] = gradient, normal(rng, (2, 8, 9, 9, 3)), normal(rng, (2, 3, 3, 3, 4))
    wrong = 0
    for name, (function, *args) in functions.items():
        over = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        found, wanted = jax.jit(over)(*args), alone(function, *args)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            error = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
            # Adam divides by roots of what is left of small squares.
            if not error < 1e-4:
                wrong += 1
                print(f"{name}: off by {error:.1e}")
    print(f"{len(functions)} functions")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
