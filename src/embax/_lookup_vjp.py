"""The one differentiable lookup that is under every layer.

Its backward pass updates the tables: the "gradient" of the variables that it returns *is the new variables*. So a step may
look a table up once only, and what is done to gradients behind the backward pass (scaling, clipping, averaging) must leave
those of tables out. What scales the loss scales the gradients that the table's optimizer sees. The gains of the batch have
gradients as any array has, so that those of sample weights that were packed inside jit follow.
"""

import dataclasses
import functools
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from embax._matmul import gain_gradients_of_features, lookup_features, update_features
from embax._mesh import TableMesh, on_devices
from embax._ops.row_update import RowLimits
from embax._preprocess.buffers import PreprocessedInput
from embax._stacking.plan import Plan
from embax._witness import WIDTH, is_returned, judge_stored, note_returned, witness_cotangent

# Traced tables whose lookup was differentiated, by `id`, for as long as they live.
_differentiated: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


@dataclasses.dataclass(frozen=True)
class LookupSettings:
    """What a lookup and its update are compiled for.

    Args:
        plan: the placed specs.
        limits: of each stack: what the new rows of its table are clipped to.
        mesh: the devices that tables and batch are sharded over; None for one device.
        frozen: names of the stacks that are not updated.
        skip_nonfinite: whether a step with a gradient that is not finite updates nothing.
    """

    plan: Plan
    limits: tuple[RowLimits, ...]
    mesh: TableMesh | None = None
    frozen: frozenset[str] = frozenset()
    skip_nonfinite: bool = False

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.plan, self.limits, self.mesh, self.frozen, self.skip_nonfinite))

    @property
    def axis_name(self) -> str | tuple[str, ...] | None:
        """What lookups and updates take as `axis_name`."""
        return None if self.mesh is None else self.mesh.axis_name

    @functools.cached_property
    def updated_leaves(self) -> list[int]:
        """Numbers of the features whose tables are updated, among the feature leaves."""
        stacks = [stack for stack in self.plan.stacks if stack.name not in self.frozen]
        return [feature.leaf for stack in stacks for feature in stack.features]

    @property
    def all_frozen(self) -> bool:
        """Whether no stack is updated."""
        return len(self.frozen) == len(self.plan.stacks)


def note_differentiated(variables: Mapping[str, Any], frozen: Collection[str] = ()) -> None:
    """Notes that a lookup of the variables of some stacks is differentiated.

    Raises:
        ValueError: one of them was looked up before in what is traced, and is not frozen.
    """
    for name, state in variables.items():
        table = jax.tree.leaves(state)[0]
        if name in frozen or not isinstance(table, jax.core.Tracer):
            continue
        if _differentiated.get(id(table)) is table:
            raise ValueError(
                f"Stack {name!r} is looked up twice in one differentiated step. The backward pass of a lookup "
                "updates the tables, and two updates of one table cannot be added. Look both batches up in one call (as "
                "features that share the table, or as one larger batch), differentiate once, or use embax.lookup, "
                "embax.sparse_gradients of each batch and embax.apply_sparse_gradients of their sum."
            )
        _differentiated[id(table)] = table


def _lookup(
    settings: LookupSettings, variables: dict[str, Any], packed: PreprocessedInput
) -> tuple[list[jax.Array], list[jax.Array]]:
    def look_up(variables, packed):
        return lookup_features(packed, variables, settings.plan, settings.axis_name)

    if settings.mesh is None:
        return look_up(variables, packed)
    spec = settings.mesh.leading
    return on_devices(settings.mesh, look_up, (spec, spec), spec)(variables, packed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup_and_update(
    settings: LookupSettings,
    variables: dict[str, Any],
    lookups: jax.Array,
    packed: PreprocessedInput,
    step: jax.Array | int | None,
) -> list[jax.Array]:
    """Activations of each feature, in the order of the feature leaves.

    Args:
        settings: static.
        variables: table and slots of each stack; their cotangent is the new table and slots, of frozen stacks the old.
        lookups: a witness of the tables, see `_witness`; or a float32 scalar, whose cotangent is 1, or 0 if all stacks are
            frozen. If the witness shows a misuse of an earlier step, the backward pass updates nothing.
        packed: the packed batch; its gains are differentiable.
        step: for schedules and for optimizers that need it.
    """
    del lookups, step
    return _lookup(settings, _in_float32(variables), packed)[0]


def is_differentiated(table: Any) -> bool:
    """Whether a lookup of this traced table was differentiated in this trace."""
    return _differentiated.get(id(table)) is table


def unchanged(old: Any, new: Any) -> Any:
    """The new table or slot, which no witness is beside.

    Raises:
        ValueError: a lookup of the old array was differentiated in this trace, and its backward pass did not return the new one.
    """
    if is_differentiated(old) and not is_returned(new):
        raise ValueError(
            "The new tables are not those that the backward pass returned. What differentiation returns for tables is their new "
            "value, not a gradient: it cannot be scaled, clipped, averaged or cast, and the loss cannot read the tables "
            "themselves, as a tied output layer or a penalty on all parameters does. Look all batches up in one call, change the "
            "gradients of the dense parameters only, and read tables under jax.lax.stop_gradient. To change gradients of tables, "
            "use embax.lookup, embax.sparse_gradients and embax.apply_sparse_gradients."
        )
    return new


def _in_float32(variables: dict[str, Any]) -> dict[str, Any]:
    def cast(array):
        return array.astype(jnp.float32) if array.dtype in (jnp.bfloat16, jnp.float16) else array

    return jax.tree.map(cast, variables)


def _forward(settings, variables, lookups, packed, step):
    perturbed = functools.partial(jax.tree.reduce, lambda found, leaf: found or leaf.perturbed, initializer=False)
    updates, of_gains = perturbed((variables, lookups)), perturbed(packed)
    variables, lookups, packed, step = jax.tree.map(lambda leaf: leaf.value, (variables, lookups, packed, step))
    if updates:
        note_differentiated({stack.name: variables[stack.name] for stack in settings.plan.stacks}, settings.frozen)
    features, looked_up = _lookup(settings, _in_float32(variables), packed)
    return features, (variables, lookups, packed, step, looked_up, _flag(updates), _flag(of_gains))


def _flag(value: bool) -> tuple[()] | None:
    """A bool as a tree without leaves, so that it stays static among residuals."""
    return () if value else None


def _instantiated(cotangent: Any) -> jax.Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        shape: Any = cotangent.shape
        return jnp.zeros(shape, jnp.float32)
    return cotangent


def _gain_gradients(
    settings: LookupSettings,
    gradients: list[jax.Array],
    packed: PreprocessedInput,
    variables: dict[str, Any],
    looked_up: list[jax.Array],
) -> tuple[jax.Array, list[jax.Array]]:
    """The gradient with respect to the gains, and of each stack an array that is known when its rows have been read."""

    def products_of(gradients, packed, variables, looked_up):
        products = gain_gradients_of_features(gradients, packed, variables, settings.plan, settings.axis_name)
        after = [
            read[:1, :1].reshape(-1) + product[:1] if read.size and product.size else read
            for read, product in zip(looked_up, products, strict=True)
        ]
        return jnp.concatenate(products).reshape(packed.gains.shape), after

    if settings.mesh is not None:
        spec = settings.mesh.leading
        products_of = on_devices(settings.mesh, products_of, (spec, spec, spec, spec), spec)
    return products_of(gradients, packed, variables, looked_up)


def update_of(
    settings: LookupSettings,
    gradients: list[jax.Array],
    packed: PreprocessedInput,
    variables: dict[str, Any],
    step: Any,
    after: list[jax.Array] | tuple[()] = (),
) -> dict[str, Any]:
    """New table and slots of each stack, from the gradients of each feature's activations; `after` as in `update_stacks`."""
    if settings.all_frozen:
        return variables
    traced_step = step if isinstance(step, jax.Array) else None  # A number stays a constant.

    def update(gradients, packed, variables, traced_step, after):
        return update_features(
            gradients,
            packed,
            variables,
            settings.plan,
            step if traced_step is None else traced_step,
            after,
            settings.limits,
            settings.axis_name,
            frozen=settings.frozen,
            skip_nonfinite=settings.skip_nonfinite,
        )

    if settings.mesh is not None:
        spec = settings.mesh.leading
        update = on_devices(settings.mesh, update, (spec, spec, spec, jax.P(), spec), spec)
    return update(gradients, packed, variables, traced_step, after)


def _backward(settings, residuals, gradients):
    variables, lookups, packed, step, looked_up, updates, of_gains = residuals
    gradients = list(map(_instantiated, gradients))
    new, of_lookups, of_packed, after, in_float32 = None, None, None, looked_up, _in_float32(variables)
    if of_gains is not None:
        gains, after = _gain_gradients(settings, gradients, packed, in_float32, looked_up)
        of_packed = jax.tree.map(lambda _: None, packed).replace(gains=gains)
    if updates is not None:
        witnessed = lookups.shape[-1:] == (WIDTH,)
        if witnessed:
            misused = judge_stored(lookups) > 0
            packed = packed.replace(row_pointers=jnp.where(misused, jnp.int32(0), jnp.asarray(packed.row_pointers)))
        updated = update_of(settings, gradients, packed, in_float32, step, after)
        new = {
            name: state
            if name in settings.frozen
            else jax.tree.map(lambda array, before: array.astype(before.dtype), updated[name], state)
            for name, state in variables.items()
        }
        note_returned(new)
        if witnessed:
            of_lookups = witness_cotangent(lookups, settings.mesh, new, settings.all_frozen)
        else:
            of_lookups = jnp.full_like(lookups, 0.0 if settings.all_frozen else 1.0)
    return new, of_lookups, of_packed, None


lookup_and_update.defvjp(_forward, _backward, symbolic_zeros=True)
