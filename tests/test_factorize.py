"""Dense models on factors: what comes out, what is left alone, and that it trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import IMAGE, NETWORKS, apart, make_batch, make_method

from ssa_jax import factors
from ssa_jax.layers import SVDConv, SVDDense
from ssa_jax.networks import factorize
from ssa_jax.networks.factorize import LeftDense, from_dense
from ssa_jax.training import train
from ssa_jax.training.losses import LossWeights
from ssa_jax.training.optim import OptimizerConfig, make_optimizer


def logits(model, x):
    return jax.jit(lambda x: model(x))(x)


def trained(name):
    """A dense network whose batch norms have seen something."""
    model = NETWORKS[name](None)
    for seed in range(2):
        model(3 * make_batch(seed=seed).images + 1)
    model.eval()
    return model


def kernels(model):
    found = {"/".join(map(str, path)): x for path, x in nnx.iter_modules(model)}
    return {k: x.kernel.get_value() for k, x in found.items() if isinstance(x, SVDConv | SVDDense)}


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.parametrize("choice", [{"rank": 1.0}, {"energy": 1.0}], ids=str)
def test_full_rank_reproduces_the_dense_model(name, choice):
    model, x = trained(name), make_batch().images
    before = logits(model, x)
    converted = from_dense(model, **choice)
    assert all(f.rank == min(f.u.shape[0], f.v.shape[0]) for f in kernels(converted).values())
    after = logits(converted, x)
    assert jnp.max(jnp.abs(after - before)) <= 1e-5 * jnp.max(jnp.abs(before))
    # The model itself is left as it was.
    assert not kernels(model)
    assert jnp.array_equal(logits(model, x), before)


def test_a_truncated_layer_is_the_best_approximation_of_its_rank():
    layer = nnx.Linear(9, 7, rngs=nnx.Rngs(0))
    w = np.asarray(layer.kernel.get_value().T)
    s = np.linalg.svd(w, compute_uv=False)
    f = from_dense(layer, rank=0.43).kernel.get_value()
    assert f.rank == 3
    error = np.linalg.norm(w - np.asarray(factors.to_dense(f)))
    assert error == pytest.approx(np.sqrt(np.sum(s[3:] ** 2)), rel=1e-5)
    assert float(factors.orthogonality_error(f)) < 1e-6


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 0.999])
def test_energy_chooses_the_smallest_rank_that_keeps_the_share(energy):
    model = trained("conv")
    spectra = {k: np.square(f.s) for k, f in kernels(from_dense(model, rank=1.0)).items()}
    for name, f in kernels(from_dense(model, energy=energy)).items():
        total = spectra[name].sum()
        assert spectra[name][: f.rank].sum() >= energy * total * (1 - 1e-6)
        assert f.rank == 1 or spectra[name][: f.rank - 1].sum() < energy * total


def test_energy_rank_by_hand():
    s = np.array([2.0, 1.0, 1.0])
    assert [factorize.energy_rank(s, e) for e in (0.5, 4 / 6, 0.7, 0.8, 0.9, 1.0)] == [
        1, 1, 2, 2, 3, 3,
    ]  # fmt: skip
    assert factorize.energy_rank(np.zeros(3), 0.9) == 1


def test_named_ranks_convert_the_named_layers_alone():
    found = kernels(from_dense(trained("conv"), ranks={"units/1/map": 4, "units/2/map": 7}))
    assert {k: f.rank for k, f in found.items()} == {"units/1/map": 4, "units/2/map": 7}


class Mixed(nnx.Module):
    """Layers that factors can hold, and others."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.plain = nnx.Conv(4, 4, (3, 2), strides=(2, 1), padding=((0, 1), (1, 0)), rngs=rngs)
        self.grouped = nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs)
        self.dilated = nnx.Conv(4, 4, (3, 3), kernel_dilation=2, rngs=rngs)
        self.circular = nnx.Conv(4, 4, (3, 3), padding="CIRCULAR", rngs=rngs)
        self.half = nnx.Conv(4, 4, (3, 3), dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x):
        for layer in (self.plain, self.grouped, self.dilated, self.circular, self.half):
            x = layer(x)
        return x


def test_layers_that_factors_cannot_hold_stay_dense_or_are_named():
    model, x = Mixed(), jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    with pytest.warns(LeftDense, match="circular .*; half"):
        converted = from_dense(model, rank=1.0)
    assert set(kernels(converted)) == {"plain", "grouped", "dilated"}
    assert jnp.allclose(converted(x), model(x), atol=1e-2)
    assert jnp.allclose(converted.plain(x), model.plain(x), atol=1e-5)
    for name, reason in {
        "circular": "padding=CIRCULAR", "half": "float32",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name} cannot be factorised: .*{reason}"):
            from_dense(model, ranks={name: 1})


def test_a_shared_layer_stays_shared():
    layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
    converted = from_dense(nnx.Sequential(layer, nnx.relu, layer), rank=0.5)
    assert converted.layers[0] is converted.layers[2]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "exactly one of rank, ranks and energy"),
        ({"rank": 0.5, "energy": 0.9}, "exactly one"),
        ({"rank": 1.5}, "rank fraction must lie in"),
        ({"energy": 0.0}, "energy must lie in"),
        ({"ranks": {"units/9/map": 3}}, "no layer with a kernel at 'units/9/map', there are"),
        ({"ranks": {"units/0/map": 99}}, r"a whole number in \[1, 6\], got 99"),
        ({"ranks": {"units/0/map": 0.5}}, "got 0.5"),
    ],
    ids=str,
)
def test_wrong_choices(choice, message):
    with pytest.raises(ValueError, match=message):
        from_dense(trained("conv"), **choice)


@pytest.mark.parametrize("name", sorted(NETWORKS))
@pytest.mark.slow
def test_a_converted_model_trains_by_ssa(name):
    units, params, mstate = apart(from_dense(NETWORKS[name](None), rank=0.5))
    method = make_method("ssa", units, params, mstate, IMAGE)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, total_steps=10, steps_per_epoch=10)
    )
    state = train.init_state(method, optimizer, params, mstate, jax.random.key(0))
    before = jax.tree.map(jnp.copy, params)
    step = train.make_step(units, method, optimizer, LossWeights())
    # Two, since the learning rate of the first is zero.
    for seed in range(2):
        state, measured = step(state, make_batch(seed=seed))
    assert np.isfinite(float(measured["loss"]))
    assert float(factors.orthogonality_error(state.params)) < 1e-5
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), before, state.params)
    assert all(x > 0 for f in factors.leaves(moved) for x in f)


def test_the_optimizer_of_nnx_takes_a_converted_model():
    model = from_dense(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rank=1.0)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((2, 5)))))(model))
    assert jnp.allclose(model.bias.get_value(), -0.2)


class Two(nnx.Module):
    """Layers a and b, b of another make."""

    def __init__(self, b):
        self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.b = b

    def __call__(self, x):
        return self.b(self.a(x))


def tied():
    model = Two(nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model.b.kernel = model.a.kernel
    return model


@nnx.split_rngs(splits=3)
@nnx.vmap(in_axes=0, out_axes=0)
def stack(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


class Stacked(nnx.Module):
    def __init__(self):
        self.layers = stack(nnx.Rngs(0))

    def __call__(self, x):
        layers, rest = nnx.split(self.layers)
        for i in range(3):
            x = nnx.merge(layers, jax.tree.map(lambda v, i=i: v[i], rest))(x)
        return x


def negative(*args, **options):
    return -jax.lax.dot_general(*args, **options)


def doubled(*args, **options):
    return 2 * jax.lax.conv_general_dilated(*args, **options)


RNGS = nnx.Rngs(2)
STRANGE = {
    "dot_general": lambda: Two(nnx.Linear(4, 4, dot_general=negative, rngs=RNGS)),
    "precision": lambda: Two(nnx.Linear(4, 4, precision="highest", rngs=RNGS)),
    "kernel is another": tied,
    "a stack of layers": Stacked,
    "Einsum": lambda: Two(nnx.Einsum("...i,ij->...j", (4, 4), rngs=RNGS)),
    "conv_general_dilated": lambda: nnx.Conv(
        4, 4, (3,) * 2, conv_general_dilated=doubled, rngs=RNGS
    ),
}


@pytest.mark.parametrize("reason", STRANGE)
def test_what_is_not_understood_stays_dense_and_is_named(reason):
    """At full rank the outputs are those of the dense model, whatever a layer is."""
    model = STRANGE[reason]()
    x = jax.random.normal(jax.random.key(3), (2, 5, 5, 4))
    with pytest.warns(LeftDense, match=reason):
        converted = from_dense(model, rank=1.0)
    np.testing.assert_allclose(converted(x), model(x), atol=1e-5)
    if reason == "kernel is another":
        assert converted.a.kernel is converted.b.kernel


@pytest.mark.parametrize("reason", STRANGE)
def test_a_layer_that_is_not_understood_is_refused_by_name(reason):
    model = STRANGE[reason]()
    path = {"a stack of layers": "layers", "conv_general_dilated": ""}.get(reason, "b")
    with pytest.raises(ValueError, match=f"^{path} cannot be factorised: .*{reason}"):
        from_dense(model, ranks={path: 1})
