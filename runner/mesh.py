# SPDX-License-Identifier: Apache-2.0
"""How a run's arrays lie on its devices.

Under `strategy: jit` the program is written for all of them at once: the compiler cuts
it up, and draws are global, so keys and masks are those of one device. Each array is
laid out by the logical names of its axes, which `mesh.rules` map to axes of the mesh.

Under `strategy: shard_map` it is written for one of them: each device has the whole
state and its part of the rows, draws for these alone, and says what it found to others.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import logical_axis_rules, spmd
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from runner.errors import ConfigError
from runner.spec import MeshSpec, NoDataSpec, RunSpec, Strategy

__all__ = [
    "BATCH",
    "ONE_DEVICE",
    "Layout",
    "make_layout",
]

BATCH = "batch"  # the logical name of the rows of a batch


@dataclass(frozen=True)
class Layout:
    """A mesh, and what its rules make of logical axes; without a mesh, one device.

    Args:
        mesh: The devices under their axes; None where there is no mesh.
        rules: Mesh axes by logical axis.
        strategy: How a program is spread over it.
    """

    mesh: Mesh | None = None
    rules: tuple[tuple[str, str | tuple[str, ...] | None], ...] = ()
    strategy: Strategy = Strategy.NONE

    @property
    def devices(self) -> int:
        """Number of devices."""
        return 1 if self.mesh is None else int(self.mesh.size)

    @property
    def replicated(self) -> NamedSharding | None:
        """A copy on every device; None without a mesh."""
        return self.of(P())

    @property
    def rows(self) -> NamedSharding | None:
        """The rows of a batch, cut along their first axis."""
        return self.of(P(self._axes_of(BATCH)))

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes along which the rows of a batch are cut."""
        axes = self._axes_of(BATCH)
        if self.mesh is None or axes is None:
            return ()
        return (axes,) if isinstance(axes, str) else axes

    @property
    def row_spec(self) -> P:
        """The axes that cut the rows of a batch, as of their first dimension."""
        return P(self.row_axes) if self.row_axes else P()

    @property
    def row_shards(self) -> int:
        """Into how many parts the rows of a batch are cut."""
        if self.mesh is None:
            return 1
        return math.prod(self.mesh.shape[name] for name in self.row_axes)

    @property
    def own_axes(self) -> Mapping[str, int]:
        """Size of each axis along which devices run programs of their own."""
        return dict(self.mesh.shape) if self.mesh and self.is_per_device else {}

    @property
    def own_shards(self) -> int:
        """Into how many parts rows are cut before a program of its own sees them."""
        return self.row_shards if self.is_per_device else 1

    @property
    def is_per_device(self) -> bool:
        """Whether the program is written for one device, and sees its rows alone."""
        return self.strategy is Strategy.SHARD_MAP

    def of(self, spec: P) -> NamedSharding | None:
        """A layout by axes of the mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    @property
    def columns(self) -> NamedSharding | None:
        """Row numbers of many steps, [steps, rows]: each step's, as its rows lie."""
        return self.of(P(None, *self.row_spec))

    @property
    def is_whole_here(self) -> bool:
        """Whether all devices are those of this process."""
        everywhere = self.replicated
        return everywhere is None or everywhere.is_fully_addressable

    @property
    def crowds(self) -> bool:
        """Whether collectives of several calls wait on one pool of threads."""
        return not self.is_whole_here and jax.default_backend() == "cpu"

    def place(self, tree: Any) -> Any:
        """A tree on the device, or a copy of it on each."""
        if self.is_whole_here:
            return jax.device_put(tree, self.replicated)
        return jax.tree.map(lambda leaf: self.put(leaf, self.replicated), tree)

    def put(self, array: Any, sharding: NamedSharding | None) -> Any:
        """An array that each process has whole; each takes the parts of its devices."""
        if self.is_whole_here:
            return jax.device_put(array, sharding)
        assert sharding is not None
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            words = self.put(jax.random.key_data(array), sharding)
            return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
        whole = np.asarray(array)
        return jax.make_array_from_callback(
            whole.shape, sharding, lambda part: whole[part]
        )

    def fetch(self, array: Any) -> np.ndarray:
        """An array whole, on the host; processes that share it must ask together."""
        if not self.is_whole_here:
            array = jax.jit(lambda same: same, out_shardings=self.replicated)(array)
        return np.asarray(array)

    def constrain_rows(self, tree: Any) -> Any:
        """Rows of a batch, in a program, as `rows` lays them out."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.rows)

    def on_shards(self, function: Callable[..., Any], **specs: Any) -> Any:
        """`function`, run by each device on its part, under `shard_map`.

        Elsewhere, the function itself.

        Args:
            function: What one device computes.
            specs: `takes` and `gives`, trees of `PartitionSpec`s; without one, all is
                the same on each device.
        """
        if self.mesh is None or not self.is_per_device:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=specs.get("takes", P()),
            out_specs=specs.get("gives", P()),
            check_vma=False,  # a gradient is to be that of the device's own rows
        )

    def first_rows(self, tree: Any) -> Any:
        """Of arrays with rows, what the first device's program is called with."""
        n = self.own_shards
        return tree if n == 1 else jax.tree.map(lambda a: a[: len(a) // n], tree)

    def as_rows(self, tree: Any) -> Any:
        """Within `on_shards`: what can lie beside that of other shards, as rows do.

        A scalar becomes one of a shard; elsewhere it stays as it is.
        """
        return jax.tree.map(jnp.atleast_1d, tree) if self.is_per_device else tree

    def mean(self, tree: Any) -> Any:
        """Within `on_shards`: the mean over the shards of the rows; of floats alone.

        Whole numbers and keys are those of the first shard.
        """
        if not (self.is_per_device and self.row_axes):
            return tree
        leaves, structure = jax.tree.flatten(tree)
        is_float = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        # One exchange of all in one buffer takes 10 times as long on forced devices.
        floats = [leaf for leaf, is_ in zip(leaves, is_float, strict=True) if is_]
        means = iter(jax.lax.pmean(floats, self.row_axes))
        return jax.tree.unflatten(
            structure,
            [
                next(means) if is_ else self._first(leaf)
                for leaf, is_ in zip(leaves, is_float, strict=True)
            ],
        )

    def _first(self, leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.lax.all_gather(leaf, self.row_axes)[0]
        words = self._first(jax.random.key_data(leaf))  # keys can't be sent as such
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))

    def total(self, tree: Any) -> Any:
        """Within `on_shards`: the sum over the shards of the rows."""
        if not (self.is_per_device and self.row_axes):
            return tree
        return jax.lax.psum(tree, self.row_axes)

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Has `nn.with_logical_constraint` mean what the rules say, under `jit`.

        Elsewhere an array within the program is one device's, and lies there.
        """
        if self.mesh is None or self.strategy is not Strategy.JIT:
            yield
            return
        mesh = jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)
        with logical_axis_rules(self.rules), mesh:
            yield

    def spec_of(self, names: P | None) -> P:
        """The mesh axes of an array with logical names; of one without, none.

        As in Flax, the first of the rules that want an axis of the mesh has it.
        """
        if self.mesh is None or names is None:
            return P()
        return spmd.logical_to_mesh_axes(tuple(names), self.rules) or P()

    def _axes_of(self, name: str) -> str | tuple[str, ...] | None:
        return dict(self.rules).get(name)


ONE_DEVICE = Layout()


def make_layout(spec: RunSpec) -> Layout:
    """The layout that `mesh` asks for, on the devices that there are.

    Raises:
        ConfigError: the axes or the batch don't fit the devices.
    """
    mesh = spec.mesh
    if mesh.strategy is Strategy.NONE:
        return ONE_DEVICE
    devices, size = jax.devices(), math.prod(mesh.axes.values())
    if size != len(devices):
        raise ConfigError(
            "mesh.axes",
            f"the product must equal the device count, {len(devices)}",
            got=size,
            fix=_mend(mesh, len(devices)),
        )
    made = jax.make_mesh(
        tuple(mesh.axes.values()),
        tuple(mesh.axes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(mesh.axes),
    )
    layout = Layout(made, tuple(mesh.rules.items()), mesh.strategy)
    if mesh.strategy is Strategy.EXACT:
        _check_exact(spec, layout)
        return layout
    if isinstance(spec.data, NoDataSpec):  # each array of a probe has rows of its own
        return layout
    rows = spec.data.batch_size // spec.train.accumulation_steps
    if rows % layout.row_shards:
        raise ConfigError(
            "data.batch_size",
            f"must divide into {layout.row_shards} parts over the mesh"
            + (" for each microbatch" if spec.train.accumulation_steps > 1 else ""),
            got=spec.data.batch_size,
            fix=f"Set data.batch_size={_next_multiple(spec, layout)}",
        )
    return layout


def _check_exact(spec: RunSpec, layout: Layout) -> None:
    number, devices = spec.train.accumulation_steps, layout.row_shards
    if number % devices:
        raise ConfigError(
            "train.accumulation_steps",
            f"must be a multiple of the {devices} devices under mesh.strategy=exact, "
            "which spreads microbatches over them",
            got=number,
            fix=f"Set train.accumulation_steps={-(-number // devices) * devices}",
        )


def _next_multiple(spec: RunSpec, layout: Layout) -> int:
    part = layout.row_shards * spec.train.accumulation_steps
    return -(-spec.data.batch_size // part) * part


def _mend(mesh: MeshSpec, devices: int) -> str:
    first, *rest = mesh.axes
    others, left = math.prod(mesh.axes[name] for name in rest), devices
    each, rest_ = divmod(others * mesh.axes[first], jax.process_count())
    ways = [] if left % others else [f"mesh.axes.{first}={left // others}"]
    ways += [] if rest_ else [f"mesh.host_devices={each}"]
    return f"Set {' or '.join(ways)}" if ways else "Set mesh.axes to what there is"
