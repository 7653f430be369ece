"""What the processes of `jax.distributed` tell each other outside of steps, so that an error of one is an error of all."""

import contextlib
import dataclasses
import enum
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from embax._types import Device

_WORDS = 8
"""uint32 words that a process says at a time. All calls have one shape, so that those that should not meet are found out."""


class Action(enum.Enum):
    """What processes do together."""

    REDUCE = "agree on minibatches"
    PLACE = "pack a batch"
    SAVE = "save a checkpoint"
    LOAD = "load a checkpoint"


@dataclasses.dataclass(frozen=True)
class Alike:
    """What must be the same on all processes.

    Args:
        name: of what it belongs to, such as "batches".
        digest: 16 bytes of it.
        describe: makes what it is the digest of, by names.
        remedy: what to do if it differs.
    """

    name: str
    digest: bytes
    describe: Callable[[], Mapping[str, Any]]
    remedy: str


class OutOfStepError(RuntimeError):
    """The processes do different things. All of them get it, and need not be told."""


@functools.lru_cache(maxsize=64)
def _gathering(devices: tuple[Device, ...]):
    mesh = jax.sharding.Mesh(np.array(devices), "processes")
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    gather = jax.jit(lambda rows: rows, out_shardings=everywhere)
    return gather, jax.sharding.NamedSharding(mesh, jax.P("processes"))


@dataclasses.dataclass(frozen=True)
class Processes:
    """Some processes, this one among them, by one device of each.

    All must call the methods in the same order among each other and among their jitted steps, from the main thread.
    """

    devices: tuple[Device, ...]

    @classmethod
    def of(cls, devices: Iterable[Device]) -> "Processes":
        """Those that have these devices."""
        first = {}
        for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
            first.setdefault(device.process_index, device)
        return cls(tuple(first.values()))

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return len(self.devices) == 1

    @property
    def is_first(self) -> bool:
        """Whether this process does what only one may."""
        return self.devices[0].process_index == jax.process_index()

    def _gather(self, row: np.ndarray) -> np.ndarray:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"Thread {threading.current_thread().name!r} would run a collective operation. Processes must run these in one "
                "order, so only the main thread may."
            )
        gather, sharding = _gathering(self.devices)
        rows = jax.make_array_from_process_local_data(sharding, row[None], (len(self.devices), *row.shape))
        try:
            return np.asarray(gather(rows).addressable_data(0))
        except Exception as error:
            raise RuntimeError(
                f"Another process has died or does not answer ({error}). End all of them, and start again from the last "
                "checkpoint."
            ) from error

    def gather(self, action: Action, words: Sequence[int]) -> np.ndarray:
        """uint32[processes, 7]: what each process says, up to 7 words.

        Raises:
            OutOfStepError: on all of them, some do something else.
        """
        actions = list(Action)
        row = np.zeros(_WORDS, np.uint32)
        row[0] = actions.index(action)
        row[1 : 1 + len(words)] = words
        if self.alone:
            return row[None, 1:]
        rows = self._gather(row)
        if (rows[:, 0] != row[0]).any():
            done = [actions[number].value for number in rows[:, 0].tolist()]
            raise OutOfStepError(
                f"The processes are out of step: {self._by_process(done)}. All must make the same calls in the same order."
            )
        return rows[:, 1:]

    def texts(self, text: str) -> list[str]:
        """A text of every process. All must call it."""
        raw = text.encode()
        length = int(self._gather(np.array([len(raw)], np.uint32)).max())
        padded = np.zeros(1 << max(length, 64).bit_length(), np.uint8)
        padded[: len(raw)] = np.frombuffer(raw, np.uint8)
        return [row.tobytes().rstrip(b"\0").decode() for row in self._gather(padded)]

    def agree(
        self,
        action: Action,
        error: Exception | None,
        alike: Alike | None = None,
        same_kinds: tuple[type[Exception], ...] = (),
    ) -> None:
        """Returns if no process has an error, and what must be alike is.

        Args:
            action: what they do.
            error: why this process cannot.
            alike: what must be the same; may be left out where there is an error.
            same_kinds: errors that the other processes raise as well; of others they raise a RuntimeError.

        Raises:
            Exception: this process has one.
            RuntimeError: another one has; with its text.
            ValueError: something is not alike; with its name.
            OutOfStepError: on all of them, some do something else.
        """
        if self.alone:
            if error is not None:
                raise error
            return
        if isinstance(error, OutOfStepError):
            raise error
        words = () if error is not None or alike is None else np.frombuffer(alike.digest, np.uint32)
        said = self.gather(action, [error is not None, *words])
        if said[:, 0].any():
            texts = self.texts("" if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
            number = int(said[:, 0].argmax())
            kind, _, text = texts[number].partition(": ")
            kinds: dict[str, Any] = {one.__name__: one for one in same_kinds}
            where = f"Process {self.devices[number].process_index} could not {action.value}"
            raise kinds.get(kind, RuntimeError)(f"{where}: {kind}: {text}")
        if alike is not None and (said != said[0]).any():
            raise ValueError(self._difference(alike, self.texts(_lines(alike.describe()))))

    def _difference(self, alike: Alike, texts: list[str]) -> str:
        described = [dict(line.split("\t") for line in text.splitlines()) for text in texts]
        names = list(dict.fromkeys(name for one in described for name in one))
        name, values = "content", texts
        for name in names:
            values = [one.get(name, "none") for one in described]
            if len(set(values)) > 1:
                break
        return (
            f"The {alike.name} of the processes differ in the {name}: {self._by_process(values)}. All must be alike. "
            f"{alike.remedy}"
        )

    def _by_process(self, values: Sequence[str]) -> str:
        numbers: dict[str, list[str]] = {}
        for device, value in zip(self.devices, values, strict=True):
            numbers.setdefault(value, []).append(str(device.process_index))
        return "; ".join(f"{value} on process {', '.join(some)}" for value, some in numbers.items())

    @contextlib.contextmanager
    def together(self, action: Action, same_kinds: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """What the block raises on one process is raised on all. No other collective may be in it."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.agree(action, error, same_kinds=same_kinds)


def _lines(described: Mapping[str, Any]) -> str:
    return "\n".join(f"{_one_line(name)}\t{_one_line(value)}" for name, value in described.items())


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


@functools.cache
def all_processes() -> Processes:
    """All processes of `jax.distributed`."""
    return Processes.of(jax.devices())
