"""Which leaves of a parameter tree lie on a Stiefel manifold, and maps over them.

U and V of every `Factors` do. For other leaves a *mask* says so: a tree of labels shaped like
the parameters or a prefix of them, or a function from the parameters to such a tree. The labels:

- ``True`` or ``"columns"``: orthonormal columns, shape (..., n, r) with n >= r;
- ``"rows"``: orthonormal rows, shape (..., r, n); handled as the transposed matrix;
- ``False`` or ``None``: neither, left to the rest of the chain. On a whole `Factors` node,
  ``False`` takes it out too.

NumPy's and JAX's booleans, 0 and 1 are the booleans that they equal. As in `optax.masked`, a mask
that can be called is a function, unless it is a tree with leaves that cannot.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssa_jax import factors
from ssa_jax.factors import Factors, is_factors

Array = jax.Array
Path = tuple[str, ...]
Mask = Any | Callable[[optax.Params], Any]
COLUMNS = "columns"
ROWS = "rows"
SPECTRUM = "spectrum"
OTHER = "other"
_LABELS = {True: COLUMNS, COLUMNS: COLUMNS, ROWS: ROWS, False: OTHER}


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as errors name it, such as ``"encoder/0/kernel"``."""
    return factors.path_name(path) or "the root"


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def label_paths(choose: Callable[[str, Array], Any]) -> Callable[[optax.Params], Any]:
    """A mask from a function (path, array) -> label, such as by a pattern of names.

    Args:
      choose: gets the path, such as ``"encoder/0/kernel"``, and the array of every leaf
        outside `Factors`.

    >>> import jax.numpy as jnp
    >>> mask = label_paths(lambda path, x: path.endswith("kernel"))
    >>> mask({"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})
    {'bias': False, 'kernel': True}
    """

    def mask(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: True if is_factors(x) else choose(path_name(path), x),
            params,
            is_leaf=is_factors,
        )

    return mask


def _check_matrix(name: str, kind: str, x: Any) -> None:
    """Raises unless a leaf can have the orthonormal columns or rows that its label promises."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name}: orthonormal {kind} need a real floating type, got {x.dtype}")
    if len(x.shape) < 2:
        raise ValueError(f"{name}: orthonormal {kind} need a matrix, got shape {x.shape}")
    height, width = x.shape[-2:]
    if kind == COLUMNS and height < width:
        raise ValueError(
            f"{name}: {width} columns of length {height} cannot be orthonormal (shape {x.shape}); "
            'label a wide matrix "rows"'
        )
    if kind == ROWS and width < height:
        raise ValueError(
            f"{name}: {height} rows of length {width} cannot be orthonormal (shape {x.shape}); "
            'label a tall matrix "columns"'
        )


def _factors_kinds(name: str, f: Factors, label: str | None) -> Factors:
    """Kinds of the three arrays of a factors node, from the kind of its label or None."""
    if label == ROWS:
        raise ValueError(f"{name}: the label of factors must be True or False, got {label!r}")
    masked = [_is_masked(x) for x in f]
    if any(masked) and not all(masked):
        raise ValueError(f"{name}: a mask reaches inside Factors; mask the node as a whole")
    if all(masked):
        return f
    if label == OTHER:
        return Factors(OTHER, OTHER, OTHER)  # type: ignore[arg-type]
    for field, x in (("u", f.u), ("v", f.v)):
        _check_matrix(f"{name}/{field}", COLUMNS, x)
    if not jnp.issubdtype(f.s.dtype, jnp.floating):
        raise ValueError(f"{name}/s: a spectrum needs a real floating type, got {f.s.dtype}")
    return Factors(COLUMNS, SPECTRUM, COLUMNS)  # type: ignore[arg-type]


def _names(path: tuple[Any, ...]) -> Path:
    """A path by its names alone: containers of another type than the mask's still match."""
    return tuple(path_name((key,)) for key in path)


def _kind_of(name: str, label: Any) -> str:
    """The kind that a label at a path asks for."""
    if isinstance(label, jax.core.Tracer):
        raise ValueError(f"{name}: a label must be known while tracing, got {label}")
    if isinstance(label, int | np.generic | np.ndarray | Array):
        number = np.asarray(label)
        if number.ndim == 0 and number in (0, 1):
            return _LABELS[bool(number)]
    elif isinstance(label, str) and label in _LABELS:
        return _LABELS[label]
    raise ValueError(f"{name}: unknown label {label!r}, expected {list(_LABELS)}")


def _labels(params: optax.Params, mask: Mask | None) -> dict[Path, str]:
    """Kinds that the labels of a mask ask for, by path; one may be that of a whole subtree."""
    if mask is None:
        return {}
    is_function = callable(mask) and all(map(callable, jax.tree.leaves(mask)))
    tree = mask(params) if is_function else mask
    # `None` is an empty node to JAX, and says nothing here either.
    labels = jax.tree_util.tree_leaves_with_path(tree)
    return {_names(path): _kind_of(path_name(path), label) for path, label in labels}


def _longest(table: dict[Path, Any], path: Path) -> Path | None:
    """The longest part of a path, from its root, that a table has."""
    parts = (path[:length] for length in range(len(path), -1, -1))
    return next((part for part in parts if part in table), None)


def _check_labels(labels: dict[Path, str], nodes: dict[Path, Any]) -> None:
    """Raises for a label that lies inside a `Factors` or belongs to no parameter."""
    subtrees = {path[:length] for path in nodes for length in range(len(path) + 1)}
    for path in labels:
        name = "/".join(path) or "the root"
        if path in subtrees or not nodes:
            continue
        node = _longest(nodes, path)
        if node is None:
            raise ValueError(f"{name}: the mask labels no parameter at this path")
        inside = "Factors" if is_factors(nodes[node]) else "a parameter"
        raise ValueError(f"{name}: the mask reaches inside {inside}; label the whole node")


def need_params(params: optax.Params | None, updates: optax.Updates) -> None:
    """Raises ValueError, naming the first leaf that waits for them, if there are no parameters."""
    if params is None:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
        name = path_name(paths[0]) if paths else "an empty tree"
        raise ValueError(
            f"{name}: the update depends on the parameters; call update(updates, state, params)"
        )


def with_params(
    init: Callable[[optax.Params], Any], update: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """The transformation of an update(updates, state, params) that needs the parameters."""

    def checked(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> Any:
        del extra_args
        need_params(params, updates)
        return update(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, checked)


def kinds_of(params: optax.Params, mask: Mask | None = None) -> Any:
    """A tree of the parameters' structure with the kind of every leaf.

    Runs while tracing: kinds depend on shapes and labels only.

    Returns:
      ``"columns"``, ``"rows"``, ``"spectrum"`` (s of a `Factors`) or ``"other"`` for each leaf.

    Raises:
      ValueError: naming the leaf's path, a mask that reaches inside `Factors` or labels
        nothing, an unknown label, a wide matrix labelled as columns or a tall one as rows, a
        leaf that is no matrix or not of a real floating type.
    """
    labels = _labels(params, mask)

    def is_node(x: Any) -> bool:
        return is_factors(x) or _is_masked(x)

    nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    _check_labels(labels, {_names(path): node for path, node in nodes})

    def kind(path: tuple[Any, ...], x: Any) -> Any:
        labelled = _longest(labels, _names(path))
        label = None if labelled is None else labels[labelled]
        if is_factors(x):
            return _factors_kinds(path_name(path), x, label)
        if _is_masked(x):
            return x
        named = label or OTHER
        if named != OTHER:
            _check_matrix(path_name(path), named, x)
        return named

    return jax.tree_util.tree_map_with_path(kind, params, is_leaf=is_node)


class NothingToActOn(UserWarning):
    """A transformation found no leaf of the kind that it is for, and will change nothing."""


def kinds_at_init(
    name: str, params: optax.Params, mask: Mask | None, wanted: tuple[str, ...] = (COLUMNS, ROWS)
) -> Any:
    """`kinds_of`, with a warning where there are parameters and none of the wanted kinds.

    Args:
      name: of the transformation.
      params: the parameters, or their shapes.
      mask: its mask.
      wanted: kinds that it acts on.
    """
    kinds = kinds_of(params, mask)
    leaves = jax.tree.leaves(kinds)
    if leaves and not any(kind in wanted for kind in leaves):
        if SPECTRUM in wanted:
            what, how = "no `Factors`", "make weights `ssa_jax.factors.Factors`"
        else:
            what = "no orthonormal matrix"
            how = "make weights `Factors`, or label matrices: mask=True, or mask=label_paths(...)"
        less = "" if mask is None else " that its mask admits"
        warnings.warn(
            f"{name} finds {what}{less} and constrains nothing; {how}", NothingToActOn, stacklevel=3
        )
    return kinds
