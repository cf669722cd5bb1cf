"""Models of Flax NNX, of Linen and plain functions, taken apart at their cuts.

The one place that knows how Flax splits and merges.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen, nnx

from ssa_jax.networks import linen_factors, nnx_factors
from ssa_jax.networks.traced import Traced
from ssa_jax.networks.units import Unit

Array = jax.Array
Tree = Any

# Arguments by which Linen modules are told that they are trained, and what they are then.
_MODES = {"train": True, "training": True, "is_training": True, "deterministic": False,
          "use_running_average": False}  # fmt: skip


class Split(NamedTuple):
    """A model taken apart at its cuts.

    Attributes:
      units: n of them.
      params: one dict a unit, from paths in the model to `Factors` and arrays.
      mstate: the same for the rest of its state.
      merge: (params, mstate) -> the model with those values, in evaluation mode.
    """

    units: tuple[Unit, ...]
    params: tuple[dict[str, Any], ...]
    mstate: tuple[dict[str, Any], ...]
    merge: Callable[[Sequence[Any], Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A plain function and its parameters as a model.

    Attributes:
      apply: (params, x) -> outputs; calls `cut`.
      params: any pytree of arrays and `Factors`.
    """

    apply: Callable[[Tree, Tree], Tree]
    params: Tree

    def __call__(self, x: Tree) -> Tree:
        """Outputs for x."""
        return self.apply(self.params, x)


@dataclasses.dataclass(frozen=True)
class LinenModel:
    """A Linen module with its variables.

    Attributes:
      module: calls `cut`. It is told whether it is trained by an argument of its `__call__` named
        ``train``, ``training``, ``is_training``, ``deterministic`` or ``use_running_average``.
      variables: as `module.init` makes them; kernels of Dense and Conv may be `Factors`.
      key: of its dropout.
      example: shape of an input.
    """

    module: linen.Module
    variables: Tree
    key: Array
    example: jax.ShapeDtypeStruct

    def __call__(self, x: Tree) -> Tree:
        """Outputs for x, in evaluation mode."""
        return self.apply(self.variables, x, train=False, key=self.key)[0]

    def layers(self) -> dict[str, linen.Module]:
        """The layers with a kernel that it calls, by path."""
        mode = _mode(self.module, False)
        return linen_factors.layers_of(self.module, self.variables, self.example, **mode)

    def apply(self, variables: Tree, x: Tree, *, train: bool, key: Array) -> tuple[Tree, Tree]:
        """Outputs, and the collections that are not parameters after the pass."""
        rest = [name for name in variables if name != "params"]
        with linen_factors.understood():
            return self.module.apply(
                variables, x, **_mode(self.module, train), mutable=rest, rngs={"dropout": key}
            )


def _mode(module: linen.Module, train: bool) -> dict[str, Any]:
    known = inspect.signature(type(module).__call__).parameters
    return {name: when is train for name, when in _MODES.items() if name in known}


def start(model: Any, example: jax.ShapeDtypeStruct, seed: int) -> Any:
    """The model with parameters: one of Linen is initialised, the others have them.

    Args:
      model: an NNX or a Linen module, a `LinenModel` or a `Functional`.
      example: of an input.
      seed: of the initialisation.

    Raises:
      TypeError: another kind of object.
    """
    if isinstance(model, linen.Module):
        key_init, key = jax.random.split(jax.random.key(seed))
        x = jnp.zeros(example.shape, example.dtype)
        keys = dict(zip(("params", "dropout"), jax.random.split(key_init), strict=True))
        return LinenModel(model, model.init(keys, x, **_mode(model, False)), key, example)
    if isinstance(model, nnx.Module | LinenModel | Functional):
        return model
    raise TypeError(
        f"a model must be an nnx.Module, a linen.Module or a Functional, got {type(model).__name__}"
    )


def without_factors(model: Any) -> Any:
    """A dense model of the same layers: of NNX with their matrices, of Linen with new ones.

    A plain function stays as it is: which of its parameters are kernels it does not tell.
    """
    if isinstance(model, LinenModel):
        return start(model.module, model.example, 0)
    return nnx_factors.merged(model) if isinstance(model, nnx.Module) else model


def split(model: Any, x: Tree) -> Split:
    """Takes a model apart at its cuts. The model itself stays as it is.

    Args:
      model: an NNX module, a `LinenModel` or a `Functional` that calls `cut`.
      x: an input, a pytree of arrays or of their shapes, whose first axis is the batch.

    Raises:
      CutError: the model has no cut, or cannot be taken apart at them.
    """
    for kind, take_apart in _KINDS.items():
        if isinstance(model, kind):
            return take_apart(model, x)
    raise TypeError(f"cannot split a {type(model).__name__}; see `start`")


def _split_nnx(model: nnx.Module, x: Tree) -> Split:
    model = nnx.clone(model)
    model.train()
    in_training = nnx.graphdef(model)
    model.eval()
    in_evaluation, params, mstate = _state_of(model)

    def apply(params: Tree, mstate: Tree, x: Tree, *, train: bool) -> tuple[Tree, Tree]:
        # Without the copy, statistics would be written to variables of an outer trace.
        graph = in_training if train else in_evaluation
        merged = nnx.merge(graph, params, mstate, copy=True)
        y = merged(x)
        return y, _state_of(merged)[2]

    def merge(params: Tree, mstate: Tree) -> nnx.Module:
        return nnx.merge(in_evaluation, params, mstate, copy=True)

    return _split(apply, params, mstate, x, merge)


def _state_of(module: nnx.Module) -> tuple[Any, Tree, Tree]:
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def _split_linen(model: LinenModel, x: Tree) -> Split:
    collections = dict(model.variables)
    params = collections.pop("params", {})

    def apply(params: Tree, mstate: Tree, x: Tree, *, train: bool) -> tuple[Tree, Tree]:
        variables = {"params": params, **mstate["collections"]}
        y, new = model.apply(variables, x, train=train, key=mstate["dropout"])
        following = jax.random.split(mstate["dropout"], 1)[0] if train else mstate["dropout"]
        return y, {"collections": {**mstate["collections"], **new}, "dropout": following}

    def merge(params: Tree, mstate: Tree) -> LinenModel:
        variables = {"params": params, **mstate["collections"]}
        return dataclasses.replace(model, variables=variables, key=mstate["dropout"])

    return _split(apply, params, {"collections": collections, "dropout": model.key}, x, merge)


def _split_function(model: Functional, x: Tree) -> Split:
    def apply(params: Tree, mstate: Tree, x: Tree, *, train: bool) -> tuple[Tree, Tree]:
        del train
        return model.apply(params, x), mstate

    return _split(
        apply, model.params, {}, x, lambda params, mstate: Functional(model.apply, params)
    )


def _split(
    apply: Callable[..., tuple[Tree, Tree]], params: Tree, mstate: Tree, x: Tree,
    merge: Callable[[Tree, Tree], Any],
) -> Split:  # fmt: skip
    network = Traced(apply, params, mstate, x)

    def merge_units(params: Sequence[Any], mstate: Sequence[Any]) -> Any:
        return merge(*network.whole(params, mstate))

    return Split(network.units, network.params, network.mstate, merge_units)


_KINDS: dict[type, Callable[[Any, Tree], Split]] = {
    nnx.Module: _split_nnx,
    LinenModel: _split_linen,
    Functional: _split_function,
}
