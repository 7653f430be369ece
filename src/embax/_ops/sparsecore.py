"""The sparsecore lowering: custom calls that the SparseCores of a TPU run, with the row rule traced into the update's.

XLA's TPU compiler runs the rule on many rows at once: it replaces the 1 in float32[1, dim], the shape that the rule is
traced for, by a number of rows. That works for elementwise operations alone.
"""

import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive, Var, jaxpr_as_fun
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import func, stablehlo
from jax.interpreters import mlir

from embax._ops.geometry import Geometry, StackGeometry
from embax._ops.row_update import NO_LIMITS, RowLimits, StackUpdate, hyperparameters_of, new_rows, ordered
from embax._preprocess.buffers import PADDING_VALUE
from embax._warnings import warn_slow_path
from embax.optimizers import OptimizerSpec
from embax.optimizers._trace import equations, why_mixes_columns, why_not_elementwise

MOD_SHARDING = 1
"""The compiler's number for the layout in which row `id` lies on SparseCore `id % num_sparsecores`."""

UNSUPPORTED = frozenset({"erf", "is_finite", "round"})
"""Elementwise operations that the compiler does not accept in a row rule, found by compiling each. `round` ends the process."""

DTYPES = (np.float32, np.int32, np.bool_)
"""What a SparseCore computes with."""

lookup_one_p = Primitive("embax_sparsecore_lookup")
update_one_p = Primitive("embax_sparsecore_update")
update_one_p.multiple_results = True


def _arrays_of(arrays: Sequence[jax.Array], geometry: Geometry, stack: StackGeometry) -> list[jax.Array]:
    """Row pointers, ids, samples, gains of a stack, and with minibatches their number."""
    row_pointers, ids, samples, gains, num_minibatches = arrays
    start, count = stack.row_pointers_start, geometry.max_segments * geometry.row_pointers_per_segment
    parts = [jax.lax.slice_in_dim(row_pointers, start, start + count)]
    end = stack.entries_start + stack.capacity
    parts += [jax.lax.slice_in_dim(array, stack.entries_start, end) for array in (ids, samples, gains)]
    return [*parts, num_minibatches.reshape(())] if geometry.max_minibatches else parts


def lookup(arrays: Sequence[jax.Array], tables: Sequence[jax.Array], geometry: Geometry) -> list[jax.Array]:
    """`lookup_p` on TPU.

    Args:
        arrays: those of the batch, as `packed_operands` returns them.
        tables: float32[rows, dim] of each stack, or float32[rows].
        geometry: static.

    Returns:
        float32[samples, dim] of each stack, without dim where its table has none.
    """
    found = []
    for table, stack in zip(tables, geometry.stacks, strict=True):
        num_samples = geometry.num_samples(stack)
        if stack.capacity == 0 or num_samples == 0:
            found.append(jnp.zeros((num_samples, *table.shape[1:]), table.dtype))
        else:
            operands = _arrays_of(arrays, geometry, stack)
            zeros = jnp.zeros((num_samples, *table.shape[1:]), table.dtype)
            found.append(lookup_one_p.bind(*operands, table, zeros, stack=stack))
    return found


def update(arrays: Sequence[jax.Array], one: StackUpdate, geometry: Geometry) -> Sequence[jax.Array]:
    """`update_p` of one stack that SparseCores hold; see `holds`.

    Args:
        arrays: those of the batch, as `packed_operands` returns them.
        one: the update.
        geometry: static.

    Returns:
        The new table and slots.
    """
    stack, optimizer, state = one.stack, one.optimizer, one.state
    if stack.capacity == 0 or geometry.num_samples(stack) == 0:
        return state
    row_pointers, *parts = _arrays_of(arrays, geometry, stack)
    rule = row_rule(optimizer, one.limits, state[0].shape[1], len(state) - 1, len(one.hyperparameters))
    # The compiler refuses an update without hyperparameters; the rule has one that it does not read.
    scalars = one.hyperparameters or [jnp.zeros((), jnp.float32)]
    return update_one_p.bind(
        ordered(row_pointers, one.order),
        *parts,
        one.gradient,
        *state,
        *scalars,
        minibatched=bool(geometry.max_minibatches),
        num_states=len(state),
        stack=stack,
        rule=rule,
        name=f"embax_{optimizer.short_name() or 'update'}_rows",
    )


@functools.lru_cache(maxsize=1024)
def row_rule(
    optimizer: OptimizerSpec, limits: RowLimits, dim: int, num_slots: int, num_hyperparameters: int
) -> ClosedJaxpr:
    """`new_rows` for one row: of gradient, table, slots and hyperparameters, each float32[1, dim], to table and slots."""

    def rule(gradient, table, *others):
        slots, hyperparameters = others[:num_slots], others[num_slots : num_slots + num_hyperparameters]
        table, slots = new_rows(optimizer, limits, gradient, table, slots, hyperparameters)
        return [table, *slots]

    row = jax.ShapeDtypeStruct((1, dim), jnp.float32)
    return jax.make_jaxpr(rule)(*[row] * (2 + num_slots + max(num_hyperparameters, 1)))


@functools.lru_cache(maxsize=1024)
def why_not(optimizer: OptimizerSpec, dim: int) -> str | None:
    """What keeps SparseCores from updating rows by an optimizer, or None. The compiler ends the process over some of it.

    Args:
        optimizer: the optimizer, static.
        dim: columns of the table.
    """
    if any(optimizer.row_wise_slots()):
        return "it has a slot of one value a row"
    if optimizer.clip_gradient_norm is not None:
        return "clip_gradient_norm takes the row as a whole"
    if not optimizer.elementwise:
        return why_not_elementwise(optimizer)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    num_hyperparameters = len(jax.eval_shape(functools.partial(hyperparameters_of, optimizer), step))
    closed = row_rule(optimizer, NO_LIMITS, dim, optimizer.slot_variables_count(), num_hyperparameters)
    if reason := why_mixes_columns(closed, dim):
        return reason
    for equation in equations(closed.jaxpr):
        name = equation.primitive.name
        if name in UNSUPPORTED:
            return f"its rule uses {name}"
        if any(value.aval.dtype not in DTYPES for value in (*equation.invars, *equation.outvars)):
            return f"its rule uses {name} on other numbers than float32, int32 and bool"
    if any(isinstance(value, Literal) for value in closed.jaxpr.outvars) or not _depends_on_rows(closed.jaxpr):
        return "its rule makes a row that does not depend on the old one"
    return None


def why_not_held(stack: StackGeometry, table: jax.Array) -> str | None:
    """What keeps SparseCores from looking up and updating a stack, or None.

    It is one answer for both: arrays of SparseCores lie in memory in their own way, and XLA would convert whole tables.
    """
    if stack.optimizer is None:
        return None
    return "its table has one value a row" if table.ndim == 1 else why_not(stack.optimizer, table.shape[1])


def holds(stack: StackGeometry, table: jax.Array) -> bool:
    """Whether SparseCores look up and update a stack. If not, it is said, and plain JAX operations do both."""
    reason = why_not_held(stack, table)
    if reason is None:
        return True
    warn_slow_path(
        f"Stack {stack.name!r}: SparseCores cannot run {type(stack.optimizer).__name__}, since {reason}. "
        "Its lookups and updates run in plain JAX operations, which are slower on a TPU. "
        'embax.use_backend("portable") chooses that without this warning, for all stacks.'
    )
    return False


def _depends_on_rows(jaxpr: Jaxpr) -> bool:
    """Whether each result of a rule is computed from an argument."""
    reached: set[Var] = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(value in reached for value in equation.invars if isinstance(value, Var)):
            reached.update(equation.outvars)
    return all(value in reached for value in jaxpr.outvars)


@lookup_one_p.def_abstract_eval
def _lookup_shape(*operands, stack: StackGeometry):
    del stack
    table, zeros = operands[-2:]
    return table.update(shape=zeros.shape)


@update_one_p.def_abstract_eval
def _update_shapes(*operands, minibatched: bool, num_states: int, **params):
    del params
    first = 6 if minibatched else 5
    return [state.update() for state in operands[first : first + num_states]]


def _backend_config(stack: StackGeometry, **more: Any) -> str:
    # A limit of 0 is one of a batch without ids.
    config = {
        "max_ids_per_partition": max(stack.max_ids_per_partition, 1),
        "max_unique_ids_per_partition": max(stack.max_unique_ids_per_partition, 1),
        "pad_value": PADDING_VALUE,
        "sharding_strategy": MOD_SHARDING,
        **more,
    }
    return json.dumps({"sparse_dense_matmul_config": config, "device_type": "DEVICE_TYPE_SPARSECORE"})


def _custom_call(context, target: str, result_type, config: str, operands, called_computations=()) -> Any:
    lower = jax.ffi.ffi_lowering(
        target,
        result_types=[result_type],
        backend_config=config,
        called_computations=list(called_computations),
        # The compiler chooses the layouts: tables have one of their own (see `table_format`).
        skip_ffi_layout_processing=True,
        api_version=1,
    )
    return lower(context, *operands)[0]


def _float32(shape: Sequence[int]) -> ir.Type:
    return ir.RankedTensorType.get(list(shape), ir.F32Type.get())


def _lower_lookup_one(context, *operands, stack: StackGeometry):
    more = {}
    if stack.quantization is not None:
        low, high, buckets = stack.quantization
        more["quantization_config"] = {"min_value": low, "max_value": high, "num_buckets": buckets}
    target = "SparseDenseMatmulWithMinibatchingOp" if len(operands) == 7 else "SparseDenseMatmulOp"
    result = _float32(context.avals_out[0].shape)
    return [_custom_call(context, target, result, _backend_config(stack, **more), operands)]


def _called_computation(context, rule: ClosedJaxpr, num_states: int, name: str) -> str:
    """Writes the rule into the module as a function that returns a tuple; its name."""
    module = context.module_context
    row = rule.in_avals[0].shape
    types = [_float32(row)] * len(rule.in_avals)
    results = ir.TupleType.get_tuple([_float32(row)] * num_states)
    computation = func.FuncOp(name, (types, [results]), ip=module.ip, visibility="private")
    module.symbol_table.insert(computation)
    block = computation.add_entry_block()
    with ir.InsertionPoint(block):
        inner = context.replace(primitive=None, avals_in=rule.in_avals, avals_out=rule.out_avals)
        new = mlir.lower_fun(jaxpr_as_fun(rule), multiple_results=True)(inner, *block.arguments)
        flat = [value for values in new for value in (values if isinstance(values, (list, tuple)) else (values,))]
        func.ReturnOp([stablehlo.tuple(flat)])
    return computation.name.value


def _lower_update_one(
    context, *operands, minibatched: bool, num_states: int, stack: StackGeometry, rule: ClosedJaxpr, name: str
):
    first = 5 if minibatched else 4
    arrays, gradient = operands[:first], operands[first]
    states, scalars = operands[first + 1 :][:num_states], operands[first + 1 + num_states :]
    computation = _called_computation(context, rule, num_states, name)
    config = _backend_config(stack, num_slot_variables=num_states - 1, num_hyperparameters=len(scalars))
    if minibatched:
        target, variables = "SparseDenseMatmulGradOptimizerUpdateWithMinibatchingOp", (*states, gradient)
    else:
        target, variables = "SparseDenseMatmulGradOpWithOptimizerUpdate", (gradient, *states)
    result = ir.TupleType.get_tuple([state.type for state in states])
    new = _custom_call(context, target, result, config, [*arrays, *variables, *scalars], [computation])
    elements = []
    for number in range(num_states):
        element = stablehlo.GetTupleElementOp(new, number)
        sparse: dict[str, ir.Attribute] = {"_xla_compute_type": ir.StringAttr.get("sparse")}
        element.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get(sparse)
        elements.append(element.result)
    return elements


mlir.register_lowering(lookup_one_p, _lower_lookup_one, platform="tpu")
mlir.register_lowering(update_one_p, _lower_update_one, platform="tpu")
