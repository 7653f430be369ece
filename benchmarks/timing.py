"""Clocks, turns, and the machine."""

import os
import pathlib
import platform
import time
from collections.abc import Callable

import jax

from embax import _native


def milliseconds(call: Callable[[int], object], number: int) -> float:
    """Wall time of `call(number)`."""
    start = time.perf_counter()
    call(number)
    return (time.perf_counter() - start) * 1e3


def alternate(calls: dict[str, Callable[[int], object]], rounds: int) -> dict[str, list[float]]:
    """Times of each call, which take turns and are given the number of the round.

    Every turn begins with a call that is not timed: it meets the memory that the other side is still giving back.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            call(number)
            times[name].append(milliseconds(call, number))
    return times


def machine() -> str:
    """One line about what was measured on."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return (
        f"{model}, {os.cpu_count()} cores, {_native.simd()}; Python {platform.python_version()}, jax {jax.__version__}"
    )
