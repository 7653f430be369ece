"""How tables lie in the memory of a device."""

import jax
from jax.experimental.layout import Format, Layout

from embax._ops.backend import backend_on, chosen_backend
from embax._ops.sparsecore import why_not
from embax.optimizers import OptimizerSpec

SPARSECORE_LAYOUT = Layout((0, 1), tiling=((8,),))
"""Row after row, as SparseCores read and write them; other matrices on a TPU are made of tiles of several rows."""


def table_format(sharding: jax.sharding.Sharding, optimizer: OptimizerSpec) -> Format | jax.sharding.Sharding:
    """The format of a table, and of slots of its shape, on the devices of a sharding.

    On TPUs a step must be compiled to take and to return tables in this format; otherwise XLA converts them, whole, at the
    begin and at the end of each step.

    Args:
        sharding: of the table.
        optimizer: of the table. SparseCores do not hold tables whose optimizer they cannot run.

    Returns:
        Where SparseCores hold the table, their format with this sharding; elsewhere the sharding as it is. `jax.jit` takes
        both as `in_shardings` and `out_shardings`, and `jax.device_put` too.

    Example:
        >>> format = embax.table_format(jax.sharding.NamedSharding(mesh, jax.P("devices", None)), optimizer)
        >>> variables = jax.tree.map(lambda array: jax.device_put(array, format), variables)
    """
    platforms = {device.platform for device in sharding.device_set}
    on_sparsecores = platforms == {"tpu"} and backend_on("tpu", chosen_backend()) == "sparsecore"
    # Of all that decides, only the operations of the rule could depend on the number of columns.
    if on_sparsecores and why_not(optimizer, optimizer.rule_widths[0]) is None:
        return Format(SPARSECORE_LAYOUT, sharding)
    return sharding


def in_table_format(array: jax.Array, optimizer: OptimizerSpec) -> jax.Array:
    """A table or slot in the format of `table_format`, moved there if need be."""
    format = table_format(array.sharding, optimizer)
    return jax.device_put(array, format) if isinstance(format, Format) and array.ndim == 2 else array
