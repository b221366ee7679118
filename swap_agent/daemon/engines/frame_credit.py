"""How many frames an engine that is being swapped in may hold: it grows while others give theirs back."""

from __future__ import annotations

import threading
import time

from swap_agent.errors import OutOfDeviceMemory, PeerGone


class FrameCredit:
    """Of one swap-in, on each of its devices. Thread-safe: the agent's loop raises it, threads of ranks wait."""

    def __init__(self, epoch: int, frames: int, within_s: float) -> None:
        """It may hold `frames` now; all others have to come `within_s`."""
        self._within_s = within_s
        self._deadline_s = time.monotonic() + within_s
        self._epoch = epoch
        self._frames = frames
        self._closed = False
        self._changed = threading.Condition()

    def raise_to(self, epoch: int, frames: int) -> None:
        """From now on `frames` in all. Another epoch, that of an earlier swap-in, changes nothing."""
        with self._changed:
            if epoch == self._epoch:
                self._frames = max(self._frames, frames)
                self._changed.notify_all()

    def close(self) -> None:
        """The engine has ended: no rank waits any longer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def beyond(self, held: int) -> int:
        """Wait until a rank may hold more than the `held` frames that it has; how many more.

        Raises OutOfDeviceMemory when they do not come in time, PeerGone when the engine has ended.
        """
        with self._changed:
            left_s = self._deadline_s - time.monotonic()
            self._changed.wait_for(lambda: self._closed or self._frames > held, max(0.0, left_s))
            if self._closed:
                raise PeerGone("its engine has ended")
            if self._frames <= held:
                raise OutOfDeviceMemory(
                    f"frames that others were to give back did not come within {self._within_s:.0f} s"
                )
            return self._frames - held
