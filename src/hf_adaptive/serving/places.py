"""How many rows may be in an engine at a time."""

import queue
import threading


class Places:
    """A semaphore without Python's overhead for who need not wait: one is taken, and freed, for every row.

    Args:
        count (`float`): How many there are.
    """

    def __init__(self, count: float):
        self._unused = count
        self._lock = threading.Lock()
        self._freed: queue.SimpleQueue[None] = queue.SimpleQueue()

    def take(self, may_wait: bool) -> bool:
        """Whether there was a place, or has become one while waiting."""
        try:
            self._freed.get_nowait()
            return True
        except queue.Empty:
            pass
        with self._lock:
            if self._unused >= 1:
                self._unused -= 1
                return True
        if may_wait:
            self._freed.get()
        return may_wait

    def free(self) -> None:
        """Gives a place back."""
        self._freed.put(None)
