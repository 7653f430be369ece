"""Which lowering of the primitives a computation gets."""

import contextlib
import os
import warnings
from collections.abc import Iterator

import jax

from embax._types import Device

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


def default_backend(device: Device | None = None) -> str:
    """The backend that lookups and updates on a device get: "native" or "portable".

    Args:
        device: None means the first device.

    Returns:
        What `use_backend` or `EMBAX_BACKEND` chose, where the device has it; else "native" on CPU, and "portable" elsewhere.

    Raises:
        ValueError: `EMBAX_BACKEND` is unknown.
    """
    one = jax.devices()[0] if device is None else device
    return chosen_backend() if one.platform == "cpu" else "portable"


class SlowPathWarning(UserWarning):
    """Something runs correctly, but by a slower way than there could be."""


_told: set[str] = set()


def warn_slow_path(message: str) -> None:
    """Warns, once for each message."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, SlowPathWarning, stacklevel=2)
