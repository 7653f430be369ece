"""Leaves of any pytree, arrays and Python numbers, in and out of a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from embax.checkpoint._errors import CheckpointError
from embax.checkpoint._format import array_checksum

NamedLeaf = tuple[str, Any]


def named_leaves(tree: Any, prefix: str = "") -> list[NamedLeaf]:
    """The leaves of a pytree with their paths, such as `['dense'].kernel[0]`."""
    return [(prefix + jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _signature(leaf: Any) -> dict[str, Any] | None:
    """Kind, and for an array dtype and shape; None if a checkpoint cannot hold the leaf."""
    if isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic):
        return {"kind": type(leaf).__name__}
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    if _is_key(leaf):
        return {"kind": "PRNG key", "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    if not (jnp.issubdtype(leaf.dtype, np.number) or jnp.issubdtype(leaf.dtype, np.bool_)):
        return None
    return {"kind": "array", "dtype": str(leaf.dtype), "shape": list(leaf.shape)}


def _text(signature: dict[str, Any] | None) -> str:
    if signature is None:
        return "no array or number"
    if "shape" not in signature:
        return f"a Python {signature['kind']}"
    return f"{signature['kind']} {signature['dtype']}{signature['shape']}"


def _on_host(leaf: Any) -> np.ndarray:
    """The values of an array: a view, where that is possible, which must not be kept, since it prevents donation."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def whole_leaves(leaves: Sequence[NamedLeaf]) -> list[NamedLeaf]:
    """The leaves, those that are sharded over several processes on every device, as a whole. All processes must call it."""

    def whole(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        if not isinstance(leaf.sharding, jax.sharding.NamedSharding):
            return leaf  # Reading it says what is wrong.
        everywhere = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.P())
        return jax.jit(lambda leaf: leaf, out_shardings=everywhere)(leaf)

    return [(name, whole(leaf)) for name, leaf in leaves]


def encode(leaves: Sequence[NamedLeaf]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Descriptions of all leaves for the metadata, and the arrays among them by number.

    Raises:
        ValueError: a leaf is neither an array of numbers nor a Python number.
    """
    described, arrays = [], {}
    for number, (name, leaf) in enumerate(leaves):
        signature = _signature(leaf)
        if signature is None or isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"extra: leaf {name} is {leaf!r}; a checkpoint holds arrays of numbers, PRNG keys, and Python numbers. "
                "Leave it out."
            )
        description = {"path": name, **signature}
        if "shape" not in signature:
            description["value"] = leaf
        else:
            array = _on_host(leaf)
            description["stored"] = {"dtype": str(array.dtype), "shape": list(array.shape)}
            description["checksum"] = array_checksum(array)
            if _is_key(leaf):
                description["implementation"] = str(jax.random.key_impl(leaf))
            if array.size:  # Orbax refuses arrays without elements
                arrays[str(number)] = array
        described.append(description)
    return described, arrays


def check_leaves(path: Path, stored: Sequence[dict[str, Any]], template: Sequence[NamedLeaf]) -> None:
    """Checks that the leaves of a checkpoint are those of a template, in path, kind, shape and dtype.

    Raises:
        CheckpointError: names the first leaf that differs.
    """
    before, now = [leaf["path"] for leaf in stored], [name for name, _ in template]
    for name in now:
        if name not in set(before):
            raise CheckpointError(f"Checkpoint {path} has no leaf {name}, which the template has. {_SAME}")
    for name in before:
        if name not in set(now):
            raise CheckpointError(f"Checkpoint {path} has a leaf {name}, which the template has not. {_SAME}")
    if before != now:
        name = next(new for old, new in zip(before, now, strict=False) if old != new)
        raise CheckpointError(f"Checkpoint {path}: leaf {name} comes in another order in the template. {_SAME}")
    for description, (name, leaf) in zip(stored, template, strict=True):
        signature = _signature(leaf)
        if signature is None or any(description.get(key) != value for key, value in signature.items()):
            raise CheckpointError(
                f"Checkpoint {path}: leaf {name} is stored as {_text(description)}, and the template has "
                f"{_text(signature)}. {_SAME}"
            )


_SAME = "Restore into the structure that was saved."


def _like(value: np.ndarray, template: Any) -> Any:
    """`value` as a JAX array of its own memory, placed as the template is, and for a scalar as weakly typed."""
    if value.ndim == 0 and getattr(template, "weak_type", False):
        return _placed(jnp.asarray(value.item()), template)
    return _placed(jnp.array(value, copy=True), template)


def _placed(array: jax.Array, template: Any) -> jax.Array:
    sharding = getattr(template, "sharding", None)
    if sharding is None or not getattr(template, "committed", True):
        return array
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        place = jax.jit(lambda key: key, out_shardings=sharding)
        return place(array)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def decode(description: dict[str, Any], array: np.ndarray | None, template: Any) -> Any:
    """A leaf as its template is: NumPy or JAX, placed on the same devices; an abstract template becomes a JAX array.

    Raises:
        CheckpointError: JAX cannot hold its dtype, since 64-bit types are disabled.
    """
    if array is None:
        return description["value"]
    if description["kind"] == "PRNG key":
        data = jnp.array(array, copy=True)
        return _placed(jax.random.wrap_key_data(data, impl=description["implementation"]), template)
    if isinstance(template, np.ndarray):
        return array
    if isinstance(template, np.generic):
        return array[()]
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise CheckpointError(
            f"Leaf {description['path']} is {array.dtype}, which JAX would cut to 32 bits. Enable jax_enable_x64, or "
            "give a NumPy array as its template."
        )
    return _like(array, template)
