"""What each transformation does, stated as equations."""

import contextlib
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import (
    MASK,
    RETRACTIONS,
    TRANSFORMS,
    drift,
    make,
    normal,
    orthonormal,
    run,
    tree,
)

from ssa_jax import transforms
from ssa_jax.factors import Factors, leaves, linalg, retractions
from ssa_jax.training import optim


def skewness(x, xi):
    return np.abs(linalg.sym(x.mT @ xi)).max()


# Landing


@pytest.mark.parametrize("name", ["stiefel_muon", "ssa"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float32, 1e-6), (jnp.float64, 1e-14)]
)
def test_a_step_lands_as_near_as_the_dtype_allows(name, dtype, tolerance):
    with jax.enable_x64(dtype == jnp.float64):
        params, grads = tree(dtype)
        moved, _, _ = run(make(name), params, grads)
        for x in (moved["layer"].u, moved["layer"].v, moved["rows"].mT):
            assert x.dtype == dtype
            assert drift(x) < tolerance


@pytest.mark.parametrize("name", RETRACTIONS)
def test_retracts_in_every_kth_step_only(name):
    rng = np.random.default_rng(0)
    x = orthonormal(rng, (6, 2))
    g = 0.1 * normal(rng, (6, 2))
    retract = transforms.retract(name, every=3, mask=True)
    update, state, drifts = jax.jit(retract.update), retract.init(x), []
    for _ in range(6):
        u, state = update(retractions.project_stiefel(x, g), state, x)
        x = optax.apply_updates(x, u)
        drifts.append(drift(x))
    assert max(drifts[2], drifts[5]) < 1e-6
    assert min(drifts[0], drifts[1], drifts[3]) > 1e-4


def test_links_before_the_rate_compose_in_any_order():
    """Whatever the order, the step lands and every leaf stays finite."""
    params, grads = tree()
    links = {
        "hoyer": transforms.add_hoyer(0.1, mask=MASK),
        "soft": transforms.add_orthogonality_penalty(0.1, mask=MASK),
        "tangent": transforms.project_to_tangent(mask=MASK),
        "clip": optax.clip_by_global_norm(1.0),
    }
    steps = optax.scale_by_learning_rate(0.1), transforms.retract("qr", mask=MASK)
    chains = [optax.chain(*order, *steps) for order in itertools.permutations(links.values())]
    assert len(chains) == 24
    states = [chain.init(params) for chain in chains]

    @jax.jit
    def step(states):
        return [
            optax.apply_updates(params, chain.update(grads, state, params)[0])
            for chain, state in zip(chains, states, strict=True)
        ]

    for moved in step(states):
        assert max(drift(x) for x in (moved["layer"].u, moved["rows"].mT)) < 1e-6
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(moved))


# Moments


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if n.startswith(("trace", "scale_by"))])
def test_updates_and_momentum_stay_tangent(name):
    params, grads = tree()
    chain = optax.chain(make(name), optax.scale(-0.1), transforms.retract("qr", mask=MASK))
    params, state, _ = run(chain, params, grads)
    updates, inner = jax.jit(make(name).update)(grads, state[0], params)
    moment = inner.trace if name == "trace" else inner.mu
    for node in (updates, moment):
        assert skewness(params["layer"].u, node["layer"].u) < 1e-6
        assert skewness(params["rows"].mT, node["rows"].mT) < 1e-6


def test_other_leaves_get_the_euclidean_rule():
    params, grads = tree()
    pairs = [
        (make("trace"), optax.trace(0.9, nesterov=True)),
        (make("scale_by_riemannian_adam_column"), optax.scale_by_adam()),
        (make("stiefel_sgd"), optax.sgd(0.1)),
        (make("stiefel_adam"), optax.adam(0.1)),
    ]
    for ours, theirs in pairs:
        mine = run(ours, params, grads)[0]
        euclidean = run(theirs, params, grads)[0]
        np.testing.assert_allclose(mine["bias"], euclidean["bias"], rtol=1e-5)
        np.testing.assert_allclose(mine["layer"].s, euclidean["layer"].s, rtol=1e-5)


def test_adam_with_one_scale_a_matrix_does_not_depend_on_coordinates():
    """Turned parameters and gradients give the turned update; elementwise Adam's does differ."""
    rng = np.random.default_rng(1)
    x, g, turn = orthonormal(rng, (6, 2)), normal(rng, (6, 2)), orthonormal(rng, (6, 6))

    def differs(second_moment):
        adam = transforms.stiefel_adam(0.1, second_moment=second_moment, retraction="qr", mask=True)
        return np.abs(turn @ run(adam, x, g)[0] - run(adam, turn @ x, turn @ g)[0]).max()

    assert differs("matrix") < 1e-5
    assert differs("column") < 1e-5
    assert differs("elementwise") > 1e-2


def test_adam_shares_its_second_moment_as_it_says():
    params, grads = tree()
    shapes = {
        "elementwise": ((4, 2), (2, 2, 3)),
        "column": ((1, 2), (2, 2, 1)),
        "matrix": ((1, 1), (2, 1, 1)),
    }
    for kind, (u, rows) in shapes.items():
        adam = transforms.scale_by_riemannian_adam(second_moment=kind, mask=MASK)
        _, state, _ = run(adam, params, grads, steps=1)
        assert state.nu["layer"].u.shape == u
        assert state.nu["rows"].shape == rows
        assert state.nu["bias"].shape == (2,)
        tangent = retractions.project_stiefel(params["layer"].u, grads["layer"].u)
        np.testing.assert_allclose(
            jnp.mean(state.nu["layer"].u), 1e-3 * jnp.mean(jnp.square(tangent)), rtol=1e-4
        )


def test_muon_descends_by_the_nuclear_norm():
    """⟨P(msign(m)), m⟩ is the sum of the singular values of m, each times 0.7 to 1.2."""
    rng = np.random.default_rng(2)
    x = orthonormal(rng, (8, 3))
    g = 1e3 * normal(rng, (8, 3))
    muon = transforms.scale_by_stiefel_muon(nesterov=False, mask=True)
    u, state = muon.update(g, muon.init(x), x)
    nuclear = np.linalg.svd(state.mu, compute_uv=False).sum()
    assert 0.65 * nuclear < np.sum(np.asarray(u) * np.asarray(g)) < 1.25 * nuclear
    assert np.linalg.norm(u, 2) < 1.25


# Penalties


@pytest.mark.parametrize(("kind", "power"), [("l1_l2", 1), ("squared", 2)])
def test_hoyer_adds_the_gradient_of_its_term(kind, power):
    s = jnp.array([[3.0, -1.0, 0.5], [1.0, 1.0, 1.0]])
    f = Factors(jnp.zeros((2, 4, 3)), s, jnp.zeros((2, 3, 3)))
    zero = jax.tree.map(jnp.zeros_like, f)
    added, _ = (t := transforms.add_hoyer(0.5, kind)).update(zero, t.init(f), f)
    expected = jax.grad(
        lambda s: 0.5 * jnp.sum((jnp.abs(s).sum(-1) / jnp.linalg.norm(s, axis=-1)) ** power)
    )(s)
    np.testing.assert_allclose(added.s, expected, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(added.s * s, axis=-1), 0, atol=1e-6)
    assert not np.any(added.u)


def test_weights_may_be_schedules():
    params, _ = tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    for make_one in (transforms.add_hoyer, transforms.add_orthogonality_penalty):
        late = make_one(lambda count: 1.0 * (count >= 2))
        state, size = late.init(params), []
        far = jax.tree.map(lambda x: 2 * x, params)
        for _ in range(3):
            updates, state = late.update(zero, state, far)
            size.append(float(optax.tree.norm(updates)))
        assert size[:2] == [0, 0]
        assert size[2] > 0.1


def test_orthogonality_penalty_adds_the_gradient_of_its_term():
    rng = np.random.default_rng(3)
    x = normal(rng, (2, 5, 3))
    soft = transforms.add_orthogonality_penalty(0.5, mask=True)
    added, _ = soft.update(jnp.zeros_like(x), soft.init(x), x)
    expected = jax.grad(
        lambda x: 0.5 * jnp.sum(jnp.square(x.mT @ x - jnp.stack([jnp.eye(3)] * 2)))
    )(x)
    np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-4)


def test_alignment_pulls_to_the_target_of_its_state_or_of_the_call():
    params, grads = tree()
    twin = jax.tree.map(jnp.ones_like, params["layer"])
    pull = transforms.add_alignment({"layer": twin, "rows": None, "bias": None}, 0.5)
    update = jax.jit(pull.update, donate_argnums=1)
    added, state = update(grads, pull.init(params), params)
    np.testing.assert_allclose(
        added["layer"].u, grads["layer"].u + params["layer"].u - 1, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(added["rows"], grads["rows"])
    assert not twin.u.is_deleted()
    moved = state._replace(target={**state.target, "layer": params["layer"]})
    added, _ = pull.update(grads, moved, params)
    np.testing.assert_array_equal(added["layer"].u, grads["layer"].u)
    given = {"layer": params["layer"], "rows": None, "bias": params["bias"]}
    added, _ = pull.update(grads, pull.init(params), params, alignment_target=given)
    np.testing.assert_array_equal(added["layer"].u, grads["layer"].u)


# Monitor


def test_drift_is_read_from_the_state_before_and_after_landing():
    params, grads = tree()
    chain = optax.chain(
        optax.scale(-0.1),
        optax.named_chain(
            ("before", transforms.orthogonality_drift(mask=MASK)),
            ("landing", transforms.retract(mask=MASK)),
            ("after", transforms.orthogonality_drift(mask=MASK)),
        ),
    )
    _, state, _ = run(chain, params, grads, steps=1)
    loose = optax.apply_updates(params, jax.tree.map(lambda g: -0.1 * g, grads))
    matrices = loose["layer"].u, loose["layer"].v, loose["rows"].mT
    expected = max(drift(x) for x in matrices)
    np.testing.assert_allclose(state[1]["before"].drift, expected, rtol=1e-4)
    assert expected > 0.1
    assert state[1]["after"].drift < 1e-6


def test_drift_is_measured_in_every_kth_step():
    x = 2 * jnp.eye(4, 2)
    monitor = transforms.orthogonality_drift(every=2, mask=True)
    state, seen = monitor.init(x), []
    for _ in range(2):
        _, state = monitor.update(jnp.zeros_like(x), state, x)
        seen.append(float(optax.tree.get(state, "drift")))
    assert seen == [0, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip_by_rms_is_that_of_optax(dtype):
    arrays = {"u": (7, 3), "s": (3,), "scale": (), "kernel": (3, 3, 2, 5), "stack": (2, 4, 3)}
    keys = dict(zip(arrays, jax.random.split(jax.random.key(0), len(arrays)), strict=True))
    gradients = {
        n: jax.random.normal(keys[n], shape, dtype) * 4**i
        for i, (n, shape) in enumerate(arrays.items())
    }
    ours, theirs = (
        clip.update(gradients, clip.init(gradients))[0]
        for clip in (transforms.clip_by_rms(3.0), optax.clip_by_block_rms(3.0))
    )
    for name, clipped in ours.items():
        assert clipped.dtype == dtype
        np.testing.assert_allclose(
            np.float32(clipped), np.float32(theirs[name]), rtol=1e-6 if dtype == "float32" else 1e-2
        )
    assert any(np.any(ours[n] != gradients[n]) for n in arrays)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "shapes",
    [
        [()],
        [(3,)],
        [(7, 3)],
        [(2, 4, 3)],
        [(3, 3, 2, 5), (5,)],
        [(7, 3), (6, 4), (500, 3), (2, 2, 2)],
    ],
    ids=str,
)
def test_any_arrays_are_clipped_in_one_program(shapes, platform):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    gradients = [4 * jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]
    with linalg.traced_for(platform):
        ours, theirs = (
            jax.jit(clip.update)(gradients, clip.init(gradients))[0]
            for clip in (transforms.clip_by_rms(0.5), optax.clip_by_block_rms(0.5))
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_an_accelerator_computes_gradients_of_factors_once_and_others_where_they_are_read():
    shapes = {"a": (20, 9, 4), "b": (20, 8, 3), "c": (1200, 1000, 512)}
    gradients = {
        name: Factors(*(jnp.full(shape, 3.0) for shape in ((n, r), (r,), (m, r))))
        for name, (n, m, r) in shapes.items()
    }
    gradients["heads"] = Factors(*(jnp.full((2, *x.shape), 3.0) for x in gradients["b"]))
    gradients |= {"dense": jnp.full((8, 3), 3.0), "none": optax.MaskedNode()}
    clip = transforms.clip_by_rms(0.5)
    traced = {}
    for platform in ("cpu", "cuda"):
        with linalg.traced_for(platform):
            traced[platform] = str(jax.make_jaxpr(clip.update)(gradients, clip.init(gradients)))
            clipped = jax.jit(clip.update)(gradients, clip.init(gradients))[0]
        assert all((np.asarray(x) == 0.5).all() for x in jax.tree.leaves(clipped))
        assert jax.tree.structure(clipped) == jax.tree.structure(gradients)
    assert "optimization_barrier" not in traced["cpu"]
    # The small ones of one shape, the large ones of another, and those with an axis more.
    stacks = re.findall(r":f32\[([\d,]+)\] = optimization_barrier", traced["cuda"])
    assert sorted(stacks) == ["2,1200,512", "2,2,20,3", "4,20,4"]


@pytest.mark.parametrize(
    ("platform", "whole", "groups"),
    [("cuda", True, 1), ("cuda", False, 4), ("tpu", True, 4), ("cpu", True, 4)],
)
def test_a_mesh_of_gpus_stacks_matrices_that_are_known_to_be_whole(platform, whole, groups):
    shapes = [(12, 4), (11, 3), (9, 4), (10, 2)]
    rng = np.random.default_rng(4)
    params = [orthonormal(rng, shape) for shape in shapes]
    tangent = transforms.project_to_tangent(mask=True)
    mesh = jax.make_mesh((1,), ("devices",), (jax.sharding.AxisType.Auto,))
    known = linalg.traced_whole() if whole else contextlib.nullcontext()
    with jax.set_mesh(mesh), known, linalg.traced_for(platform):
        program = str(jax.make_jaxpr(tangent.update)(params, tangent.init(params), params))
    assert program.count("dot_general[") == 2 * groups


@pytest.mark.parametrize("retraction", RETRACTIONS)
def test_nearly_equal_shapes_share_a_product_on_an_accelerator_and_move_alike(retraction):
    """There is no accelerator here: its form of the program runs on this platform."""
    rng = np.random.default_rng(4)
    shapes = [(12, 4), (11, 3), (9, 4), (12, 4)]
    params = [orthonormal(rng, shape) for shape in shapes]
    gradients = [normal(rng, shape) for shape in shapes]
    moved, products = [], []
    for platform in ("cpu", "cuda"):
        chain = transforms.ssa(0.05, retraction=retraction, mask=True)
        state, x = chain.init(params), params
        with linalg.traced_for(platform):
            products.append(str(jax.make_jaxpr(chain.update)(gradients, state, x)).count(" dot_"))
            for _ in range(3):
                updates, state = jax.jit(chain.update)(gradients, state, x)
                x = optax.apply_updates(x, updates)
        moved.append(x)
    assert products[0] > products[1]
    for ours, theirs, start in zip(*moved, params, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
        assert np.abs(ours - start).max() > 0.02


# The chain of SSA


def test_ssa_is_its_links_in_order():
    params, grads = tree()
    links = optax.chain(
        transforms.add_hoyer(0.1, mask=MASK),
        transforms.clip_by_rms(0.5),
        transforms.project_to_tangent(mask=MASK),
        optax.scale_by_adam(),
        transforms.project_to_tangent(mask=MASK),
        optax.scale_by_learning_rate(0.1),
        transforms.truncate_rank(0.8, 0.3, 2, mask=MASK),
        transforms.retract("qr", mask=MASK),
    )
    chain = transforms.ssa(
        0.1, hoyer=0.1, clip=0.5, target=0.8, truncate_every=2, retraction="qr", mask=MASK
    )
    jax.tree.map(
        np.testing.assert_array_equal, run(chain, params, grads), run(links, params, grads)
    )


def test_the_configured_optimiser_is_ssa():
    params = {"layer": tree()[0]["layer"]}
    grads = {"layer": tree()[1]["layer"]}
    config = optim.OptimizerConfig(
        0.1, total_steps=10, steps_per_epoch=2, hoyer=0.1, rank_schedule="hybrid"
    )
    moved, state, _ = run(optim.make_optimizer(config), params, grads, steps=6)
    assert max(drift(x) for f in leaves(moved) for x in (f.u, f.v)) < 1e-6
    assert isinstance(state[-2], transforms.TruncateState)
    assert isinstance(state[-1], transforms.RetractState)


@pytest.mark.parametrize(
    ("scale", "atol"),
    # Entries a hundred times below the first are zero in float32 themselves.
    [(1e-37, 0.1), (1e-36, 0.01), (1e-30, 1e-5), (1e-20, 1e-5), (1e20, 1e-5), (1e37, 1e-5)],
)
def test_muon_has_the_direction_of_a_gradient_of_any_scale(scale, atol):
    rng = np.random.default_rng(0)
    x, g = orthonormal(rng, (8, 3)), normal(rng, (8, 3))
    muon = transforms.scale_by_stiefel_muon(mask=True)
    (u, _), (scaled, _) = (muon.update(y, muon.init(x), x) for y in (g, g * scale))
    np.testing.assert_allclose(scaled, u, atol=atol)


def test_muon_rests_when_gradients_die_away():
    """Momentum decays below what its squares can represent, and no step grows from that."""
    rng = np.random.default_rng(0)
    x, g = orthonormal(rng, (8, 3)), 1e-3 * normal(rng, (8, 3))
    chain = transforms.stiefel_muon(0.01, mask=True)

    def step(carry, i):
        x, state = carry
        u, state = chain.update(jnp.where(i < 100, 1.0, 0.0) * g, state, x)
        return (optax.apply_updates(x, u), state), jnp.max(jnp.abs(u))

    (x, _), sizes = jax.jit(lambda x: jax.lax.scan(step, (x, chain.init(x)), jnp.arange(3000)))(x)
    assert drift(x) < 1e-6
    assert np.max(sizes) < 0.1
    # Of the landing of a step of zero only rounding is left.
    assert sizes[-1] < 1e-6
