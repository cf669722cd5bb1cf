"""Run by its test in a process of its own with eight host devices: one step of every chain.

Parameters replicated, sharded over columns and sharded over rows, in one tree and one program,
against the same step on one device.
"""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stiefel_cases import TRANSFORMS, drift, normal, orthonormal

from ssa_jax.factors import Factors

SPECS = {"replicated": P(), "rows": P("x", None), "columns": P(None, "x")}


def main():
    assert jax.device_count() == 8
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    jax.set_mesh(mesh)
    rng = np.random.default_rng(0)
    params = {
        "q": {name: orthonormal(rng, (16, 8)) for name in SPECS},
        "layer": Factors(orthonormal(rng, (16, 8)), jnp.arange(8.0, 0, -1), jnp.eye(16, 8)),
    }
    shardings = {
        "q": {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()},
        "layer": Factors(*(NamedSharding(mesh, P("x")) for _ in range(3))),
    }
    grads = jax.tree.map(lambda x: normal(rng, x.shape), params)
    placed, placed_grads = jax.device_put((params, grads), (shardings, shardings))
    for name in sys.argv[1:] or TRANSFORMS:
        factory, kwargs, _ = TRANSFORMS[name]
        kwargs = dict(kwargs)
        if name == "add_alignment":
            kwargs["target"] = grads
        else:
            kwargs["mask"] = {"q": True}
        chain = factory(**kwargs)

        @jax.jit
        def step(params, state, grads, chain=chain):
            updates, state = chain.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        alone, _ = step(params, chain.init(params), grads)
        state = jax.jit(chain.init)(placed)
        moved, after = step(placed, state, placed_grads)
        # Adam's first step divides by the size of each entry, and so magnifies its rounding.
        atol = 1e-4 if "adam" in name or name == "ssa" else 2e-6
        for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a, b, atol=atol, err_msg=name)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state), name
        for key, spec in SPECS.items():
            assert moved["q"][key].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), name
        if name.startswith(("stiefel", "ssa")):
            assert max(drift(x) for x in [*moved["q"].values(), moved["layer"].u]) < 1e-6, name
        print(name, "ok", flush=True)


if __name__ == "__main__":
    main()
