"""Layers that factors make dearer stay dense, where ranks do not fall below that, and are told."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from ssa_jax import cut, factorize
from ssa_jax.data import Dataset, load
from ssa_jax.errors import ConfigError
from ssa_jax.factors import full_rank, named_leaves
from ssa_jax.layers import SVDConv, SVDDense
from ssa_jax.models.blocks import Plain, dense
from ssa_jax.models.feedforward import Feedforward
from ssa_jax.networks import worth
from ssa_jax.networks.factorize import LeftDense
from ssa_jax.networks.models import start
from ssa_jax.runs.config import Config
from ssa_jax.runs.network import make_model
from ssa_jax.training import costs

RNGS = nnx.Rngs(0)
X = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32)


def convolution(n, size, rank, **options):
    ours = SVDConv(16, n, size, rank=rank, rngs=RNGS, **options)
    return ours, nnx.Conv(16, n, (size, size), rngs=RNGS, **options)


LAYERS = {
    "dense": lambda rank: (
        SVDDense(16, 16, rank=rank, rngs=RNGS), nnx.Linear(16, 16, rngs=RNGS)
    ),
    "square": lambda rank: convolution(16, 3, rank),
    "pointwise": lambda rank: convolution(64, 1, rank),
    "strided": lambda rank: convolution(16, 3, rank, strides=2),
    "narrowing": lambda rank: convolution(4, 3, rank, strides=(1, 2)),
    "grouped": lambda rank: convolution(32, 3, rank, feature_group_count=4),
}  # fmt: skip


@pytest.mark.parametrize("rank", [0.25, 0.5, 0.625, 0.75])
@pytest.mark.parametrize("kind", LAYERS)
def test_dearer_is_what_takes_more_multiply_accumulates_or_parameters(kind, rank):
    pair, dense = LAYERS[kind](rank)
    pair.eval()
    f = pair.kernel.get_value()
    work = costs.macs(pair, X) > costs.macs(dense, X)
    size = f.u.size + f.v.size > dense.kernel.get_value().size
    for layer in (pair, dense):
        why = worth.dearer(layer, (f.u.shape[0], f.v.shape[0]), f.rank)
        assert (why is not None) == (work or size)


class Mixed(nnx.Module):
    """A square layer, whose pair costs as much at half of full rank, and a wide one."""

    def __init__(self):
        self.square = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
        self.wide = nnx.Linear(32, 256, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.wide(cut(self.square(x)))


def on_factors(model):
    return {p.split("/")[0] for p in named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))}


def test_a_layer_that_its_pair_makes_dearer_stays_dense_and_is_told():
    assert on_factors(factorize(Mixed(), rank=0.5)) == {"square", "wide"}
    told = r"left dense: square \(dearer on factors at rank 22 of 32\)$"
    with pytest.warns(LeftDense, match=told):
        made = factorize(Mixed(), rank=0.7)
    assert on_factors(made) == {"wide"}
    assert made.square.kernel is not None
    with pytest.raises(ValueError, match=r"no layer is left .* at 0\.95 of full rank they would"):
        factorize(Mixed(), rank=0.95)


@pytest.mark.parametrize("fractions", [(0.7, 0.5), (0.95, 0.2), (0.95, 0.0), (1.0, None)])
def test_ranks_that_fall_far_enough_and_exact_factors_are_as_they_were_asked_for(fractions):
    rank, lowest = fractions
    made = factorize(Mixed(), rank=rank, lowest=lowest)
    assert on_factors(made) == {"square", "wide"}
    assert made.square.kernel.get_value().rank == round(32 * rank)


def test_a_lowest_rank_lies_below_the_first():
    for lowest in (-0.1, 0.6):
        with pytest.raises(ValueError, match=r"lowest must lie in \[0, rank\]"):
            factorize(Mixed(), rank=0.5, lowest=lowest)


def test_layers_of_linen_are_judged_alike():
    class InLinen(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(256)(cut(linen.Dense(32)(x)))
            return linen.Conv(256, (1, 1), strides=2)(x[:, None, None])

    model = start(InLinen(), jax.ShapeDtypeStruct((1, 32), jnp.float32), 0)
    with pytest.warns(LeftDense, match=r"Dense_1 \(dearer .*Conv_0 \(dearer") as told:
        made = factorize(model, rank=0.7)
    assert len(told) == 1
    assert set(named_leaves(made.variables["params"])) == {"Dense_0/kernel"}


DIGITS = Config(dataset="digits", model="mlp", rank_init=0.7)


@pytest.fixture(scope="module")
def digits():
    return load("digits")


def ranks_of(data: Dataset, **changes):
    """Rank over full rank of the layers of a run's model that are on factors."""
    settings = {**vars(DIGITS), **changes}
    model = make_model(Config(**settings), data, factorized=True)
    found = named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {p[6]: f.rank / full_rank(f.u.shape[0], f.v.shape[0]) for p, f in found.items()}


def test_a_run_leaves_dense_what_its_ranks_never_make_cheaper(digits):
    # The first layer is at full rank, which the model chose.
    told = r"left dense: units/1/map \(dearer on factors at rank 358 of 512\)"
    with pytest.warns(LeftDense, match=told):
        assert set(ranks_of(digits)) == {"0"}
    with pytest.warns(LeftDense, match=r"at rank 358"):
        assert set(ranks_of(digits, rank_init=1 / 1.1, rank_schedule="linear", rank_target=0.77))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_schedule": "hybrid"},
        {"rank_schedule": "linear"},
        {"factorize": "all"},
        {"rank_budget": 0.9},
        {"rank_init": 1.0},
        {"rank_init": 0.5},
    ],
    ids=str,
)
def test_a_run_keeps_factors_that_fall_that_are_asked_for_or_that_pay(digits, changes):
    found = ranks_of(digits, **changes)
    assert set(found) == {"0", "1"}
    assert found["1"] == pytest.approx(changes.get("rank_init", 0.7), abs=1e-3)


def squares(shape, outputs, *, rank, rngs):
    """A model of one square layer and a dense classifier."""
    del shape
    layers = [dense(64, 64, rank=rank, rngs=rngs), dense(64, outputs, rank=None, rngs=rngs)]
    return Feedforward([Plain(layer, flatten=True) for layer in layers])


def test_a_run_of_which_no_layer_is_left_is_told_what_to_do(digits):
    with pytest.raises(ConfigError, match=r"every layer is dearer than dense at --rank_init=0\.7"):
        ranks_of(digits, model="test_worth:squares")
    assert set(ranks_of(digits, model="test_worth:squares", rank_init=0.5)) == {"0"}


def test_a_dense_layer_in_place_of_a_dearer_one_is_that_of_the_dense_model(digits):
    with pytest.warns(LeftDense):
        mixed = make_model(DIGITS, digits, factorized=True)
    plain = make_model(DIGITS, digits, factorized=False)
    assert type(mixed.units[1].map) is nnx.Linear
    assert jnp.array_equal(mixed.units[1].map.kernel[...], plain.units[1].map.kernel[...])


def test_paths_are_dropped_by_models_that_have_any(digits):
    settings = {"model": "vit_tiny", "drop_path": 0.2}
    model = nnx.eval_shape(
        lambda: make_model(Config(dataset="digits", **settings), digits, factorized=False)
    )
    rates = [x.rate for _, x in nnx.iter_modules(model) if isinstance(x, nnx.Dropout)]
    assert max(rates) == pytest.approx(0.2)
    with pytest.raises(ConfigError, match=r"--drop_path is for vision transformers .* not for mlp"):
        ranks_of(digits, drop_path=0.2)
