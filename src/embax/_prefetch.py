"""Packs the next batches in a thread while a step runs."""

import atexit
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

from embax._checks import positive_int

T = TypeVar("T")
U = TypeVar("U")

_EXIT_SECONDS = 5.0
"""How long the interpreter waits, as it ends, for threads that are working: many times as long as packing takes."""

_END: Any = object()
"""What follows the last result."""


class _Producer(threading.Thread):
    """Makes the results. It does not know the iterator that hands them out, so that this one can be dropped.

    The two talk through `queue.SimpleQueue` alone: its methods may be interrupted by a signal, or by a finalizer that calls
    them, at any place. Python's conditions and events may then be left locked.
    """

    def __init__(self, batches: Iterable[Any], pack: Callable[[Any], Any], size: int):
        # A daemon, since the interpreter would wait for any other before it runs what is registered for its exit.
        super().__init__(name="embax.prefetch", daemon=True)
        self._work: Any = (batches, pack)
        self._size = size
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.error: BaseException | None = None
        """What ended the results."""
        self.cleanup_error: BaseException | None = None
        """What a generator raised as it was closed, for `close`."""
        self.stopped, self.finished = False, False
        self.awaited = False
        """Whether `close` waits for this thread."""

    def ring(self) -> None:
        """Lets the thread look again whether there is room. A ring that it has not heard yet will do for this one."""
        if self._bell.empty():
            self._bell.put(None)

    def stop(self) -> None:
        """Ends the thread after the batch that it is at."""
        self.stopped = True
        self.ring()

    def run(self) -> None:
        """Makes results until the batches end, something raises, or the thread is stopped."""
        (batches, pack), self._work = self._work, None
        try:
            batches = iter(batches)
            self._produce(batches, pack)
        except BaseException as error:
            self.error = error
        try:
            if isinstance(batches, Generator):
                batches.close()
        except BaseException as error:
            if not self.awaited:
                raise  # Nobody would see it else but `threading.excepthook`.
            self.cleanup_error = error
        finally:
            self.finished = True
            self.results.put(_END)

    def _produce(self, batches: Iterator[Any], pack: Callable[[Any], Any]) -> None:
        while self._has_room():
            try:
                batch = next(batches)
            except StopIteration:
                return
            try:
                self.results.put(pack(batch))
            except StopIteration as error:
                # It would end the consumer's loop as if there were no more batches. Generators do the same (PEP 479).
                raise RuntimeError("prefetch: pack raised StopIteration") from error
            del batch  # What waits for room must not keep memory.

    def _has_room(self) -> bool:
        """Waits until a result may be made; False if the thread is to end."""
        while not self.stopped and self.results.qsize() >= self._size:
            self._bell.get()
        return not self.stopped


@atexit.register
def _stop_all() -> None:
    """Ends the threads before the interpreter does: one that is in native code of JAX then could end the process by a signal."""
    producers = [thread for thread in threading.enumerate() if isinstance(thread, _Producer)]
    for producer in producers:
        producer.stop()
    deadline = time.monotonic() + _EXIT_SECONDS
    for producer in producers:
        producer.join(max(0.0, deadline - time.monotonic()))


class PrefetchIterator(Iterator[U]):
    """What `embax.prefetch` returns: an iterator that can be closed, by hand or by `with`."""

    def __init__(self, batches: Iterable[Any], pack: Callable[[Any], U], size: int):
        self._producer = _Producer(batches, pack, size)
        weakref.finalize(self, self._producer.stop).atexit = False  # Then `_stop_all` does it.
        self._producer.start()

    def __next__(self) -> U:
        producer = self._producer
        if producer.finished and producer.results.empty():
            producer.results.put(_END)  # A call took it and was interrupted.
        try:
            result = producer.results.get()
        finally:
            producer.ring()
        if result is not _END and not producer.stopped:
            return result
        producer.results.put(_END)  # For the next call, and for another thread that waits.
        error, producer.error = producer.error, None
        if error is None or producer.stopped:
            raise StopIteration
        try:
            raise error
        finally:
            del error  # Its traceback holds this frame.

    def close(self) -> None:
        """Ends the thread and waits for it, until `pack` and the next batch that it may be at are done. May be called again.

        Results that wait are dropped, errors among them; a `next` that waits in another thread ends with StopIteration.

        Raises:
            BaseException: what a generator of batches raised as it was closed.
        """
        producer = self._producer
        producer.awaited = True
        producer.stop()
        producer.results.put(_END)
        if producer is threading.current_thread():
            return  # `pack` or the batches call it: the thread ends when they return.
        producer.join()
        with contextlib.suppress(queue.Empty):
            while True:
                producer.results.get_nowait()
        producer.results.put(_END)
        error, producer.error, producer.cleanup_error = producer.cleanup_error, None, None
        if error is not None:
            raise error

    def __enter__(self) -> "PrefetchIterator[U]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(batches: Iterable[T], pack: Callable[[T], U], *, size: int = 2) -> PrefetchIterator[U]:
    """`map(pack, batches)` in one background thread, up to `size` results ahead, so that packing overlaps with the step.

    The thread starts at once. It alone iterates over the batches and calls `pack`, in order; packing leaves the interpreter
    lock to others. What either of them raises is raised at its place in the order, after the results before it, with its
    traceback; after that the iterator is exhausted.

    Packed batches may be taken while earlier steps still run, and stay valid while limits grow: a batch has its layout
    with it, and its memory is not used again before the steps that read it have ended.

    Args:
        batches: any iterable. A generator is closed in the thread when the iterator is closed or dropped, or `pack` raises.
        pack: makes a result of a batch, and is called in the thread: `functools.partial(embax.preprocess, specs=specs)`; the
            `packer` of a layer, taken from it before; or a function that packs the ids and passes the rest of the batch on. It
            must not call the `preprocess` of an NNX layer, whose attributes are missing for moments while a step updates the
            model, nor what several processes do together: no `preprocess` of their layers, no `embax.place_batch`, and no
            packing of minibatches. The context managers of the calling thread, such as `jax.default_device`, are not in
            effect in it.
        size: results that may wait, that being made among them. More than 2 evens out batches that take different times.

    Returns:
        An iterator, which several threads may share. Leave its loop early by `with`, or call its `close()`, to wait for the
        thread; dropping the iterator ends the thread too, without waiting for it. As the interpreter ends it waits up to 5
        seconds for the batch that a thread is at.

    Raises:
        ValueError: the batches are not iterable, `pack` cannot be called, or `size` is not positive.

    Example:
        >>> pack = functools.partial(embax.preprocess, specs=specs, limits="grow")  # doctest: +SKIP
        >>> with embax.prefetch(batches, pack) as ahead:  # doctest: +SKIP
        ...     for packed in ahead:
        ...         variables = train_step(variables, packed)
    """
    if not (isinstance(batches, Iterable) or hasattr(type(batches), "__getitem__")):
        raise ValueError(
            f"prefetch: batches is a {type(batches).__name__}, which cannot be iterated over; pass a list, a generator or any "
            "other iterable of batches."
        )
    if not callable(pack):
        raise ValueError(
            f"prefetch: pack is a {type(pack).__name__}, which cannot be called; pass a function of one batch, such as "
            "functools.partial(embax.preprocess, specs=specs), or the packer of a layer."
        )
    return PrefetchIterator(batches, pack, positive_int("prefetch", "size", size))
