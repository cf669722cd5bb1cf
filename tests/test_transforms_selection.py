"""Which leaves a transformation touches, and what a wrong tree is told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stiefel_cases import TRANSFORMS, drift, normal, orthonormal

from ssa_jax import transforms
from ssa_jax.factors import Factors

TAKES_MASK = [name for name in TRANSFORMS if name != "add_alignment"]


def factors(rng=None):
    rng = rng or np.random.default_rng(0)
    return Factors(orthonormal(rng, (4, 2)), jnp.ones(2), orthonormal(rng, (3, 2)))


def land(mask, params, seed=1):
    """The parameters after a random step and a retraction under a mask."""
    rng = np.random.default_rng(seed)
    retract = transforms.retract("qr", mask=mask)
    updates = jax.tree.map(lambda x: normal(rng, x.shape), params)
    landed, _ = jax.jit(retract.update)(updates, retract.init(params), params)
    return optax.apply_updates(params, landed), optax.apply_updates(params, updates)


def test_the_mask_may_be_a_tree_a_prefix_or_a_function():
    rng = np.random.default_rng(0)
    block = {"q": orthonormal(rng, (5, 2)), "k": orthonormal(rng, (2, 4, 3))}
    params = {"block": block, "wide": orthonormal(rng, (5, 2)).T, "bias": jnp.zeros(3)}
    masks = [
        {"block": {"q": True, "k": "columns"}, "wide": "rows", "bias": False},
        {"block": True, "wide": "rows"},
        lambda p: {"block": jax.tree.map(lambda _: True, p["block"]), "wide": "rows"},
        transforms.label_paths(
            lambda path, x: x.ndim > 1 and ("rows" if path == "wide" else "columns")
        ),
    ]
    results = [land(mask, params) for mask in masks]
    for moved, unconstrained in results:
        assert drift(moved["block"]["q"]) < 1e-6
        assert drift(moved["block"]["k"]) < 1e-6
        assert drift(moved["wide"].T) < 1e-6
        np.testing.assert_array_equal(moved["bias"], unconstrained["bias"])
        np.testing.assert_array_equal(moved["block"]["q"], results[0][0]["block"]["q"])


def test_factors_need_no_mask_and_can_be_left_out():
    params = {"a": factors(), "b": factors()}
    moved, unconstrained = land(None, params)
    assert max(drift(x) for f in moved.values() for x in (f.u, f.v)) < 1e-6
    np.testing.assert_array_equal(moved["a"].s, unconstrained["a"].s)
    moved, unconstrained = land({"a": False}, params)
    np.testing.assert_array_equal(moved["a"].u, unconstrained["a"].u)
    assert drift(moved["b"].u) < 1e-6


def test_stacked_factors_move_as_each_of_them_alone():
    rng = np.random.default_rng(3)
    layers = [factors(rng) for _ in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    grads = [jax.tree.map(lambda x: normal(rng, x.shape), f) for f in layers]
    chain = transforms.ssa(0.1, hoyer=0.1, target=0.9, clip=1e6)
    update = jax.jit(chain.update)
    one = [update(g, chain.init(f), f)[0] for f, g in zip(layers, grads, strict=True)]
    together, _ = update(
        jax.tree.map(lambda *x: jnp.stack(x), *grads), chain.init(stacked), stacked
    )
    alone = jax.tree.map(lambda *x: jnp.stack(x), *one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)


BAD = {
    "wide matrix": ({"net": {"w": jnp.ones((2, 5))}}, {"net": {"w": True}}, r"net/w: .*\"rows\""),
    "tall as rows": ({"w": jnp.ones((5, 2))}, {"w": "rows"}, r"w: .*\"columns\""),
    "stack of wide": ({"w": jnp.ones((9, 2, 5))}, {"w": "columns"}, "w: 5 columns of length 2"),
    "vector": ({"net": [jnp.ones(3)]}, {"net": [True]}, r"net/0: .*matrix"),
    "integers": ({"w": jnp.ones((5, 2), int)}, {"w": True}, "w: .*floating.*int32"),
    "complex": ({"w": jnp.ones((5, 2), complex)}, {"w": True}, "w: .*real floating"),
    "unknown label": ({"w": jnp.ones((5, 2))}, {"w": "diagonal"}, "w: unknown label 'diagonal'"),
    "no such leaf": ({"w": jnp.ones((5, 2))}, {"v": True}, "v: the mask labels no parameter"),
    "below a leaf": ({"w": jnp.ones((5, 2))}, {"w": {"x": True}}, "w/x: .*inside a parameter"),
    "inside factors": (
        {"layer": factors()},
        {"layer": Factors(True, False, True)},
        "layer/.*u: the mask reaches inside Factors",
    ),
    "factors as rows": ({"layer": factors()}, {"layer": "rows"}, "layer: .*True or False"),
    "wide factors": (
        {"layer": Factors(jnp.ones((2, 3)), jnp.ones(3), jnp.ones((4, 3)))},
        None,
        "layer/u: 3 columns of length 2",
    ),
    "integer spectrum": (
        {"layer": factors()._replace(s=jnp.ones(2, int))},
        None,
        "layer/s: .*floating",
    ),
    "optax mask inside factors": (
        {"layer": Factors(jnp.ones((4, 2)), optax.MaskedNode(), jnp.ones((3, 2)))},
        None,
        "layer: a mask reaches inside Factors",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("name", TAKES_MASK)
def test_a_wrong_tree_is_refused_by_name_at_init(name, case):
    params, mask, message = BAD[case]
    factory, kwargs, _ = TRANSFORMS[name]
    with pytest.raises(ValueError, match=message):
        factory(**kwargs, mask=mask).init(params)


def test_a_wrong_tree_is_refused_at_update_too():
    retract = transforms.retract(mask={"w": True})
    state = retract.init({"w": jnp.ones((5, 2))})
    wide = {"w": jnp.ones((2, 5))}
    with pytest.raises(ValueError, match=r"w: .*\"rows\""):
        retract.update(wide, state, wide)


def test_an_optax_mask_that_reaches_inside_factors_is_refused():
    params = {"layer": factors()}
    inside = optax.masked(transforms.retract("qr"), {"layer": Factors(True, False, True)})
    with pytest.raises(ValueError, match="layer: a mask reaches inside Factors"):
        inside.init(params)


def test_a_target_of_another_shape_is_refused_by_name():
    params = {"net": {"w": jnp.ones((5, 2))}}
    pull = transforms.add_alignment({"net": {"w": jnp.ones((5, 3))}})
    with pytest.raises(ValueError, match=r"net/w: a target of shape \(5, 3\)"):
        pull.update(params, pull.init(params), params)
    pull = transforms.add_alignment()
    with pytest.raises(ValueError, match="needs a target"):
        pull.update(params, pull.init(params), params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transforms.retract("bogus"), "retraction method must be one of series"),
        (lambda: transforms.retract(every=0), "at least 1"),
        (lambda: transforms.project_to_tangent("flat"), "metric must be one of stiefel"),
        (lambda: transforms.trace(metric="flat"), "metric must be one of"),
        (lambda: transforms.scale_by_riemannian_adam(second_moment="row"), "second moment must"),
        (lambda: transforms.scale_by_stiefel_muon(steps=0), "at least 1"),
        (lambda: transforms.add_hoyer(1.0, "l0"), "kind of Hoyer term must be one of l1_l2"),
        (lambda: transforms.truncate_rank(1.5), r"energy share must lie in \[0, 1\]"),
        (lambda: transforms.truncate_rank(0.9, floor=-1), "rank floor must lie"),
        (lambda: transforms.truncate_rank(0.9, every=0), "at least 1"),
        (lambda: transforms.truncate_rank(0.9, least=0), "least rank must be at least 1"),
        (lambda: transforms.orthogonality_drift(0), "at least 1"),
    ],
)
def test_a_wrong_argument_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Labels(tuple):
    """A tree that can be called, as modules of some libraries are."""

    def __call__(self):
        raise AssertionError("a mask that is a tree was called")


jax.tree_util.register_pytree_node(Labels, lambda x: (tuple(x), None), lambda _, x: Labels(x))


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        (True, False),
        (np.True_, np.False_),
        (1, 0),
        (np.int32(1), np.int32(0)),
        (jnp.array(True), jnp.array(False)),
        (np.array(True), np.array(0)),
        ("columns", None),
    ],
)
def test_a_label_counts_by_its_value(yes, no):
    params = {"a": factors(), "b": factors(), "x": orthonormal(np.random.default_rng(1), (5, 2))}
    no_factors = False if no is None else no
    moved, unconstrained = land({"a": no_factors, "b": yes, "x": yes}, params)
    np.testing.assert_array_equal(moved["a"].u, unconstrained["a"].u)
    assert max(drift(x) for x in (moved["b"].u, moved["b"].v, moved["x"])) < 1e-6
    moved, unconstrained = land({"x": no}, params)
    np.testing.assert_array_equal(moved["x"], unconstrained["x"])

    cut = transforms.truncate_rank(lambda _: 0.5, mask={"a": no_factors})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = cut.update(zeros, cut.init(params), params)
    assert not np.any(updates["a"].s)
    assert np.count_nonzero(updates["b"].s) == 1


@pytest.mark.parametrize("label", [2, -1, 0.0, "column", object(), np.zeros(2, bool)])
def test_other_labels_are_refused(label):
    with pytest.raises(ValueError, match="x: unknown label"):
        transforms.retract(mask={"x": label}).init({"x": jnp.eye(3)})


def test_a_label_that_is_traced_is_refused():
    def init(label):
        return transforms.retract(mask={"x": label}).init({"x": jnp.eye(3)})

    with pytest.raises(ValueError, match="x: a label must be known while tracing"):
        jax.jit(init)(True)


def test_a_mask_that_is_a_tree_is_not_called():
    params = Labels([jnp.eye(3, 2), jnp.ones((3, 2))])
    moved, unconstrained = land(Labels([True, False]), params)
    assert drift(moved[0]) < 1e-6
    np.testing.assert_array_equal(moved[1], unconstrained[1])
    bound = jax.tree_util.Partial(lambda p: Labels([True, False]))
    np.testing.assert_array_equal(land(bound, params)[0][0], moved[0])


ACTS_ON = {
    name: "`Factors`" if name.startswith(("add_hoyer", "truncate", "adapt")) else "matrix"
    for name in TAKES_MASK
} | {"ssa": "finds no"}


@pytest.mark.parametrize("name", TAKES_MASK)
def test_a_transformation_that_finds_nothing_says_what_to_write(name):
    factory, arguments, _ = TRANSFORMS[name]
    dense = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
    with pytest.warns(transforms.NothingToActOn, match=ACTS_ON[name]):
        factory(**arguments).init(dense)
    with pytest.warns(transforms.NothingToActOn, match="that its mask admits"):
        factory(**arguments, mask={"f": False}).init(dense | {"f": factors()})
    factory(**arguments).init({"f": factors()})
    factory(**arguments).init({})


def test_a_chain_on_a_matrix_without_a_label_is_told_of():
    x = jnp.eye(8, 3)
    chain = [transforms.project_to_tangent, lambda **k: optax.adam(0.1), transforms.retract]
    with pytest.warns(transforms.NothingToActOn) as told:
        optax.chain(*(link() for link in chain)).init(x)
    assert [str(w.message).split()[0] for w in told] == ["project_to_tangent", "retract"]
    assert all("mask=True" in str(w.message) for w in told)
    optax.chain(chain[0](mask=True), chain[1](), chain[2](mask=True)).init(x)


def test_whole_chains_move_what_is_no_orthonormal_leaf_as_optax_does():
    """And the constraints alone leave it to the rest of the chain, as the guide says."""
    params = {"q": jnp.eye(4, 2), "w": jnp.ones((3, 2))}
    updates = {"q": jnp.ones((4, 2)), "w": jnp.full((3, 2), 0.5)}
    mask = {"q": "columns", "w": False}
    for ours, plain in (
        (transforms.stiefel_adam(0.1, mask=mask), optax.adam(0.1)),
        (transforms.stiefel_sgd(0.1, 0.9, mask=mask), optax.sgd(0.1, 0.9)),
        (transforms.project_to_tangent(mask=mask), optax.identity()),
        (transforms.retract(mask=mask), optax.identity()),
    ):
        moved, _ = ours.update(updates, ours.init(params), params)
        alone, _ = plain.update(updates["w"], plain.init(params["w"]), params["w"])
        np.testing.assert_allclose(moved["w"], alone, rtol=1e-6)
