"""`Writer`: a thread that writes, so that an answer need not wait for a disk."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable


class Writer:
    """Runs jobs one after another on a thread of its own. `limit`: bytes that waiting jobs may hold; a single job may
    hold more. `closed_at`: when `close` was called, as time.monotonic() has it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._jobs: deque[tuple[int, Callable[[], None]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.closed_at = math.inf

    def add(self, nbytes: int, job: Callable[[], None]) -> bool:
        """Queue a job that holds so many bytes; False if there is no room for it, or after `close`."""
        with self._changed:
            if self._closed or (self.nbytes and self.nbytes + nbytes > self.limit):
                return False
            self._jobs.append((nbytes, job))
            self.nbytes += nbytes
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="moelocal snapshots", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                nbytes, job = self._jobs[0]
            try:
                job()
            finally:
                del job
                with self._changed:
                    self._jobs.popleft()
                    self.nbytes -= nbytes
                    self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all jobs are done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs)

    def close(self) -> None:
        """Wait until all jobs are done, and end the thread."""
        with self._changed:
            self._closed = True
            self.closed_at = time.monotonic()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
