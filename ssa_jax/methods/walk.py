"""Sequential feedback of low rank: the error walks down through a few singular directions."""

import math
from typing import Any

import jax

from ssa_jax import factors
from ssa_jax.factors import is_factors
from ssa_jax.methods import feedback as fb
from ssa_jax.methods.base import FeedbackOptions, Method, Network, Through, walking

Array = jax.Array
Tree = Any


def directions(rank: int, share: float) -> int:
    """How many of a layer's singular directions a share of them is: rounded up, at least one."""
    return math.ceil(share * rank - 1e-9)


def low_rank_walk(network: Network, options: FeedbackOptions) -> Method:
    """δ_{i-1} = (∂h_i/∂x_i with W_q for W)ᵀ δ_i, W_q the q largest singular triplets of W.

    W = U diag(s) Vᵀ passes to its input V_q diag(s_q) U_qᵀ δ, the best approximation of Wᵀ δ of
    that rank. U_qᵀ δ is part of Uᵀ δ, which the gradient of V takes in any case, so what the signal
    costs is the product with V_q (d_in, q) alone. (A convolution that is run as one kernel has no
    Uᵀ δ, and takes both thin products.) q is `options.rank` of the layer's stored rank, rounded up;
    which triplets are the largest is read every `options.every` steps and after a compaction, their
    values are always those of the present weights. Everything else on the way, dense layers among
    it, passes the error exactly. All triplets are backpropagation.

    Raises:
      ValueError: a share outside (0, 1]; at init, a model without factors.
    """
    share = options.rank
    if not 0 < share <= 1:
        raise ValueError(f"feedback_rank must lie in (0, 1], got {share}")

    def places(params: Tree) -> Tree:
        return tuple(
            {
                name: factors.leading(f, directions(f.rank, share))
                for name, f in unit.items()
                if is_factors(f)
            }
            for unit in params
        )

    def init(key: Array, params: Tree, mstate: Tree) -> Tree:
        del key, mstate
        if not factors.leaves(params):
            raise ValueError("feedback_rank is a share of factors' rank, and this model has none")
        return places(params)

    def down(state: Tree, params: Tree) -> Through:
        # All of them in their own order are the weights, to the last bit.
        twins = tuple(
            unit | {n: at for n, at in chosen.items() if len(at) < unit[n].rank}
            for unit, chosen in zip(params, state, strict=True)
        )
        return fb.through_twins(network.units, twins)

    def refresh(state: Tree, params: Tree, mstate: Tree) -> Tree:
        del state, mstate
        return places(params)

    return walking(init, down)._replace(
        refresh=refresh,
        refresh_every=options.every,
        note=f"walking through {share:g} of each layer's singular directions",
    )
