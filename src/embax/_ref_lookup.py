"""The differentiable lookups of a layer whose tables live in refs.

The backward pass of a lookup takes one optimizer step on the rows that the batch touched, and writes them into the refs. No
gradient of a table leaves it. JAX runs a backward rule only where an input is differentiated. So a lookup takes a scalar, the
token, whose gradient is always 0.

Lookups and updates are ordered through the refs. XLA updates a table in place only if it sees that every read of the old table
comes first. So each lookup adds a zero to the ref `order`, which XLA takes for a function of the rows that were read, and each
update waits for the value of `order`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from embax._checks import INT32_MAX
from embax._lookup_vjp import LookupSettings, update_of
from embax._matmul import all_finite, gain_gradients_of_features, lookup_features
from embax._mesh import on_devices
from embax._ops.row_update import orders_of
from embax._preprocess.buffers import PreprocessedInput
from embax._refs import inside_jit, is_ref, read, write
from embax._rows import take_rows
from embax._sparse_gradients import SparseGradient, apply_to_stacks
from embax._stacking.layout import physical_rows
from embax._stacking.plan import StackPlan, TablePlan


class LayerRefs(NamedTuple):
    """The refs of a layer. A pytree.

    Args:
        variables: `EmbeddingVariables` of each stack by name, whose leaves are refs.
        order: int32[num_devices, n], the same in each column; see above.
        step: int32[n], in each element the number of optimizer steps that were taken.
        bin: None, or where the backward pass of this lookup stores its gradients instead of updating the tables.
    """

    variables: Any
    order: Any
    step: Any
    bin: Any = None


class GradientBin(NamedTuple):
    """Refs that a backward pass stores the gradients of one lookup in, once for each time that it runs.

    Args:
        count: int32[], how often it ran.
        gradients: pytree like what the lookup stores, whose leaves are refs with a leading dimension.
    """

    count: Any
    gradients: Any


def ordered_after(order: jax.Array, arrays: list[jax.Array]) -> jax.Array:
    """`order`, unchanged, but for XLA not known before the arrays are."""
    return functools.reduce(lambda total, zero: total if zero is None else total + zero, orders_of(arrays, 0), order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(
    settings: LookupSettings, refs: LayerRefs, token: jax.Array, packed: PreprocessedInput, step: Any, scale: Any
) -> list[jax.Array]:
    """Activations of each feature, in the order of the feature leaves."""
    del token, step, scale
    return inside_jit(_read_features, refs, packed, settings=settings)[0]


def _read_features(
    refs: LayerRefs, packed: PreprocessedInput, *, settings: LookupSettings
) -> tuple[list[jax.Array], jax.Array]:
    """The activations, and the number of the step."""

    def look_up(variables, order, packed):
        features, looked_up = lookup_features(packed, variables, settings.plan, settings.axis_name)
        return features, ordered_after(order, looked_up)

    spec = None if settings.mesh is None else settings.mesh.leading
    look_up = on_devices(settings.mesh, look_up, (spec, spec, spec), spec)
    features, order = look_up(read(refs.variables), read(refs.order), packed)
    if not settings.all_frozen:
        write(refs.order, order)
    return features, read(refs.step).reshape(-1)[0]


def _lookup_forward(settings, refs, token, packed, step, scale):
    _check_updatable(settings, refs)
    features, own_step = inside_jit(_read_features, refs, packed, settings=settings)
    return features, (refs, token, packed, own_step if step is None else step, scale)


def _lookup_backward(settings, residuals, gradients):
    refs, token, packed, step, scale = residuals
    if refs.bin is not None:
        inside_jit(_store, refs.bin, (_unscaled(gradients, scale), packed))
    elif not settings.all_frozen:
        inside_jit(_update, refs, gradients, packed, step, scale, settings=settings)
    return None, jnp.zeros_like(token), None, None, None


_lookup.defvjp(_lookup_forward, _lookup_backward)


def _check_updatable(settings: LookupSettings, refs: LayerRefs) -> None:
    """Raises a ValueError if the tables cannot be updated since they are arrays still."""
    if not settings.all_frozen and not is_ref(refs.step):
        raise ValueError(
            "The layer is differentiated, and holds its tables in arrays, since it was made inside jit or nnx.eval_shape. Call "
            "make_refs() of the layer outside jit once, or its preprocess(), which does it too."
        )


def _unscaled(gradients: Any, scale: Any) -> Any:
    return gradients if scale is None else jax.tree.map(lambda gradient: gradient / scale, gradients)


def _store(bin: GradientBin, gradients: Any) -> None:
    count = bin.count[...]
    for ref, value in zip(jax.tree.leaves(bin.gradients), jax.tree.leaves(gradients), strict=True):
        ref[count] = value
    bin.count[...] = count + 1


def _update(
    refs: LayerRefs, gradients: Any, packed: PreprocessedInput, step: Any, scale: Any, *, settings: LookupSettings
) -> None:
    gradients = _unscaled(gradients, scale)
    after = [read(refs.order)] * len(settings.plan.stacks)
    new = update_of(settings, gradients, packed, read(refs.variables), step, after)
    finish_step(settings, refs, new, step, _finite(settings, [gradients[leaf] for leaf in settings.updated_leaves]))


def finish_step(settings: LookupSettings, refs: LayerRefs, new: Any, step: Any, finite: jax.Array | None) -> None:
    """Stores new variables of some stacks, and the number of the next step.

    Args:
        settings: static.
        refs: of the layer.
        new: `EmbeddingVariables` by the name of a stack.
        step: the number of this step.
        finite: None, or a bool: a step that was skipped since it is False is not counted.
    """
    for name, state in new.items():
        if name not in settings.frozen:
            write(refs.variables[name], state)
    next_step = jnp.full(refs.step.shape, jnp.asarray(step).astype(jnp.int32) + 1)
    write(refs.step, next_step if finite is None else jnp.where(finite, next_step, read(refs.step)))


def _finite(settings: LookupSettings, gradients: list[jax.Array]) -> jax.Array | None:
    if not settings.skip_nonfinite:
        return None
    spec = None if settings.mesh is None else settings.mesh.leading
    finite = functools.partial(all_finite, axis=settings.axis_name)
    return on_devices(settings.mesh, finite, (spec,), jax.P())(gradients)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gain_gradients(
    settings: LookupSettings, ordered: bool, features: list[jax.Array], gains: jax.Array, refs: LayerRefs, packed: Any
) -> list[jax.Array]:
    """The features as they are. In the backward pass the gains of the batch get their gradient.

    This backward pass runs before the one that updates the tables. If `ordered`, the update waits for it, so that the table is
    not copied. If not, XLA leaves it out where nobody asks for the gradient.
    """
    del settings, ordered, gains, refs, packed
    return features


def _gain_gradients_forward(settings, ordered, features, gains, refs, packed):
    return features, (gains, refs, packed)


def _gain_gradients_backward(settings, ordered, residuals, gradients):
    gains, refs, packed = residuals
    found = inside_jit(_gain_gradients, refs, gradients, packed, settings=settings, ordered=ordered)
    return gradients, found.reshape(gains.shape), None, None


_with_gain_gradients.defvjp(_gain_gradients_forward, _gain_gradients_backward)


def _gain_gradients(
    refs: LayerRefs, gradients: list[jax.Array], packed: PreprocessedInput, *, settings: LookupSettings, ordered: bool
) -> jax.Array:
    def products_of(gradients, packed, variables, order):
        products = gain_gradients_of_features(gradients, packed, variables, settings.plan, settings.axis_name)
        return jnp.concatenate(products), ordered_after(order, products)

    spec = None if settings.mesh is None else settings.mesh.leading
    products_of = on_devices(settings.mesh, products_of, (spec, spec, spec, spec), spec)
    products, order = products_of(gradients, packed, read(refs.variables), read(refs.order))
    if ordered and not settings.all_frozen:
        write(refs.order, order)
    return products


def lookup_in_refs(
    settings: LookupSettings, refs: LayerRefs, token: jax.Array, packed: PreprocessedInput, step: Any, scale: Any
) -> list[jax.Array]:
    """Activations of each feature, in the order of the feature leaves.

    Args:
        settings: static.
        refs: of the layer. Where the token is differentiated, the backward pass writes them.
        token: float[], differentiable; its gradient is 0.
        packed: the packed batch. Its gains are differentiable.
        step: None for the layer's own number of steps, or the number of this step.
        scale: None, or what gradients are divided by before the update.
    """
    gains = packed.gains
    packed = jax.tree.map(_constant, packed)
    features: Any = _lookup(settings, refs, token, packed, step, None if scale is None else _constant(scale))
    if isinstance(gains, Tracer):
        differentiated = _differentiated(token, gains)
        if differentiated is not False:
            features = _with_gain_gradients(settings, bool(differentiated), features, gains, refs, packed)
    return features


def _constant(array: Any) -> Any:
    """The array without a derivative. To JAX an integer has one too, of its own type, if it was computed from weights."""
    if not isinstance(array, Tracer):
        return array
    if jnp.issubdtype(array.dtype, jnp.integer):
        other = jnp.uint32 if array.dtype == jnp.int32 else jnp.int32
        return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(array, other), array.dtype)
    return jax.lax.stop_gradient(array)


def _differentiated(token: jax.Array, gains: jax.Array) -> bool | None:
    """Whether gains are differentiated; None inside a function that is traced now, and may be differentiated later."""
    found = []

    @jax.custom_vjp
    def probe(token, gains):
        del token
        return gains

    def forward(token, gains):
        found.append(gains.perturbed)
        return gains.value, (token.value,)

    def backward(residuals, cotangent):
        return jnp.zeros_like(residuals[0]), cotangent

    probe.defvjp(forward, backward, symbolic_zeros=True)
    probe(token, gains)
    return any(found) if found else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rows(
    settings: LookupSettings,
    stack: StackPlan,
    table: TablePlan,
    refs: LayerRefs,
    token: jax.Array,
    ids: jax.Array,
    step: Any,
    scale: Any,
) -> jax.Array:
    """float32[*ids.shape, embedding_dim], rows of a table by id; NaN for an id of -1."""
    del token, step, scale
    return inside_jit(_read_rows, refs, ids, settings=settings, stack=stack, table=table)[0]


def _read_rows(
    refs: LayerRefs, ids: jax.Array, *, settings: LookupSettings, stack: StackPlan, table: TablePlan
) -> tuple[jax.Array, jax.Array]:
    rows = take_rows(_table(refs, stack), ids, table=table, num_sparsecores=settings.plan.num_sparsecores)
    if stack.name not in settings.frozen:
        write(refs.order, ordered_after(read(refs.order), [rows]))
    return rows, read(refs.step).reshape(-1)[0]


def _table(refs: LayerRefs, stack: StackPlan) -> Any:
    return jax.tree.leaves(refs.variables[stack.name])[0]


def _rows_forward(settings, stack, table, refs, token, ids, step, scale):
    _check_updatable(settings, refs)
    rows, own_step = inside_jit(_read_rows, refs, ids, settings=settings, stack=stack, table=table)
    return rows, (refs, token, ids, own_step if step is None else step, scale)


def _rows_backward(settings, stack, table, residuals, gradient):
    refs, token, ids, step, scale = residuals
    if stack.name not in settings.frozen:
        gradient = _unscaled(gradient, scale)
        static = {"settings": settings, "stack": stack, "table": table}
        if refs.bin is not None:
            inside_jit(_store_rows, refs.bin, ids, gradient, **static)
        else:
            inside_jit(_update_rows, refs, ids, gradient, step, **static)
    return None, jnp.zeros_like(token), None, None, None


_rows.defvjp(_rows_forward, _rows_backward)


def physical_gradient(
    ids: jax.Array, gradient: jax.Array, settings: LookupSettings, stack: StackPlan, table: TablePlan
) -> tuple[jax.Array, jax.Array]:
    """int32[n], rows of the stack, `INT32_MAX` for an id of -1; and float32[n, dim], their gradients as wide as the stack."""
    ids = ids.reshape(-1)
    rows = physical_rows(jnp.maximum(ids, 0), table.rows, stack.shape[0], settings.plan.num_sparsecores)
    gradient = gradient.reshape(ids.size, table.embedding_dim).astype(jnp.float32)
    gradient = jnp.pad(gradient, ((0, 0), (0, stack.shape[1] - table.embedding_dim)))
    return jnp.where(ids < 0, INT32_MAX, rows), jnp.where(ids[:, None] < 0, 0.0, gradient)


def _store_rows(bin: GradientBin, ids: jax.Array, gradient: jax.Array, *, settings, stack, table) -> None:
    _store(bin, physical_gradient(ids, gradient, settings, stack, table))


def own_rows(settings: LookupSettings, stack: StackPlan, rows: jax.Array, gradient: jax.Array) -> SparseGradient:
    """The gradient of a stack for each device: its own rows, by their number on the device.

    Args:
        settings: static.
        stack: the stack.
        rows: int32[n], rows of the whole stack, the same on all devices.
        gradient: float32[n, dim] of these rows.
    """
    if settings.mesh is None:
        return SparseGradient(rows, gradient)
    size = stack.shape[0] // settings.plan.num_devices

    def own(rows, gradient):
        first = jax.lax.axis_index(settings.axis_name) * size
        here = (rows >= first) & (rows < first + size)
        return SparseGradient(jnp.where(here, rows - first, INT32_MAX), jnp.where(here[:, None], gradient, 0.0))

    everywhere = jax.P()
    return on_devices(settings.mesh, own, (everywhere, everywhere), settings.mesh.leading)(rows, gradient)


def update_stacks(
    settings: LookupSettings, refs: LayerRefs, parts: dict[str, SparseGradient], step: Any, finite: jax.Array | None
) -> None:
    """Takes one optimizer step on rows of some stacks, and stores it.

    Args:
        settings: static.
        refs: of the layer.
        parts: gradients by the name of a stack; on a mesh each device has its own rows.
        step: the number of the step.
        finite: None, or a bool: if it is False the step is skipped.
    """

    def update(parts, variables, step, order, finite):
        if finite is not None:
            parts = {
                name: SparseGradient(jnp.where(finite, part.rows, INT32_MAX), part.values)
                for name, part in parts.items()
            }
        return apply_to_stacks(variables, parts, step, settings.plan, settings.limits, after=order)

    spec, everywhere = None if settings.mesh is None else settings.mesh.leading, jax.P()
    update = on_devices(settings.mesh, update, (spec, spec, everywhere, spec, everywhere), spec)
    variables = {name: read(refs.variables[name]) for name in parts}
    finish_step(settings, refs, update(parts, variables, step, read(refs.order), finite), step, finite)


def _update_rows(
    refs: LayerRefs,
    ids: jax.Array,
    gradient: jax.Array,
    step: Any,
    *,
    settings: LookupSettings,
    stack: StackPlan,
    table: TablePlan,
) -> None:
    rows, gradient = physical_gradient(ids, gradient, settings, stack, table)
    finite = jnp.all(jnp.isfinite(gradient)) if settings.skip_nonfinite else None
    part = own_rows(settings, stack, rows, gradient)
    update_stacks(settings, refs, {stack.name: part}, step, finite)


def rows_in_refs(
    settings: LookupSettings,
    stack: StackPlan,
    table: TablePlan,
    refs: LayerRefs,
    token: jax.Array,
    ids: jax.Array,
    step: Any,
    scale: Any,
) -> jax.Array:
    """Rows of a table, float32[*ids.shape, embedding_dim]; arguments as for `lookup_in_refs`."""
    return _rows(settings, stack, table, refs, token, _constant(ids), step, None if scale is None else _constant(scale))
