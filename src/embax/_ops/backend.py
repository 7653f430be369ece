"""Which lowering of the primitives a computation gets."""

import contextlib
import os
from collections.abc import Iterator

import jax

BACKENDS = ("native", "portable")

# The choice is part of jit's cache key, so a jitted function is compiled anew under another choice.
_choice = jax.make_user_context(default_value=None)


def _checked(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} is {backend!r}; it must be one of {', '.join(map(repr, BACKENDS))}.")
    return backend


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Chooses the lowering of lookups and updates that are traced inside the `with` block.

    Args:
        backend: "native", C++ kernels on CPU (elsewhere there are none and the portable lowering is taken), or
            "portable", plain JAX operations on any platform.

    Raises:
        ValueError: the backend is unknown.

    Example:
        >>> with embax.use_backend("portable"):
        ...     activations = embax.lookup(packed, variables, specs=specs)
    """
    with _choice(_checked(backend, "backend")):
        yield


def chosen_backend() -> str:
    """The backend of the innermost `use_backend`, else of the environment variable `EMBAX_BACKEND`, else "native"."""
    return _choice.value or _checked(
        os.environ.get("EMBAX_BACKEND") or "native", "The environment variable EMBAX_BACKEND"
    )
