"""NNX variables whose value lives in a `jax.Ref`, so that a backward pass can write it.

Refs may enter a jitted function as arguments. They may not leave it, and may not be carried by `jax.lax.scan`. So the ref of a
variable is a leaf of the state outside jit only. Inside jit the state does not contain it: JAX functions under the jitted one
close over the ref. Leaving jit, the variable finds its ref again. With that, `nnx.jit`, `nnx.scan`, `nnx.grad`, `nnx.remat`, and
functions of JAX that take and return the state of a model, work as they do for arrays.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

try:
    from flax import nnx
    from flax.nnx import reprlib, tracers
except ImportError as error:
    raise ImportError("embax.nnx needs Flax and optax: pip install 'embax[flax]'") from error

from embax._refs import is_ref, read, write

_OUTSIDE = tracers.TraceState()


class _Holder:
    """A ref in the state of a model. A pytree; see above.

    Args:
        ref: outside jit a ref, inside jit a traced one; or what a function of JAX puts in the place of a leaf.
        origin: the ref outside jit that `ref` stands for.
    """

    def __init__(self, ref: Any, origin: "_Origin | None" = None):
        self.ref = ref
        self.origin = origin or _Origin()
        if is_ref(ref) and not isinstance(ref, Tracer):
            self.origin.ref = weakref.ref(ref)

    def __deepcopy__(self, memo: Any) -> "_Holder":
        return _Holder(new_ref(self.ref)) if is_ref(self.ref) else _Holder(self.ref)

    def __reduce__(self) -> Any:
        return _from_array, (np.asarray(self.ref[...]) if is_ref(self.ref) else self.ref,)


class _Origin:
    """Where the ref of a variable is, outside jit. Compared by identity."""

    ref: Any = staticmethod(lambda: None)


class _Inside:
    """A ref inside jit, as part of the structure of a state. Equal where both the ref and its traced form are the same."""

    def __init__(self, ref: Any, origin: _Origin):
        self._traced = weakref.ref(ref)
        self._origin = origin
        self._identity = (id(ref), id(origin))

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Inside) and self._identity == other._identity and self._traced() is other._traced()

    def __hash__(self) -> int:
        return hash(self._identity)

    def found(self) -> _Holder:
        """The holder of the traced ref, or outside jit of the ref itself."""
        ref = None if _OUTSIDE.is_valid() else self._traced()
        ref = self._origin.ref() if ref is None else ref
        if ref is None:
            raise ValueError(
                "A state of a model is used whose tables are gone: the model that they belong to was deleted. Keep the model, or "
                "restore its tables from a checkpoint."
            )
        return _Holder(ref, self._origin)


def _from_array(value: Any) -> _Holder:
    return _Holder(jax.new_ref(value) if isinstance(value, np.ndarray) else value)


def _flatten(holder: _Holder) -> tuple[tuple[Any, ...], Any]:
    if isinstance(holder.ref, Tracer) and is_ref(holder.ref):
        return (), _Inside(holder.ref, holder.origin)
    return (holder.ref,), holder.origin


def _unflatten(structure: Any, children: Any) -> _Holder:
    return _Holder(children[0], structure) if children else structure.found()


jax.tree_util.register_pytree_node(_Holder, _flatten, _unflatten)


_write_jitted = jax.jit(lambda ref, value: write(ref, read(value)))


def new_ref(value: Any) -> Any:
    """A ref with the value of an array or of another ref, and of the same sharding."""
    return jax.new_ref(read(value))


class RefVariable(nnx.Variable):
    """An array of a layer in a ref. `variable[...]` reads a copy, `variable[...] = value` writes, `variable.held` is the ref.

    A layer that is made inside jit or `nnx.eval_shape` holds the array itself, since refs cannot leave jit;
    `SparseCoreEmbed.make_refs` turns it into a ref.

    Args:
        value: an array.
        **metadata: of the variable.
    """

    def __init__(self, value: Any, **metadata: Any):
        super().__init__(value, **metadata)
        if not isinstance(value, Tracer | jax.ShapeDtypeStruct):
            self.make_ref()

    @property
    def held(self) -> Any:
        """The ref, or the array where there is none yet."""
        value = self.get_raw_value()
        return value.ref if isinstance(value, _Holder) else value

    @property
    def origin(self) -> Any:
        """The same object for all variables of one ref, inside and outside jit."""
        return getattr(self.get_raw_value(), "origin", None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.held.shape

    def get_value(self, *, index: Any = ...) -> Any:
        """A copy of the array, or of a part of it."""
        held = self.held
        return held if index is ... and not is_ref(held) else held[index]

    def set_value(self, value: Any, *, index: Any = ...) -> None:
        """Writes the array, or a part of it."""
        if is_ref(self.held):
            self.held[index] = value
        else:
            super().set_value(value, index=index)

    def copy(self, *value: Any, **updates: Any) -> Any:
        """A copy of the variable. Outside transformations it has its own ref, as after `nnx.clone`; inside, it shares the ref."""
        held = self.held
        same = not value and "value" not in updates
        if same and is_ref(held) and not isinstance(held, Tracer) and _OUTSIDE.is_valid():
            value = (_Holder(new_ref(held)),)
        return super().copy(*value, **updates)

    replace = copy
    to_state = copy

    def set_raw_value(self, value: Any, **options: Any) -> None:
        """Takes over a value, as `nnx.update` does. An array is written into the ref."""
        if is_ref(self.held) and isinstance(value, jax.Array | np.ndarray):
            self.set_value(value)
        else:
            super().set_raw_value(value, **options)

    def update_from_state(self, variable_state: Any) -> None:
        """Takes over the value of another variable, as `nnx.update` does. The ref stays this variable's own."""
        value = variable_state.get_raw_value()
        new = value.ref if isinstance(value, _Holder) else value
        if not is_ref(self.held) or not (is_ref(new) or isinstance(new, jax.Array | np.ndarray)):
            super().update_from_state(variable_state)
        elif not is_ref(new):
            self.set_value(new)
        elif new is not self.held:
            _write_jitted(self.held, new)

    def __nnx_repr__(self) -> Iterator[Any]:
        # The ref, whose shape alone is shown: its value would be copied.
        yield reprlib.Object(type=type(self).__name__)
        yield reprlib.Attr("value", self.held)

    def make_abstract_ref(self, sharding: Any = None) -> None:
        """Turns an abstract array, as `nnx.eval_shape` makes it, into an abstract ref, to compile for ahead of time."""
        held = self.held
        shape = jax.ShapeDtypeStruct(held.shape, held.dtype, sharding=sharding, is_ref=True)
        self.set_raw_value(_Holder(shape))

    def make_ref(self) -> None:
        """Puts the array into a ref. Call it outside jit."""
        if not is_ref(self.held):
            self.set_raw_value(_Holder(jax.new_ref(self.held)))


class EmbeddingVariable(RefVariable):
    """A table or slot of a `SparseCoreEmbed`."""


class _SmallRefVariable(RefVariable):
    """A counter of a layer.

    Its ref holds each element `_COPIES` times. If a model is donated to a jitted function, JAX tries to reuse the memory of its
    refs for outputs of the same size, and fails. No output is likely to have such a size.
    """

    _COPIES = 1021

    def __init__(self, value: Any, **metadata: Any):
        super().__init__(self._repeated(value), **metadata)

    def _repeated(self, value: Any) -> Any:
        return jnp.repeat(jnp.asarray(value)[..., None], self._COPIES, axis=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value."""
        return self.held.shape[:-1]

    def get_value(self, *, index: Any = ...) -> Any:
        """The value, or a part of it."""
        value = super().get_value()
        return value[..., 0][index] if isinstance(value, jax.Array | np.ndarray) else value

    def set_value(self, value: Any, *, index: Any = ...) -> None:
        """Writes the value, or a part of it."""
        if index is not ...:
            value = self.get_value().at[index].set(value)
        super().set_value(value if jnp.shape(value) == self.held.shape else self._repeated(value))


class UpdateOrder(_SmallRefVariable):
    """int32[devices], always 0: by it XLA sees that updates come after lookups."""


class StepCounter(_SmallRefVariable):
    """int32[]: the optimizer steps that a layer has taken. Skipped steps are not counted."""


class InvalidIds(_SmallRefVariable):
    """int32[features]: ids that the last call with raw ids inside jit left out since they or their weights are not valid."""
