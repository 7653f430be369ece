"""The warnings of embax."""

import warnings

_told: set[str] = set()


class SlowPathWarning(UserWarning):
    """Something runs correctly, but by a slower way than there could be."""


def warn_slow_path(message: str) -> None:
    """Warns, once for each message; where warnings are errors, every time."""
    if message not in _told:
        warnings.warn(message, SlowPathWarning, stacklevel=3)
        _told.add(message)
