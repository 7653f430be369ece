"""Shows whether the tables at the end of a step are the new tables that the backward pass of one lookup returned.

In Linen models the cotangent of the tables is the new tables. An ordinary JAX recipe that touches gradients spoils them: it
adds, averages or scales. Two things tell.

Identity: the backward pass remembers the arrays that it returned. If `apply_updates_for_sc_model` receives the same arrays,
nothing was done to them. This is known while the step is traced, and costs nothing in the compiled step.

The witness: a small parameter beside the tables. Its cotangent is a count of 1 and the digits of a checksum of the new tables,
with their squares. A sum counts 2, a factor s counts s, the checksum of a mean is not the mean of the checksums, a dense gradient
changes the tables but not the checksum, and an optimizer's step changes the stored witness. The checksum reads whole tables. XLA
removes it from steps that identity decides; other steps copy the tables anyway.

Columns of a witness, float32[devices, WIDTH]:

| column  | stored | cotangent of one lookup | after a misuse                  |
|---------|--------|-------------------------|---------------------------------|
| mark    | 1      | 0                       | 1 + the number of its `Misuse`  |
| count   | 0      | 1; 0 if all is frozen   | as it arrived                   |
| frozen  | 0      | 0; 1 if all is frozen   | as it arrived                   |
| digits  | 0      | 8 digits of 4 bits      | as they arrived                 |
| squares | 0      | their squares           | as they arrived                 |

All numbers are integers up to 225, which every floating point type holds exactly.
"""

import enum
import functools
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from embax._mesh import TableMesh, on_devices
from embax._warnings import warn_slow_path

_MARK, _COUNT, _FROZEN, _DIGITS, _SQUARES = 0, 1, 2, slice(3, 11), slice(11, 19)
WIDTH = 19
"""Columns of a witness."""

# Arrays that backward passes returned as new tables and slots, by `id`, for as long as they live.
_returned: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


class Misuse(enum.IntEnum):
    """What was done to the new tables."""

    SEVERAL = 1
    SCALED = 2
    DENSE = 3
    ADDED = 4
    STEPPED = 5


_FUNCTIONAL = (
    "To sum, average, scale or clip the gradients of tables, use embax.lookup, embax.sparse_gradients and "
    "embax.apply_sparse_gradients; or use embax.nnx.embed.SparseCoreEmbed, whose tables no optimizer sees."
)
_KEPT = (
    " The tables were left as they are. Correct the step, and continue with the parameters of before it, or with "
    "layer.load(params, {}), which clears this error."
)
_LOST = (
    " The tables are lost. Restore the parameters from a checkpoint. Make the optimizer with create_optimizer_for_sc_model, and "
    "apply its updates with apply_updates_for_sc_model, also in a Flax TrainState: not with its apply_gradients, but with "
    "state.replace(params=..., opt_state=...)."
)
_TEXTS = {
    Misuse.SEVERAL: "The tables were looked up {count:g} times in one differentiated step, or their gradient was multiplied by "
    "{count:g}. The backward pass of a lookup returns the new tables, and several new tables cannot be added. Look all batches "
    "up in one call, as features that share the table or as one larger batch. " + _FUNCTIONAL,
    Misuse.SCALED: "The gradient of the tables was scaled or averaged (one lookup counts as {count:g}): by clipping, by the "
    "scale of a loss, or by the mean over microbatches or devices. The backward pass of a lookup returns the new tables, not a "
    "gradient. Change the gradients of the dense parameters only. " + _FUNCTIONAL,
    Misuse.DENSE: "The new tables are not those that the backward pass returned. A dense gradient was added to them: the loss "
    "also reads the tables themselves, as a tied output layer or a penalty on all parameters does, or the optimizer decays all "
    "weights. Decay dense parameters only. Read tables under jax.lax.stop_gradient, or look the rows up as a second feature of "
    "the same table. " + _FUNCTIONAL,
    Misuse.ADDED: "The new tables were added to the old ones, by optax.apply_updates or by apply_gradients of a Flax TrainState.",
    Misuse.STEPPED: "An optimizer stepped the tables as if the new tables were a gradient, or changed the parameters beside "
    "them.",
}


def stored_witness(num_devices: int) -> jax.Array:
    """The witness beside tables that nothing was done to, float32[num_devices, WIDTH]."""
    return jnp.zeros((num_devices, WIDTH), jnp.float32).at[:, _MARK].set(1.0)


def note_returned(new: Any) -> None:
    """Remembers the arrays that a backward pass returns as new tables and slots."""
    for leaf in jax.tree.leaves(new):
        _returned[id(leaf)] = leaf


def is_returned(array: Any) -> bool:
    """Whether a backward pass returned this very array, so that nothing was done to it."""
    return _returned.get(id(array)) is array


def witness_cotangent(witness: jax.Array, mesh: TableMesh | None, new: Any, all_frozen: bool) -> jax.Array:
    """The cotangent of the witness from one lookup.

    Args:
        witness: floating point [devices, WIDTH].
        mesh: the mesh of the tables, or None.
        new: the new tables and slots.
        all_frozen: whether the lookup updates no table. Several such lookups are allowed.
    """
    if all_frozen:
        return jnp.full_like(witness, 0.0).at[:, _FROZEN].set(1.0)
    digits = _digits(mesh, new).astype(witness.dtype)
    one, zero = jnp.ones_like(digits[:, :1]), jnp.zeros_like(digits[:, :1])
    return jnp.concatenate([zero, one, zero, digits, digits * digits], axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _digits(mesh: TableMesh | None, tables: Any, counts: jax.Array | None = None) -> jax.Array:
    """float32[devices, 8]: the digits of the checksum of each device's part of the tables and slots.

    Args:
        mesh: the mesh of the tables, or None.
        tables: tables and slots.
        counts: [devices], lookups. Where there was none, only a sample of rows is read, and the digits are 15 unless it is 0.
    """

    def of_all(leaves):
        total = sum((_checksum(leaf, number) for number, leaf in enumerate(leaves)), jnp.uint32(0))
        shifts = 4 * jnp.arange(8, dtype=jnp.uint32)
        return ((total >> shifts) & jnp.uint32(15)).astype(jnp.float32)

    def of_sample(leaves):
        found = [jnp.any(leaf[:: max(1, leaf.shape[0] // 64)] != 0) for leaf in leaves]
        return jnp.full(8, 15.0) * functools.reduce(jnp.logical_or, found).astype(jnp.float32)

    def on_device(leaves, counts):
        # The tables of a step without a lookup are constants, whose checksum XLA would take long to compile.
        digits = of_all(leaves) if counts is None else jax.lax.cond(counts[0] == 0, of_sample, of_all, leaves)
        return digits[None]

    leaves = jax.tree.leaves(tables)
    spec = None if mesh is None else mesh.leading
    return on_devices(mesh, on_device, (spec, spec), spec)(leaves, counts)


def _checksum(array: jax.Array, number: int) -> jax.Array:
    """uint32: the sum of the bits of all elements, times odd weights that depend on the position; 0 for an array of zeros."""
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    weights = jnp.full(array.shape, np.uint32((number + 1) * 0xC2B2AE35 % 2**32))
    for axis, factor in zip(range(array.ndim), (0x9E3779B1, 0x85EBCA6B, 0x27D4EB2F), strict=False):
        position = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        weights = (weights ^ position) * jnp.uint32(factor)
    # A zero may have lost its sign on the way, by the addition of a gradient that is 0.
    weighted = jnp.where(array == 0, jnp.uint32(0), bits) * (weights | jnp.uint32(1))
    # Row by row, because XLA for CPU stores the operand of one large sum.
    by_row = jnp.sum(weighted, axis=tuple(range(1, array.ndim)), dtype=jnp.uint32)
    return jnp.sum(by_row, dtype=jnp.uint32)


def _same(one: jax.Array, other: jax.Array) -> jax.Array:
    """bool[devices]: whether two arrays [devices, columns] have the same bits. If both are one value, XLA knows the answer."""

    def bits(array):
        return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))

    return jnp.all(bits(one) == bits(other), axis=1)


def _sound(witness: jax.Array) -> jax.Array:
    digits = witness[:, _DIGITS]
    return _same(witness[:, _SQUARES], digits * digits)


def _what_was_done(witness: jax.Array) -> jax.Array:
    """int32[devices]: the misuse that the cotangent of a witness shows, if it shows one."""
    count = witness[:, _COUNT]
    misuse = jnp.where(_sound(witness) & ((count == 0) | (count == 1)), Misuse.DENSE, Misuse.SCALED)
    misuse = jnp.where((count > 1) & (count == jnp.round(count)), Misuse.SEVERAL, misuse)
    # A penalty on all parameters has a gradient with respect to the mark.
    return jnp.where(witness[:, _MARK] == 0, misuse, Misuse.DENSE).astype(jnp.int32)


@jax.jit
def _judge_arrived(witness: jax.Array, digits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Judges new tables that arrived with a witness.

    Args:
        witness: floating point [devices, WIDTH].
        digits: float32[devices, 8], of the tables that arrived.

    Returns:
        bool: whether they are the new tables of one lookup. int32: the misuse, 0 for none.
    """
    count, unmarked = witness[:, _COUNT], witness[:, _MARK] == 0
    sound = unmarked & _sound(witness) & _same(witness[:, _DIGITS], digits.astype(witness.dtype))
    # Of no lookup the gradient is 0, of the tables too; frozen tables stay, whatever arrives.
    nothing = (count == 0) & (sound | unmarked & (witness[:, _FROZEN] > 0))
    once = jnp.all((count == 1) & sound)
    return once, jnp.where(once | jnp.all(nothing), 0, jnp.max(_what_was_done(witness)))


@jax.jit
def judge_stored(witness: jax.Array) -> jax.Array:
    """int32: the misuse that a parameter's witness shows; 0 for none. The cotangent of one lookup shows none."""
    mark, count, rest = witness[:, _MARK], witness[:, _COUNT], jnp.all(witness[:, 1:] == 0, axis=1)
    stored = rest & (mark <= 1.01)  # An average over steps may round 1.
    one_lookup = (mark == 0) & _sound(witness) & ((count == 1) | (count == 0) & (witness[:, _FROZEN] > 0))
    marked = (mark >= 2) & (mark <= 1 + max(Misuse)) & (mark == jnp.round(mark))
    added = (mark == 1) & _sound(witness) & (count == 1)
    stepped = jnp.where(added, Misuse.ADDED, jnp.where(mark == 0, _what_was_done(witness), Misuse.STEPPED))
    verdicts = jnp.where(marked, mark.astype(jnp.int32) - 1, stepped.astype(jnp.int32))
    return jnp.max(jnp.where(stored | one_lookup, 0, verdicts))


def _raise(misuse: int, witness: Any, tables_kept: bool) -> None:
    count = float(np.asarray(witness, np.float32)[:, _COUNT].max())
    raise ValueError(_TEXTS[Misuse(misuse)].format(count=count).strip() + (_KEPT if tables_kept else _LOST))


def _is_ready(array: Any) -> bool:
    return array.is_fully_addressable and array.is_ready()


def refuse_misused(witness: Any) -> bool:
    """Whether a witness is known without waiting, and shows no misuse.

    Raises:
        ValueError: it shows a misuse.
    """
    if isinstance(witness, Tracer):
        return False
    if isinstance(witness, jax.Array) and (witness.is_deleted() or not _is_ready(witness)):
        return False
    with jax.ensure_compile_time_eval():  # The parameters may be constants of a jitted function.
        misuse = int(judge_stored(witness))
    if misuse:
        _raise(misuse, witness, tables_kept=float(np.asarray(witness, np.float32)[:, _MARK].max()) >= 2)
    return True


def settle(mesh: TableMesh | None, old: Any, new: Any, witness: Any, arrived: Any) -> tuple[Any, Any]:
    """Chooses the tables and slots after a step.

    Takes the new ones over if they are what the backward pass of one lookup returned, keeps the old ones if no lookup was
    differentiated, and refuses a misuse.

    Args:
        mesh: the mesh of the tables, or None.
        old: tables and slots before the step.
        new: what arrived in their place.
        witness: the stored witness.
        arrived: what arrived in its place.

    Returns:
        Tables and slots; and the stored witness, marked if there was a misuse inside jit, where the old tables are kept.

    Raises:
        ValueError: outside jit, there was a misuse in this step or in an earlier one.
    """
    refuse_misused(witness)
    if all(map(is_returned, jax.tree.leaves(new))):
        return new, witness
    once, misuse = _judge_arrived(arrived, _digits(mesh, new, arrived[:, _COUNT]))
    if not isinstance(misuse, Tracer):
        if misuse:
            _raise(int(misuse), arrived, tables_kept=True)
        return (new if once else old), witness
    warn_slow_path(
        "apply_updates_for_sc_model received other arrays than the backward pass returned for the tables, so this step compares "
        "them by value and copies the tables. Call jax.grad of a loss whose lookup is in no jax.jit, jax.checkpoint or scan of "
        "its own, and change the gradients of the dense parameters only. Ignore this for a step that looks nothing up."
    )
    marked = jnp.asarray(arrived).at[:, _MARK].set((misuse + 1).astype(arrived.dtype)).astype(witness.dtype)
    tables = jax.tree.map(lambda before, after: jnp.where(once, after, before), old, new)
    return tables, jnp.where(misuse > 0, marked, witness)
