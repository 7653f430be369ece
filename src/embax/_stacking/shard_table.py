"""One table into the shards of devices, and back."""

from typing import Any

import jax
import numpy as np

from embax._checks import next_multiple, positive_int
from embax._stacking.resharding import apply


def refuse_masked(owner: str, array: Any) -> None:
    """Raises a ValueError if `array` is a masked array: only its values would be moved."""
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(
            f"{owner} is a masked array, whose mask would be lost. Fill the masked places: array.filled(0)."
        )


def _describe(array: Any) -> str:
    if isinstance(array, (np.ndarray, jax.Array)):
        return f"an array of shape {array.shape}"
    return f"a {type(array).__name__}"


def _to_devices(table: Any, num_devices: int, num_sparsecores_per_device: int) -> Any:
    rows, dim = table.shape
    by_row = table.reshape(
        rows // (num_devices * num_sparsecores_per_device), num_devices, num_sparsecores_per_device, dim
    )
    return by_row.transpose(1, 2, 0, 3).reshape(num_devices, rows // num_devices, dim)


def _from_devices(sharded: Any, num_sparsecores_per_device: int) -> Any:
    num_devices, rows, dim = sharded.shape
    by_sparsecore = sharded.reshape(num_devices, num_sparsecores_per_device, rows // num_sparsecores_per_device, dim)
    return by_sparsecore.transpose(2, 0, 1, 3).reshape(num_devices * rows, dim)


def shard_table(table: Any, *, num_devices: int, num_sparsecores_per_device: int) -> Any:
    """The parts of one table that the SparseCores of each device own, as the reference's `shard_emb_table`.

    With `D` devices of `S` SparseCores, row `v` of SparseCore `s` on device `c` is row `(v * D + c) * S + s` of the table;
    each device has the rows of its SparseCores one after another. `embax.stack_and_shard_tables` makes the arrays that
    embax trains, with padding and several tables.

    Args:
        table: [vocabulary, dim] array, NumPy or JAX. The vocabulary divides by `D * S`.
        num_devices: devices, `D`.
        num_sparsecores_per_device: SparseCores of each, `S`.

    Returns:
        A new array [D, vocabulary / D, dim] of the same kind and dtype.

    Raises:
        ValueError: the vocabulary does not divide, or the table does not have two dimensions or is a masked array.

    Example:
        >>> shards = embax.shard_table(table, num_devices=2, num_sparsecores_per_device=4)  # doctest: +SKIP
        >>> same = embax.unshard_table(shards, num_sparsecores_per_device=4)  # doctest: +SKIP
    """
    devices = positive_int("shard_table", "num_devices", num_devices)
    sparsecores = positive_int("shard_table", "num_sparsecores_per_device", num_sparsecores_per_device)
    if not isinstance(table, (np.ndarray, jax.Array)) or table.ndim != 2:
        raise ValueError(
            f"shard_table: the table is {_describe(table)}; it must be a NumPy or JAX array [vocabulary, dim]."
        )
    refuse_masked("shard_table: the table", table)
    rows, dim = table.shape
    if rows % (devices * sparsecores):
        raise ValueError(
            f"shard_table: a table of {rows} rows does not divide by {devices} devices of {sparsecores} SparseCores; pad it to "
            f"{next_multiple(rows, devices * sparsecores)} rows."
        )
    return apply(_to_devices, (devices, sparsecores), table, (devices, rows // devices, dim), (0, None, 1))


def unshard_table(sharded: Any, *, num_sparsecores_per_device: int) -> Any:
    """One table from the parts that the SparseCores of each device own: the inverse of `embax.shard_table`.

    Args:
        sharded: [devices, rows of a device, dim] array, NumPy or JAX.
        num_sparsecores_per_device: SparseCores of each device.

    Returns:
        A new array [devices * rows of a device, dim] of the same kind and dtype.

    Raises:
        ValueError: the rows of a device do not divide by its SparseCores, there are no devices or not three dimensions, or the
            array is masked.
    """
    sparsecores = positive_int("unshard_table", "num_sparsecores_per_device", num_sparsecores_per_device)
    if not isinstance(sharded, (np.ndarray, jax.Array)) or sharded.ndim != 3:
        raise ValueError(
            f"unshard_table: the shards are {_describe(sharded)}; they must be a NumPy or JAX array [devices, rows, dim], as "
            "embax.shard_table returns it."
        )
    refuse_masked("unshard_table: the array of shards", sharded)
    devices, rows, dim = sharded.shape
    if not devices:
        raise ValueError(
            f"unshard_table: the shards are {_describe(sharded)}, those of no device; pass those of all devices, "
            "[devices, rows, dim]."
        )
    if rows % sparsecores:
        raise ValueError(
            f"unshard_table: {rows} rows of a device do not divide by {sparsecores} SparseCores; pass the number that the table "
            "was sharded for."
        )
    return apply(_from_devices, (sparsecores,), sharded, (devices * rows, dim), (0, 2))
