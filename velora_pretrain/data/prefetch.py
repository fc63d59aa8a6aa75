"""An iterator made ahead in a thread."""

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
CLOSE_SECONDS = 1.0


class Prefetcher(Generic[Item]):
    """An iterator's items, made ahead in a thread.

    The thread holds no reference to this object, so one that is forgotten stops its thread, as does the end of the
    program: a thread that is inside a file when the interpreter goes down would abort it.
    """

    def __init__(self, items: Iterator[Item], depth: int):
        self.wait_seconds = 0.0
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._over = False
        thread = threading.Thread(target=_fill, args=(items, self._ready, self._stop), name="data", daemon=True)
        thread.start()
        self._finalizer = weakref.finalize(self, _stop_thread, thread, self._ready, self._stop)

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        if self._over:
            raise StopIteration
        begun = time.perf_counter()
        item, fault = self._ready.get()
        self.wait_seconds += time.perf_counter() - begun
        if item is None:
            self._over = True
            self.close()
            raise fault or StopIteration
        return item

    def close(self) -> None:
        """Stop the thread; iteration ends."""
        self._over = True
        self._finalizer()


def _fill(items: Iterator[Any], ready: "queue.Queue[Any]", stop: threading.Event) -> None:
    fault: BaseException | None = None
    try:
        for item in items:
            if not _put(ready, (item, None), stop):
                break
    except BaseException as error:  # the consumer raises it, whatever it is
        fault = error
    _put(ready, (None, fault), stop)


def _put(ready: "queue.Queue[Any]", item: tuple[Any, Any], stop: threading.Event) -> bool:
    while not stop.is_set():
        with contextlib.suppress(queue.Full):
            ready.put(item, timeout=0.05)
            return True
    return False


def _stop_thread(thread: threading.Thread, ready: "queue.Queue[Any]", stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(queue.Empty):
        while True:
            ready.get_nowait()
    thread.join(CLOSE_SECONDS)
