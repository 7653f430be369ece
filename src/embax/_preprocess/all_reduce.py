"""How hosts agree, while they pack, on what all of them must do alike."""

import abc
import contextlib
import functools
import itertools
import operator
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from embax._checks import positive_int
from embax._processes import Action, OutOfStepError, all_processes


def _unsigned(owner: str, what: str, value: Any, bits: int) -> int:
    """`value` as an int in `[0, 2**bits)`."""
    with contextlib.suppress(TypeError):
        number = operator.index(value)
        if 0 <= number < 2**bits:
            return number
    raise ValueError(f"{owner}: {what} is {value!r}; it must be an integer from 0 to 2**{bits} - 1.")


class AllReduceInterface(abc.ABC):
    """Combines a value of every host, so that all make the same decision: here, how a batch is cut into minibatches."""

    @abc.abstractmethod
    def bitwise_or(self, key: int, value: int) -> int:
        """The bitwise or of a value of every host. Every host calls it once with each key; it returns when all have.

        Args:
            key: names the decision, the same on all hosts; from 0 to `2**63 - 1`.
            value: from 0 to `2**64 - 1`.

        Returns:
            The same value on all hosts.
        """

    def next_batch_number(self) -> int:
        """The number of the next batch that this host packs with it: 0, 1, 2, ... All must pack their batches in one order."""
        return next(self._batch_numbers)

    @functools.cached_property
    def _batch_numbers(self) -> Iterator[int]:
        return itertools.count()


class _Round:
    """One key that is being reduced: what has been given, and at the end the result, or what went wrong."""

    def __init__(self) -> None:
        self.values: dict[int, int] = {}
        self.result = 0
        self.finished = False
        self.failure: tuple[type[Exception], str] | None = None
        self.told: set[int] = set()
        """Hosts that the failure has been raised in; when it has in all, nothing needs to remember it."""


class ThreadAllReduce:
    """An all-reduce over hosts that are threads of one process: for tests, and for packing as several hosts would.

    Several keys may be under way at a time, and in a different order on each host. What is known of a key is forgotten when
    all hosts have their result, so a key may then be used again.

    Args:
        num_hosts: hosts that take part.
        timeout_s: seconds that a host waits for the others before all of them get an error.

    Raises:
        ValueError: `num_hosts` or `timeout_s` is not positive.

    Example:
        >>> hosts = embax.ThreadAllReduce(2)
        >>> with concurrent.futures.ThreadPoolExecutor() as pool:  # doctest: +SKIP
        ...     list(pool.map(lambda host: hosts.member(host).bitwise_or(0, 1 << host), range(2)))
        [3, 3]
    """

    def __init__(self, num_hosts: int, timeout_s: float = 60.0):
        self._num_hosts = positive_int("ThreadAllReduce", "num_hosts", num_hosts)
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ValueError(
                f"ThreadAllReduce: timeout_s is {timeout_s!r}; it must be positive, and at most {threading.TIMEOUT_MAX:.0f}."
            )
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._rounds: dict[int, _Round] = {}

    def member(self, host: int) -> AllReduceInterface:
        """The interface of one host.

        Args:
            host: its number, from 0 to `num_hosts - 1`.

        Raises:
            ValueError: there is no such host.
        """
        if isinstance(host, bool) or not isinstance(host, int) or not 0 <= host < self._num_hosts:
            raise ValueError(f"ThreadAllReduce: host is {host!r}; it must be from 0 to {self._num_hosts - 1}.")
        return _Member(self, host)

    def _bitwise_or(self, host: int, key: int, value: int) -> int:
        key = _unsigned("ThreadAllReduce", "key", key, 63)
        value = _unsigned("ThreadAllReduce", "value", value, 64)
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            state = self._rounds.setdefault(key, _Round())
            if state.failure is None:
                self._join(state, host, key, value)
            while not state.finished and state.failure is None:
                left = deadline - time.monotonic()
                if left <= 0:
                    missing = sorted(set(range(self._num_hosts)) - set(state.values))
                    self._fail(
                        state,
                        TimeoutError,
                        f"All-reduce of key {key}: hosts {missing} of {self._num_hosts} did not call it within "
                        f"{self._timeout_s} s. Every host must reduce every key, that is, pack the same batches: see whether "
                        "these have failed, or raise timeout_s of ThreadAllReduce.",
                    )
                else:
                    self._changed.wait(left)
            if state.failure is not None:
                state.told.add(host)
                if len(state.told) == self._num_hosts and self._rounds.get(key) is state:
                    del self._rounds[key]
                kind, message = state.failure
                raise kind(message)  # One of its own in each thread, since a traceback belongs to one.
            return state.result

    def _join(self, state: _Round, host: int, key: int, value: int) -> None:
        if host in state.values:
            self._fail(
                state,
                ValueError,
                f"All-reduce of key {key}: host {host} called it twice, before hosts "
                f"{sorted(set(range(self._num_hosts)) - set(state.values))} called it once. Every host must reduce every key "
                "once: number the batches differently, and give each host the interface of its own number.",
            )
            return
        state.values[host] = value
        if len(state.values) == self._num_hosts:
            state.result = functools.reduce(operator.or_, state.values.values())
            state.finished = True
            del self._rounds[key]  # Whoever waits for it holds it.
            self._changed.notify_all()

    def _fail(self, state: _Round, kind: type[Exception], message: str) -> None:
        state.failure = (kind, message)
        self._changed.notify_all()


class _Member(AllReduceInterface):
    """The interface of one host of a `ThreadAllReduce`."""

    def __init__(self, hosts: ThreadAllReduce, host: int):
        self._hosts = hosts
        self._host = host

    def bitwise_or(self, key: int, value: int) -> int:
        """See `AllReduceInterface`.

        Raises:
            ValueError: the key or the value is out of range, or a host called twice with this key.
            TimeoutError: not all hosts have called in time. These errors reach all hosts that wait for the key, or still
                come to it.
        """
        return self._hosts._bitwise_or(self._host, key, value)


class DistributedAllReduce(AllReduceInterface):
    """An all-reduce over the processes of `jax.distributed`, by JAX's own collectives; alone, a process gets its own value.

    Collectives run in the order in which a process dispatches them. So all processes must call it in the same order among
    each other and among their jitted steps, which only the main thread can promise: pack there when hosts must agree, not
    in a prefetching thread. A process that does not call leaves the others waiting, until `jax.distributed` notices that it
    has died. All of them are equal, and count batches together.
    """

    _count = itertools.count()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DistributedAllReduce)

    def __hash__(self) -> int:
        return hash(DistributedAllReduce)

    def next_batch_number(self) -> int:
        """See `AllReduceInterface`."""
        return next(DistributedAllReduce._count)

    def bitwise_or(self, key: int, value: int) -> int:
        """See `AllReduceInterface`.

        Raises:
            ValueError: the key or the value is out of range.
            RuntimeError: it was called from another thread than the main one, or, on all processes, their keys differ or some do
                something else.
        """
        key = _unsigned("DistributedAllReduce", "key", key, 63)
        value = _unsigned("DistributedAllReduce", "value", value, 64)
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                f"DistributedAllReduce was called with key {key} in thread {threading.current_thread().name!r}. Processes must "
                "run their collectives in one order, so only the main thread may: pack there, or pack ahead in threads only "
                "without minibatching."
            )
        # Asking for the number of processes starts JAX's backends, so ask only where there can be several.
        if not jax.distributed.is_initialized():
            return value
        # In halves, since JAX cuts 64-bit integers unless told not to.
        mine = np.array([key, value], np.uint64).view(np.uint32)
        words = all_processes().gather(Action.REDUCE, mine.tolist())[:, :4]
        every = np.ascontiguousarray(words).view(np.uint64)
        keys, values = every[:, 0].tolist(), every[:, 1]
        if len(set(keys)) > 1:
            raise OutOfStepError(
                f"The processes reduce different keys: {dict(enumerate(keys))} by process. All must pack the same batches in "
                "the same order; start them from the same batch number."
            )
        return int(np.bitwise_or.reduce(values))
