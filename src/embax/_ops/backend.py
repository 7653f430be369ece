"""Which lowering of the primitives a computation gets."""

import contextlib
import os
from collections.abc import Iterator

import jax

from embax._types import Device

BACKENDS = ("native", "portable", "sparsecore")

OF_PLATFORM = {"cpu": "native", "tpu": "sparsecore"}
"""The lowering that a platform has beside the portable one."""

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
        backend: "native", C++ kernels on CPU; "sparsecore", the SparseCores of a TPU; or "portable", plain JAX operations on
            any platform, which is also taken where the platform does not have the other two.

    Raises:
        ValueError: the backend is unknown.

    Example:
        >>> with embax.use_backend("portable"):
        ...     activations = embax.lookup(packed, variables, specs=specs)
    """
    with _choice(_checked(backend, "backend")):
        yield


def chosen_backend() -> str | None:
    """The backend of the innermost `use_backend`, else of the environment variable `EMBAX_BACKEND`, else None."""
    if _choice.value:
        return _choice.value
    named = os.environ.get("EMBAX_BACKEND")
    return _checked(named, "The environment variable EMBAX_BACKEND") if named else None


def backend_on(platform: str, choice: str | None) -> str:
    """The lowering that a choice means on a platform; None chooses the platform's own."""
    own = OF_PLATFORM.get(platform, "portable")
    return own if choice in (None, own) else "portable"


def default_backend(device: Device | None = None) -> str:
    """The backend that lookups and updates on a device get: "native", "sparsecore" or "portable".

    Args:
        device: None means the first device.

    Returns:
        Where nothing was chosen "native" on CPU, "sparsecore" on TPU, and "portable" elsewhere; else what `use_backend` or
        `EMBAX_BACKEND` chose, or "portable" where the device does not have that.

    Raises:
        ValueError: `EMBAX_BACKEND` is unknown, or `device` is no device.
    """
    one = jax.devices()[0] if device is None else device
    if not hasattr(one, "platform"):
        raise ValueError(f"default_backend: the device is {device!r}; it must be one of jax.devices(), or None.")
    return backend_on(one.platform, chosen_backend())
