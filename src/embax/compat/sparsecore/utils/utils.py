"""SparseCores of devices, and how tables lie on them."""

from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from embax._format import SPARSECORE_LAYOUT
from embax._stacking.shard_table import shard_table, unshard_table
from embax._topology import TPU_SPARSECORES, VIRTUAL_SPARSECORES_PER_DEVICE

NUM_SC_PER_DEVICE_MAP = TPU_SPARSECORES

_VIRTUAL = ("cpu", "gpu", "cuda", "rocm")


@runtime_checkable
class DeviceLike(Protocol):
    """What tells its kind."""

    @property
    def device_kind(self) -> str:
        """The kind of the device, such as "TPU v5"."""
        ...


def num_sparsecores_per_device(device: DeviceLike | None = None) -> int:
    """The number of SparseCores of a device: a TPU's own, and 4 virtual ones of a CPU or GPU.

    Args:
        device: None means the first device.

    Raises:
        ValueError: the kind of the device is not known, or it has none.
    """
    one: Any = jax.devices()[0] if device is None else device
    kind = getattr(one, "device_kind", None)
    if kind is None:
        raise ValueError(f"The device is {one!r}, which has no device_kind; pass one of jax.devices().")
    if kind in NUM_SC_PER_DEVICE_MAP:
        return NUM_SC_PER_DEVICE_MAP[kind]
    if kind == "cpu" or getattr(one, "platform", None) in _VIRTUAL:
        return VIRTUAL_SPARSECORES_PER_DEVICE
    raise ValueError(
        f"The number of SparseCores of a device of kind {kind!r} is not known; known are {sorted(NUM_SC_PER_DEVICE_MAP)}."
    )


def embedding_table_format_with_sharding(sharding: Sharding) -> Format | Sharding:
    """The format of tables with a sharding: on TPUs that of SparseCores, elsewhere the sharding as it is."""
    platforms = {device.platform for device in sharding.device_set}
    return Format(SPARSECORE_LAYOUT, sharding) if platforms == {"tpu"} else sharding


def embedding_table_format(mesh: Mesh, partition_spec: PartitionSpec) -> Format | Sharding:
    """The format of tables that are sharded so: see `embedding_table_format_with_sharding`."""
    return embedding_table_format_with_sharding(NamedSharding(mesh, partition_spec))


def _check_strategy(sharding_strategy: str) -> None:
    if sharding_strategy != "MOD":
        raise ValueError(f"The sharding strategy is {sharding_strategy!r}; only MOD is supported.")


def shard_emb_table(table: Any, *, num_devices: int, num_sc_per_device: int, sharding_strategy: str = "MOD") -> Any:
    """See `embax.shard_table`; the strategy is "MOD"."""
    _check_strategy(sharding_strategy)
    return shard_table(table, num_devices=num_devices, num_sparsecores_per_device=num_sc_per_device)


def unshard_emb_table(sharded_table: Any, num_sc_per_device: int, sharding_strategy: str = "MOD") -> Any:
    """See `embax.unshard_table`; the strategy is "MOD"."""
    _check_strategy(sharding_strategy)
    return unshard_table(sharded_table, num_sparsecores_per_device=num_sc_per_device)
