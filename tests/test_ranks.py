"""Rank schedules, selection and compaction."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import first, make_batch, make_method, max_difference, split

from ssa_jax import factors, transforms
from ssa_jax.networks.forward import predict
from ssa_jax.training import ranks
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OptimizerConfig, make_optimizer
from ssa_jax.training.train import init_state, make_refresh, make_step

FRACTIONS = np.linspace(0, 1, 101)


@pytest.mark.parametrize("name", ranks.SCHEDULES)
def test_targets_are_shares_and_ranks_never_grow(name):
    targets = [ranks.SCHEDULES[name](jnp.float32(t), 0.95) for t in FRACTIONS]
    rank = np.array([float(t.rank) for t in targets])
    assert ((rank > 0) & (rank <= 1)).all()
    assert (np.diff(rank) <= 0).all()
    assert all(0 < float(t.energy) <= 1 for t in targets)


def test_hybrid_is_linear_under_hoyer_then_energy_then_rest():
    def at(t):
        return [float(x) for x in ranks.hybrid(jnp.float32(t), 0.95)]

    assert at(0) == [1, 1, 1]
    assert at(0.15) == pytest.approx([0.85, 1, 1])
    assert at(0.3) == pytest.approx([0.7, 1, 1])
    assert at(0.31) == pytest.approx([0.7, 0.95, 0])
    assert at(0.8) == pytest.approx([0.7, 0.95, 0])
    assert at(1) == pytest.approx([0.7, 1, 0])


def test_hoyer_is_hybrid_without_its_fall_and_energy_cuts_from_the_warm_up():
    for t in FRACTIONS:
        alone, both = (ranks.SCHEDULES[n](jnp.float32(t), 0.9) for n in ("hoyer", "hybrid"))
        assert float(alone.rank) == 1
        assert [float(x) for x in alone[1:]] == [float(x) for x in both[1:]]
    cuts = [
        float(ranks.energy_alone(jnp.float32(t), 0.9).energy) for t in (0, 0.05, 0.06, 0.8, 0.81)
    ]
    assert cuts == pytest.approx([1, 1, 0.9, 0.9, 1])


def test_the_budget_falls_cubically_between_its_ends():
    shares = [float(ranks.annealed(jnp.float32(t))) for t in (0, 0.1, 0.35, 0.6, 1)]
    assert shares == pytest.approx([1, 1, 0.125, 0, 0], abs=1e-6)


@pytest.mark.parametrize("floor", [0.05, 0.2, 0.6, 0.9])
@pytest.mark.parametrize(
    ("schedule", "target"),
    [("hybrid", ranks.LINEAR_TARGET), ("hybrid", 0.9), ("hoyer", 0.7), ("energy", 0.7)],
)
def test_the_share_to_reach_a_floor_does_so_on_a_flat_spectrum(schedule, target, floor):
    """The worst spectrum there is, cut as the schedule says, one period after the other."""
    final = max(target, floor)
    share = ranks.energy_to_reach(schedule, 0.95, floor, 0.05, target)
    assert share <= 0.95
    rank = 1.0
    for step in range(1, 1001):
        asked = ranks.SCHEDULES[schedule](jnp.float32(step / 1000), share, final)
        kept = float(asked.energy) if step % 50 == 1 else 1.0
        rank = max(floor, min(float(asked.rank), rank * kept))
    assert rank == pytest.approx(floor, rel=2e-3)
    assert ranks.energy_to_reach("linear", 0.95, floor, 0.05) == 0.95


def test_linear_reaches_its_target_and_stays():
    assert float(ranks.linear(jnp.float32(0.5), 0.95, 0.2).rank) == pytest.approx(0.2)
    values = [float(ranks.linear(jnp.float32(t), 0.95).rank) for t in (0, 0.1, 0.3, 0.9)]
    assert values == pytest.approx([1, 0.9, 0.7, 0.7])


@pytest.mark.parametrize("stored", [3, 8, 9, 50, 64, 96, 512])
def test_buckets_hold_the_rank(stored):
    buckets = [factors.bucket(k, stored) for k in range(1, stored + 1)]
    assert all(k <= b <= stored for k, b in enumerate(buckets, 1))
    assert buckets == sorted(buckets)


def test_a_rank_that_falls_to_the_floor_is_compacted_at_most_three_times_and_at_the_end():
    shapes = {"a": (300, 400, 200), "b": (50, 60, 40)}
    params = {
        name: factors.Factors(jnp.ones((m, r)), jnp.ones(r), jnp.ones((n, r)))
        for name, (m, n, r) in shapes.items()
    }
    sizes = []
    for share in np.linspace(1, 0.3, 141):
        for name, full in (("a", 200), ("b", 40)):
            alive = np.arange(params[name].rank) < np.ceil(share * full)
            params[name] = params[name]._replace(s=jnp.asarray(alive, jnp.float32))
        # The last one is exact, whatever it saves.
        if chosen := ranks.selection(params, 1 if share < 0.301 else None):
            params = ranks.compact(params, chosen)
            sizes.append(params["a"].rank)
    assert 2 <= len(sizes) <= 4
    assert sizes[-1] == 60
    assert all(small <= 0.72 * large for large, small in itertools.pairwise([200, *sizes[:-1]]))


def test_buckets_are_of_the_hardware_and_one_stores_the_rank_itself(monkeypatch):
    assert factors.bucket(13, 96) == 16
    assert factors.bucket(13, 96, 1) == 13
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert factors.bucket(13, 96) == 96
    assert factors.bucket(13, 512) == 128
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert factors.bucket(13, 96) == 16


def trained(rank_schedule, steps=12, network="conv"):
    """A few steps of SSA whose epochs are two steps long, and what is needed to go on."""
    units, params, mstate = split(network, 1.0)
    method = make_method("ssa", units, params, mstate)
    config = OptimizerConfig(0.01, steps, 2, rank_schedule=rank_schedule, hoyer=1e-2)
    optimizer = make_optimizer(config)
    state = init_state(method, optimizer, params, mstate, jax.random.key(0))
    compiled = []
    step = make_step(units, method, optimizer, LossWeights(), lambda: compiled.append(1))
    refresh = make_refresh(method)
    for i in range(steps):
        state, _ = step(refresh(state), make_batch(16, seed=i))
    return units, state, step, refresh, compiled


def test_truncation_follows_the_schedule_and_is_sticky():
    _, state, _, _, compiled = trained("linear")
    for f in factors.leaves(state.params):
        alive = int(jnp.count_nonzero(f.s))
        assert alive == max(int(np.ceil(0.7 * f.rank - 1e-4)), min(f.rank, ranks.LEAST))
    assert len(compiled) == 1


def test_hybrid_goes_below_linear_and_respects_the_floor():
    _, linear, *_ = trained("linear")
    _, hybrid, *_ = trained("hybrid")
    for a, b in zip(factors.leaves(linear.params), factors.leaves(hybrid.params), strict=True):
        assert int(jnp.count_nonzero(b.s)) <= int(jnp.count_nonzero(a.s))
        assert int(jnp.count_nonzero(b.s)) >= max(0.3 * b.rank, min(b.rank, ranks.LEAST))
    alive = [sum(int(jnp.count_nonzero(f.s)) for f in factors.leaves(s.params))
             for s in (linear, hybrid)]  # fmt: skip
    assert alive[1] < alive[0]


def test_compaction_leaves_the_logits_and_the_next_steps_unchanged():
    units, state, step, refresh, compiled = trained("hybrid")
    chosen = ranks.selection(state.params, 1)
    assert chosen
    small = ranks.compact(jax.tree.map(jnp.copy, state), chosen)
    x = make_batch(seed=99).images
    before = predict(units, state.params, state.mstate, x)
    assert max_difference(before, predict(units, small.params, small.mstate, x)) < 1e-5
    for i in range(3):
        batch = make_batch(16, seed=50 + i)
        state, a = step(refresh(state), batch)
        small, b = step(refresh(small), batch)
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4)
    # The whole state was sliced: no shape of the wide one is left, and one compilation served.
    for name, f in factors.named_leaves(small).items():
        layer = next((k for k in chosen if name.endswith("/" + k)), None)
        if layer:
            assert f.s.shape[-1] == len(chosen[layer]), name
    assert len(compiled) == 2


def test_selection_keeps_what_is_not_zero_sorted_by_size():
    s = jnp.zeros(64).at[jnp.array([5, 60, 7])].set(jnp.array([1.0, -3.0, 2.0]))
    f = factors.Factors(jnp.ones((70, 64)), s, jnp.ones((80, 64)))
    chosen = ranks.selection({"kernel": f, "full": f._replace(s=jnp.ones(64))})
    assert list(chosen["kernel"][:3]) == [60, 7, 5]
    assert len(chosen["kernel"]) == 8
    assert list(chosen["full"]) == list(range(64))
    assert not ranks.selection({"full": f._replace(s=jnp.ones(64))})


def test_a_layer_whose_path_ends_with_anothers_keeps_its_own_rank():
    f = factors.Factors(jnp.ones((20, 16)), jnp.arange(16.0), jnp.ones((18, 16)))
    cut = factors.Factors(jnp.ones((60, 16)), f.s.at[3:].set(0), jnp.ones((70, 16)))
    params = ({"map": {"kernel": cut}}, {"body": ({"map": {"kernel": f}},)})
    small = ranks.compact({"params": params}, ranks.selection(params))["params"]
    assert [x.rank for x in factors.leaves(small)] == [8, 16]
    assert jnp.array_equal(factors.leaves(small)[1].s, f.s)


LAYER = "0/map/kernel"
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1e9), tx),
    "multi_steps": lambda tx: optax.MultiSteps(tx, every_k_schedule=2),
    "masked": lambda tx: optax.masked(tx, ({"map": True}, {"map": True})),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "theirs": optax.sgd(0.1)}, ({"map": "ours"}, {"map": "theirs"})
    ),
    "split_factors": lambda tx: optax.partition(
        {"a": tx, "b": optax.sgd(0.1, momentum=0.9)},
        ({"map": {"kernel": factors.Factors("a", "b", "a")}}, {"map": {"kernel": "b"}}),
    ),
    "inject": lambda tx: optax.chain(
        tx, optax.inject_hyperparams(optax.trace)(decay=lambda count: 0.9 - 0.1 * count)
    ),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
    "adafactor_unfactored": lambda tx: optax.chain(optax.scale_by_factored_rms(factored=False), tx),
    "truncate": lambda tx: optax.chain(tx, transforms.truncate_rank(lambda count: 0.3)),
    "stable_rank": lambda tx: optax.chain(tx, transforms.truncate_stable_rank()),
    # The budget keeps what is alive, and one choice has been made before the slice.
    "adaptive": lambda tx: transforms.adapt_rank(tx, 300.0, every=2, until=2),
}


def wide_tree(seed=0):
    """A factorised layer of rank 16 with four live directions, a dense one, and gradients."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, 16)))[0] for n in (20, 18))
    s = np.where(np.arange(16) % 4 == 1, np.arange(16.0), 0)
    f = factors.Factors(*(jnp.asarray(x, jnp.float32) for x in (u, s, v)))
    params = ({"map": {"kernel": f}}, {"map": {"kernel": jnp.ones((3, 4))}})
    return params, jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params
    )


@pytest.mark.parametrize("wrapper", first(WRAPPERS, 5))
def test_after_compaction_the_next_update_is_the_slice_of_the_wide_one(wrapper):
    """For chains that treat every entry alone; the weight itself does not change either."""
    params, grads = wide_tree()
    dead = params[0]["map"]["kernel"].s == 0
    optimizer = WRAPPERS[wrapper](optax.adam(1e-3))
    state, update = optimizer.init(params), jax.jit(optimizer.update)

    def keep_dead(tree):
        # Stands for the truncation that the other wrappers have none of.
        f = tree[0]["map"]["kernel"]
        cut = f._replace(s=jnp.where(dead, 0, f.s))
        return ({"map": {"kernel": cut}}, tree[1])

    for _ in range(3):
        updates, state = update(grads, state, params)
        params = keep_dead(optax.apply_updates(params, updates))
    chosen = ranks.selection(params)
    small, small_state, small_grads = ranks.compact((params, state, grads), chosen)
    assert jax.tree.structure(small_state) == jax.tree.structure(state)
    weights = [factors.to_dense(tree[0]["map"]["kernel"]) for tree in (params, small)]
    assert max_difference(*weights) < 1e-5
    for _ in range(2):
        wide, state = update(grads, state, params)
        narrow, small_state = update(small_grads, small_state, small)
        expected = ranks.compact(wide, chosen)
        assert max_difference(narrow, expected) < 1e-6
        assert max_difference(wide, jax.tree.map(jnp.zeros_like, wide)) > 0 or "multi" in wrapper
        params = optax.apply_updates(params, wide)
        small = optax.apply_updates(small, narrow)


def test_a_state_that_has_no_axis_of_the_rank_is_refused():
    params, _ = wide_tree()
    optimizer = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    with pytest.raises(ValueError, match=f"{LAYER}.*does not end in its rank"):
        ranks.compact(optimizer.init(params), {LAYER: np.arange(8)})


def test_a_copy_of_the_parameters_is_sliced_like_them():
    params, _ = wide_tree()
    ema = jax.tree.map(lambda x: 0.5 * x, params)
    small = ranks.compact({"ema": ema, "params": params}, ranks.selection(params))
    assert max_difference(small["ema"], jax.tree.map(lambda x: 0.5 * x, small["params"])) == 0
