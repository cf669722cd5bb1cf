"""Rank schedules, selection and compaction."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_batch, make_method, max_difference, split

from ssa_jax import factors, ranks
from ssa_jax.forward import predict
from ssa_jax.losses import LossWeights
from ssa_jax.optim import OptimizerConfig, make_optimizer
from ssa_jax.train import init_state, make_refresh, make_step

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


def test_linear_reaches_its_target_and_stays():
    values = [float(ranks.linear(jnp.float32(t), 0.95).rank) for t in (0, 0.1, 0.3, 0.9)]
    assert values == pytest.approx([1, 0.9, 0.7, 0.7])


@pytest.mark.parametrize("stored", [3, 8, 9, 50, 64, 96, 512])
def test_buckets_hold_the_rank_and_are_few(stored):
    buckets = [ranks.bucket(k, stored) for k in range(1, stored + 1)]
    assert all(k <= b <= stored for k, b in enumerate(buckets, 1))
    assert buckets == sorted(buckets)
    assert len(set(buckets)) <= 8


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
    chosen = ranks.selection(state.params)
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
    cut = f._replace(s=f.s.at[3:].set(0))
    params = ({"map": {"kernel": cut}}, {"body": ({"map": {"kernel": f}},)})
    small = ranks.compact({"params": params}, ranks.selection(params))["params"]
    assert [x.rank for x in factors.leaves(small)] == [8, 16]
    assert jnp.array_equal(factors.leaves(small)[1].s, f.s)


def test_compaction_reaches_moments_through_wrappers():
    f = factors.Factors(jnp.ones((20, 16)), jnp.arange(16.0), jnp.ones((18, 16)))
    params = ({"map": {"kernel": f}}, {"map": {"kernel": jnp.ones((3, 4))}})
    optimizer = optax.MultiSteps(
        optax.chain(
            optax.masked(optax.adam(1e-3), ({"map": True}, {"map": False})), optax.ema(0.9)
        ),
        every_k_schedule=2,
    )
    state = optimizer.init(params)
    small = ranks.compact(state, {"0/map/kernel": np.arange(8)})
    found = factors.leaves(small)
    assert len(found) == len(factors.leaves(state)) >= 4
    assert {x.rank for x in found} == {8}
    assert jax.tree.structure(small) == jax.tree.structure(state)
