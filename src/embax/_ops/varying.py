"""Over which mesh axes arrays differ inside `jax.shard_map`, as its type system has it."""

from collections.abc import Collection
from typing import Any

import jax


def varying_axes(array: Any) -> frozenset[str]:
    """The mesh axes over which an array may differ, if `jax.shard_map` keeps account of them."""
    type_ = jax.typeof(array)
    axes = getattr(type_, "manual_axis_type", None)
    return frozenset(type_.vma if axes is None else axes.varying)


def as_varying(tree: Any, axes: Collection[str]) -> Any:
    """Arrays that may differ over `axes`: loops and primitives ask for the same type of all of theirs."""

    def cast(array: jax.Array) -> jax.Array:
        missing = tuple(sorted(frozenset(axes) - varying_axes(array)))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(cast, tree)
