"""Which devices the tables and the batch are sharded over."""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._checks import positive_int
from embax._ops.geometry import inside_shard_map
from embax._preprocess.buffers import PackedLayout, PreprocessedInput
from embax._processes import Action, Alike, Processes

_PACKED_ARRAYS = ("row_pointers", "embedding_ids", "sample_ids", "gains", "num_minibatches")


def _explicit(mesh: jax.sharding.Mesh) -> bool:
    return jax.sharding.AxisType.Explicit in mesh.axis_types


def replicated(mesh: jax.sharding.Mesh, ndim: int) -> jax.sharding.NamedSharding:
    """The same array on every device, in the words in which a jitted step returns it."""
    return jax.sharding.NamedSharding(mesh, jax.P(*(None,) * ndim) if _explicit(mesh) else jax.P())


@dataclasses.dataclass(frozen=True)
class TableMesh:
    """A mesh, and the axes of it that rows of tables and samples are sharded over; over the others they are replicated."""

    mesh: jax.sharding.Mesh
    axes: tuple[str, ...]

    @classmethod
    def checked(cls, mesh: Any, sharding_axis: Any) -> "TableMesh | None":
        """From the arguments of a public function; None without a mesh.

        Raises:
            ValueError: there is an axis without a mesh, the mesh has no such axis, or no axis is given where it has several.
        """
        if mesh is None:
            if sharding_axis is not None:
                raise ValueError(
                    f"sharding_axis is {sharding_axis!r}, and there is no mesh; pass the mesh too, or neither for one device."
                )
            return None
        if not isinstance(mesh, jax.sharding.Mesh):
            raise ValueError(
                f"mesh is a {type(mesh).__name__}; it must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('devices',))."
            )
        names = tuple(mesh.axis_names)
        if sharding_axis is None:
            if len(names) > 1:
                raise ValueError(
                    f"The mesh has the axes {names}, and sharding_axis does not say which of them tables and batch are "
                    f"sharded over; pass sharding_axis={names[0]!r}, or a tuple of names."
                )
            sharding_axis = names
        axes = (sharding_axis,) if isinstance(sharding_axis, str) else sharding_axis
        if not isinstance(axes, Sequence) or not axes or len(set(axes)) < len(axes) or not set(axes) <= set(names):
            raise ValueError(
                f"sharding_axis is {sharding_axis!r}, but the mesh has the axes {names}; it must be one of them, or a tuple of "
                "different ones."
            )
        return cls(mesh, tuple(axes))

    @functools.cached_property
    def num_devices(self) -> int:
        """Parts that tables and batch are divided into."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.axes]))

    @functools.cached_property
    def num_local_devices(self) -> int:
        """Those of them that devices of this process hold."""
        here = jax.process_index()
        by_part = np.moveaxis(
            self.mesh.devices, [self.mesh.axis_names.index(axis) for axis in self.axes], range(len(self.axes))
        ).reshape(self.num_devices, -1)
        return sum(any(device.process_index == here for device in part) for part in by_part)

    @property
    def leading(self) -> jax.P:
        """The spec of arrays that are sharded along their first dimension."""
        return jax.P(self.axes[0] if len(self.axes) == 1 else self.axes)

    @property
    def axis_name(self) -> str | tuple[str, ...]:
        """What collective operations over the parts take as the name of the axis."""
        return self.axes[0] if len(self.axes) == 1 else self.axes

    def sharding(self, ndim: int) -> jax.sharding.NamedSharding:
        """The sharding of an array of a table, [rows, dim] or [rows], in the words in which a jitted step returns it.

        Otherwise the second step would compile again: to jit, `P(axis)` and `P(axis, None)` differ.
        """
        rest = (None,) * (ndim - 1) if _explicit(self.mesh) else ()
        return jax.sharding.NamedSharding(self.mesh, jax.P(*self.leading, *rest))

    def replicate(self, array: jax.Array) -> jax.Array:
        """The array on every device of the mesh, as steps return it, so that the second step does not compile again."""
        return jax.jit(lambda array: array, out_shardings=replicated(self.mesh, array.ndim))(array)

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`jax.shard_map` over the mesh, of arrays that may be sharded otherwise before."""
        mapped = jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

        def resharding(*args):
            return mapped(
                *(
                    jax.tree.map(functools.partial(self._as_explicit, spec), arg)
                    for arg, spec in zip(args, in_specs, strict=True)
                )
            )

        return resharding

    def _as_explicit(self, spec: jax.P, array: Any) -> Any:
        """The array in the sharding that shard_map asks for where the axes of a mesh are explicit, and it reshards nothing."""
        if not _explicit(self.mesh) or not isinstance(array, jax.Array | np.ndarray):
            return array
        array = jnp.asarray(array)
        full = jax.P(*spec, *(None,) * (array.ndim - len(spec)))
        if jax.typeof(array).sharding.spec == full:
            return array
        sharding = jax.sharding.NamedSharding(self.mesh, full)
        return jax.sharding.reshard(array, sharding) if isinstance(array, Tracer) else jax.device_put(array, sharding)

    @functools.cached_property
    def processes(self) -> Processes:
        """The processes of all devices of the mesh."""
        return Processes.of(self.mesh.devices.flat)

    def place(self, packed: PreprocessedInput | Exception) -> PreprocessedInput:
        """A batch that this process packed for its devices, as global arrays on the devices of the mesh; see `place_batch`."""
        error = packed if isinstance(packed, Exception) else self._misfit(packed)
        alike = None if isinstance(packed, Exception) or error or self.processes.alone else _batch(packed)
        self.processes.agree(Action.PLACE, error, alike)
        batch: Any = packed  # What is no batch has been raised.
        sharding = jax.sharding.NamedSharding(self.mesh, self.leading)
        arrays = {name: array for name in _PACKED_ARRAYS if (array := getattr(batch, name)) is not None}
        if self.processes.alone:
            return batch.replace(**jax.device_put(arrays, sharding))
        return batch.replace(
            **{
                name: jax.make_array_from_process_local_data(
                    sharding, array, (array.shape[0] // self.num_local_devices * self.num_devices, *array.shape[1:])
                )
                for name, array in arrays.items()
            }
        )

    def _misfit(self, packed: Any) -> ValueError | None:
        """Why this is no batch for the devices of this process, if it is none."""
        if not isinstance(packed, PreprocessedInput):
            return ValueError(f"A {type(packed).__name__} is to be put on the devices; it must be a packed batch.")
        wanted, layout = (self.num_devices, self.num_local_devices), packed.layout
        if (layout.num_devices, layout.num_local_devices) != wanted:
            return ValueError(
                f"The batch was packed for {layout.num_local_devices} of {layout.num_devices} devices; the mesh has "
                f"{wanted[1]} of {wanted[0]} in this process. Place the specs for {wanted[0]} devices, and pack with "
                f"num_local_devices={wanted[1]}."
            )
        return None


def _batch(packed: PreprocessedInput) -> Alike:
    return Alike(
        "batches",
        _layout_digest(packed.layout),
        functools.partial(_describe_layout, packed.layout),
        "Give all processes the same specs and options, and batches of the same size: fill smaller ones up (dense ids of -1, or "
        "empty ragged samples, contribute nothing).",
    )


@functools.lru_cache(maxsize=32)
def _layout_digest(layout: PackedLayout) -> bytes:
    return hashlib.blake2b(repr(_describe_layout(layout)).encode(), digest_size=16).digest()


def _describe_layout(layout: PackedLayout) -> dict[str, Any]:
    """What a layout says, by names; how many of the devices are local may differ between processes."""
    described: dict[str, Any] = {
        "devices of the specs": layout.num_devices,
        "SparseCores a device": layout.num_sparsecores_per_device,
        "minibatching": layout.minibatched,
        "stacks": [stack.name for stack in layout.stacks],
    }
    for stack in layout.stacks:
        described[f"features of stack {stack.name!r}"] = [feature.name for feature in stack.features]
        for feature, batch in zip(stack.features, stack.batch_sizes, strict=True):
            described[f"samples a device of feature {feature.name!r}"] = batch
        for field in ("num_rows", "combiner", "max_ids_per_partition", "max_unique_ids_per_partition", "capacity"):
            described[f"{field} of stack {stack.name!r}"] = getattr(stack, field)
        described[f"placement of stack {stack.name!r}"] = stack.features
    return described


def place_batch(
    packed: PreprocessedInput | Exception,
    mesh: jax.sharding.Mesh,
    *,
    sharding_axis: str | tuple[str, ...] | None = None,
) -> PreprocessedInput:
    """Puts a packed batch on the devices of a mesh, each device's part on it.

    With devices of several processes all of them call this, in their main thread, each with the part of the batch that it packed
    for its own devices. They first compare what they packed. If a process could not pack its part, it passes the exception,
    which then is raised on it, and a RuntimeError with the same text on the others; so none waits for a step that never comes.

    Args:
        packed: what `embax.preprocess` returned, or the exception that it raised.
        mesh: the devices that the specs were placed for.
        sharding_axis: the axis of the mesh, or a tuple of axes, that tables and batch are sharded over; over the others the
            batch is replicated, and processes that have the same part must pass the same. None where the mesh has one axis.

    Returns:
        The batch with global arrays, and the statistics of this process.

    Raises:
        ValueError: the batches of the processes differ in their sizes or limits, or this process has no device of the mesh.
        RuntimeError: another process could not pack its part.

    Example:
        >>> try:
        ...     packed = embax.preprocess(ids, specs=specs)
        ... except ValueError as error:
        ...     packed = error
        >>> packed = embax.place_batch(packed, mesh)
    """
    over = TableMesh.checked(mesh, sharding_axis)
    if over is None or over.num_local_devices == 0:
        raise ValueError(
            "place_batch needs a mesh that has devices of this process, such as jax.make_mesh((4,), ('devices',))."
        )
    return over.place(packed)


def on_devices(
    mesh: TableMesh | None, function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`function` as it is for one device and inside shard_map, else mapped over the devices of the mesh."""
    return function if mesh is None or inside_shard_map() else mesh.shard_map(function, in_specs, out_specs)


class StepsInFlight:
    """Bounds the steps that are dispatched and not finished: before another one it waits for that of `limit` steps ago.

    JAX dispatches steps without waiting for them. On jax 0.10, a long queue of steps that exchange data between several CPU
    devices of a process ends the process.

    Args:
        limit: steps that may be unfinished.

    Raises:
        ValueError: the limit is not positive.

    Example:
        >>> in_flight = embax.StepsInFlight()
        >>> for batch in batches:
        ...     state, loss = train_step(state, batch)
        ...     in_flight(loss)
    """

    def __init__(self, limit: int = 16):
        self.limit = positive_int("StepsInFlight", "limit", limit)
        self._results: collections.deque[jax.Array] = collections.deque()

    def __call__(self, result: jax.Array) -> None:
        """Notes a step, and waits for that of `limit` steps ago.

        Args:
            result: a small array that the step returned. It must not be donated to another step.
        """
        self._results.append(result)
        while len(self._results) > self.limit:
            self._results.popleft().block_until_ready()
