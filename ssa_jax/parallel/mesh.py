"""A run over several devices: where its arrays lie, and what crosses between processes.

Data parallelism as the compiler has it: one program over a mesh of all devices with automatic
axes, the rows of a batch spread over them, everything else whole on each or, where asked for,
factors in parts. The program is written for the whole batch, so that its losses and batch
statistics are those of the whole batch; the compiler puts in what devices tell each other.

Where there are stages (see `pipeline`) they are a second axis, over which nothing here is spread.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssa_jax.factors import is_factors
from ssa_jax.factors.linalg import traced_whole

Array = jax.Array
Tree = Any
T = TypeVar("T")

AXIS = "devices"
STAGE = "stage"
# Of a text that one process tells the others.
_TEXT_BYTES = 4096


class Layout(NamedTuple):
    """Where arrays lie. On one device nothing here does anything.

    Attributes:
      mesh: of all devices of all processes: of those that share a batch, and of stages where
        there are some; None where there is one device.
      shard_factors: whether U and V of every `Factors` in a state are spread over the devices.
    """

    mesh: Mesh | None = None
    shard_factors: bool = False

    @property
    def devices(self) -> int:
        """The number of those that share a batch."""
        return 1 if self.mesh is None else self.mesh.shape[AXIS]

    @property
    def stages(self) -> int:
        """The number of stages, one where a step has none."""
        return 1 if self.mesh is None else self.mesh.shape.get(STAGE, 1)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which programs are traced for the mesh."""
        if self.mesh is None:
            yield
            return
        whole = contextlib.nullcontext() if self.shard_factors else traced_whole()
        with jax.set_mesh(self.mesh), whole:
            yield

    def place(self, tree: Tree, *, whole: bool = False) -> Tree:
        """The arrays of a tree, equal in all processes, where they belong.

        Args:
          tree: of NumPy or JAX arrays, a typed PRNG key among them.
          whole: on every device, also if the layout shards factors.
        """
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        return jax.tree.map(_put, tree, self.shardings(tree, whole=whole))

    def place_rows(self, tree: Tree) -> Tree:
        """Arrays whose rows are spread over the devices, from those that each process has of them.

        Args:
          tree: of NumPy arrays (rows of this process, ...), equally many in each process; all
            together a multiple of the devices.
        """
        mesh = self.mesh
        if mesh is None:
            return jax.device_put(tree)
        spread = NamedSharding(mesh, P(AXIS))
        # It is asked for in so many words, which a transfer guard does not see of this function.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.tree.map(lambda x: jax.make_array_from_process_local_data(spread, x), tree)

    def keep(self, tree: Tree) -> Tree:
        """Inside a jitted program: a state that leaves it as `place` would put it."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def whole(self, tree: Tree) -> Tree:
        """Inside a jitted program: arrays that every device has whole."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, P()))

    def stepped(self, done: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        """Inside a jitted program: what a step returns, the state and its metrics."""
        return self.keep(done[0]), self.whole(done[1])

    def rows(self, tree: Tree) -> Tree:
        """Inside a jitted program: the leading axis of each array spread over the devices.

        Arrays whose leading axis the devices do not divide are whole on each.
        """
        mesh = self.mesh
        if mesh is None:
            return tree

        def spread(x: Array) -> Array:
            spec = P() if x.shape[0] % self.devices else P(AXIS)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        return jax.tree.map(spread, tree)

    def returning(
        self, put: Callable[[T], T], fn: Callable[..., T], donate: tuple[int, ...] = ()
    ) -> Callable[..., T]:
        """The jitted program of fn with `put`, such as `keep`, around what it returns.

        fn itself where there is one device. On a mesh what fn donates is to be said again, for
        a program within another one donates nothing.
        """
        if self.mesh is None:
            return fn
        return jax.jit(lambda *args: put(fn(*args)), donate_argnums=donate)

    def shardings(self, tree: Tree, *, whole: bool = False) -> Tree:
        """Where the arrays of a tree belong, as a tree of `NamedSharding`. Not on one device."""
        assert self.mesh is not None
        everywhere = NamedSharding(self.mesh, P())
        along_first = NamedSharding(self.mesh, P(AXIS))

        def cut(x: Array) -> NamedSharding:
            # The first axis of U (d_out, r) and V (d_in, r): ranks come and go, it stays.
            divides = x.ndim > 1 and x.shape[0] % self.devices == 0
            return along_first if divides else everywhere

        def of(node: Any) -> Tree:
            parts = self.shard_factors and not whole and is_factors(node)
            return jax.tree.map(cut if parts else lambda _: everywhere, node)

        return jax.tree.map(of, tree, is_leaf=is_factors)


ONE_DEVICE = Layout()


def make_layout(shard_factors: bool = False) -> Layout:
    """The layout of all devices of all processes."""
    if jax.device_count() == 1:
        return ONE_DEVICE
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(AxisType.Auto,))
    return Layout(mesh, shard_factors)


def make_staged_layout(stages: int) -> Layout:
    """The layout of all devices of all processes as rows of stages, which are neighbours.

    Also of one device, since stages are programs of a mesh.

    Raises:
      ValueError: stages that do not divide the devices.
    """
    return Layout(staged_mesh(jax.devices(), stages))


def staged_mesh(devices: Sequence[Any], stages: int) -> Mesh:
    """Rows of stages, neighbours where the devices' own network has them.

    Raises:
      ValueError: stages that do not divide the devices.
    """
    if stages < 1 or len(devices) % stages:
        raise ValueError(f"{stages} stages do not divide {len(devices)} devices")
    rows = mesh_utils.create_device_mesh(
        (len(devices) // stages, stages), devices, allow_split_physical_axes=True
    )
    return Mesh(rows, (AXIS, STAGE), axis_types=(AxisType.Auto, AxisType.Auto))


def _put(x: Array | np.ndarray, sharding: NamedSharding) -> Array:
    if isinstance(x, jax.Array):
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = _put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if not x.is_fully_addressable:
            return jax.device_put(x, sharding)
    # Copied, since the result may share the memory that it is given. Every process gives its
    # devices what is theirs; nothing is sent.
    values = np.array(x)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def on_host(x: Array) -> np.ndarray:
    """The entries of an array, of a typed PRNG key its data.

    All processes must call it for an array that lies in parts on several of them.
    """
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if not (x.is_fully_addressable or x.is_fully_replicated):
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def barrier(name: str) -> None:
    """Waits until all processes are here; nothing where there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(text: str) -> str:
    """What the first process gives, in all of them; at most 4096 bytes of UTF-8."""
    if jax.process_count() == 1:
        return text
    sent = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(text.encode()[:_TEXT_BYTES], np.uint8)
    sent[: data.size] = data
    received = multihost_utils.broadcast_one_to_all(sent)
    return received.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="replace")
