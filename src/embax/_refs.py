"""Tables and slots that live in mutable arrays, `jax.Ref`.

Outside jit, `ref[...]` copies the whole array; inside jit it costs nothing. So every function of embax that takes refs reads and
writes them inside a jitted function, and calls one where the caller is not in jit.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def is_ref(leaf: Any) -> bool:
    """Whether a leaf is a `jax.Ref`, inside or outside jit."""
    return isinstance(leaf, jax.Ref)


def has_refs(tree: Any) -> bool:
    """Whether a leaf of a tree is a ref."""
    return any(map(is_ref, jax.tree.leaves(tree)))


def read(tree: Any) -> Any:
    """The tree with the values of its refs. Call it inside jit, where it costs nothing."""
    return jax.tree.map(lambda leaf: leaf[...] if is_ref(leaf) else leaf, tree)


def write(tree: Any, values: Any) -> None:
    """Stores values into the refs of a tree of the same structure. Call it inside jit."""
    for leaf, value in zip(jax.tree.leaves(tree), jax.tree.leaves(values), strict=True):
        if is_ref(leaf):
            leaf[...] = value


def inside_jit(function: Callable[..., Any], refs: Any, *arguments: Any, **static: Any) -> Any:
    """`function(refs, *arguments, **static)`, jitted if there are refs that are not traced already.

    Args:
        function: a function of a module, so that its compilation is found again.
        refs: pytree of refs and arrays.
        *arguments: pytrees of arrays.
        **static: hashable values.
    """
    if all(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(refs) if is_ref(leaf)):
        return function(refs, *arguments, **static)
    return _jitted(function, tuple(static))(refs, *arguments, **static)


@functools.cache
def _jitted(function: Callable[..., Any], static: tuple[str, ...]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames=static)
