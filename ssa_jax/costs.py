"""Analytic costs: multiply-accumulates from the traced program, parameters from the tree."""

import math
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


def macs(fn: Callable[..., Any], *args: Any) -> int:
    """Multiply-accumulates of the matrix products and convolutions in fn(*args).

    Counted on the jaxpr, every tap of a convolution included (XLA's own count leaves out the
    taps on padding). Elementwise work counts for nothing, as in the literature. Nothing is
    computed; `args` may be `jax.ShapeDtypeStruct`. The body of a loop counts once, and of a
    conditional every branch.
    """
    return _jaxpr_macs(jax.make_jaxpr(fn)(*args).jaxpr)


def _jaxpr_macs(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out_features = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
            taps = math.prod(kernel) // out_features
            total += math.prod(eqn.outvars[0].aval.shape) * taps
        total += sum(_jaxpr_macs(sub) for sub in _subjaxprs(eqn.params))
    return total


def _subjaxprs(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                found.append(inner)
    return found


def parameters(params: Tree) -> int:
    """Number of stored parameters."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
