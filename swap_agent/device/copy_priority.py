"""Urgent copies, for which a swap waits, go before background ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Counts the urgent transfers of a device; the others let them pass, chunk by chunk."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._urgent = 0

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """While one of these runs, no background transfer starts another chunk."""
        with self._changed:
            self._urgent += 1
        try:
            yield
        finally:
            with self._changed:
                self._urgent -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """Before a background chunk: return when nothing urgent runs."""
        with self._changed:
            self._changed.wait_for(lambda: self._urgent == 0)
