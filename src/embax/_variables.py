"""The tables and slots of all stacks."""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax

from embax._first_values import initialized, maker_of, threefry
from embax._mesh import TableMesh
from embax._stacking.plan import Plan, make_plan, table_specs


class EmbeddingVariables(NamedTuple):
    """The variables of one stack.

    Args:
        table: float32[rows, dim].
        slot: slot variables of the optimizer, a NamedTuple of arrays like `table`, or float32[rows] of one value a row; () of
            tables that are looked up only.
    """

    table: Any
    slot: Any


def table_mesh(plan: Plan, mesh: Any, sharding_axis: Any) -> TableMesh | None:
    """The devices that tables are made on, None for one.

    Raises:
        ValueError: the specs were placed for other devices, or the mesh or the axis is none.
    """
    over = TableMesh.checked(mesh, sharding_axis)
    given = 1 if over is None else over.num_devices
    if plan.num_devices != given:
        raise ValueError(
            f"The specs were placed for {plan.num_devices} devices, and tables are to be made on {given}. Pass a mesh whose "
            f"sharding axis has {plan.num_devices} devices, or place the specs with global_device_count={given}."
        )
    return over


def init_embedding_variables(
    rng: jax.Array,
    specs: Any,
    *,
    mesh: jax.sharding.Mesh | None = None,
    sharding_axis: str | tuple[str, ...] | None = None,
    without_slots: Collection[str] = (),
) -> dict[str, EmbeddingVariables]:
    """The first values of all tables and slots.

    The values of a table depend on the key and the table's name and sizes alone, not on the number of devices or
    SparseCores or on what it is stacked with. Initializers of `jax.nn.initializers` that draw each element independently
    (uniform, normal, truncated_normal) and constants need no more than some 10 MB beside the result, on each device; on a TPU
    also a copy of one array in the default format, whose rows have a multiple of 128 columns. Other initializers make a table as
    a whole first; on several devices they are traced by JAX, XLA divides their work where it can, and may round otherwise.

    Args:
        rng: a PRNG key; on several processes the same on all.
        specs: pytree of placed `FeatureSpec`.
        mesh: the devices that the specs were placed for, on which each makes its own rows; None for one device. On several
            processes all must call this.
        sharding_axis: the axis of the mesh, or a tuple of axes, that rows are sharded over; over others they are replicated.
            None where the mesh has one axis.
        without_slots: names of stacks that get no slots; they can be looked up and not updated.

    Returns:
        For each stack its `EmbeddingVariables`: float32[stack_vocab_size, stack_embedding_dim] arrays, and
        float32[stack_vocab_size] of slots of one value a row, whose initializer is called for a matrix of one column. They
        lie on the device of `rng`, or on those of the mesh with their rows sharded, on TPUs in the format of
        `embax.table_format`.

    Raises:
        ValueError: the specs have not been placed, or for other devices than those of the mesh, or an initializer returned
            another shape or dtype.

    Example:
        >>> mesh = jax.make_mesh((4,), ("devices",))
        >>> embax.prepare_feature_specs_for_training(features, global_device_count=4)
        >>> variables = embax.init_embedding_variables(jax.random.key(0), features, mesh=mesh)
    """
    plan = make_plan(specs)
    over = table_mesh(plan, mesh, sharding_axis)
    key = threefry(rng)
    initializers = {name: table.initializer for name, table in table_specs(specs).items()}
    variables = {}
    for stack in plan.stacks:
        devices = maker_of(plan, stack, over, key)
        slots = stack.optimizer.slot_variables_initializers()
        wanted = list(
            zip([initializers, *(dict.fromkeys(initializers, s) for s in slots)], stack.state_shapes, strict=True)
        )
        if stack.name in without_slots:
            wanted = wanted[:1]
        values = [
            initialized(jax.random.fold_in(key, number), devices, stack, by_table, shape)
            for number, (by_table, shape) in enumerate(wanted)
        ]
        slot = () if stack.name in without_slots else stack.optimizer.make_slots(values[1:])
        variables[stack.name] = EmbeddingVariables(values[0], slot)
    return variables


def without_slots(variables: Any) -> Any:
    """The variables without the slots of their optimizers, for lookups alone: to evaluate and to serve.

    Args:
        variables: `EmbeddingVariables` of each stack, or any tree that holds some, such as the parameters of a Flax model.

    Returns:
        The same tree with `slot=()`. The tables are the same arrays.

    Example:
        >>> tables = embax.without_slots(variables)
        >>> activations = embax.lookup(packed, tables, specs=specs)
    """

    def is_stack(node):
        return isinstance(node, EmbeddingVariables)

    return jax.tree.map(lambda node: node._replace(slot=()) if is_stack(node) else node, variables, is_leaf=is_stack)
