"""The pool of a device's frames: which are free, which are granted, and the check that none is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable

from swap_agent.device.api import BUSY_S, DeviceMemory, Frame
from swap_agent.errors import AccountingError, OutOfDeviceMemory

_CLEANED_AT_ONCE = 4
"""A grant that needs one of these frames waits for all four: less than a millisecond."""
_RETRY_S = 0.02
"""How soon a device is asked again that refuses memory which the pool counts as free."""

log = logging.getLogger(__name__)


class FramePool:
    """All frames of one device. Thread-safe; every method leaves free + granted == total.

    A returned frame is kept for the next holder (already created, already populated). It is dirty: its bytes are the
    last holder's until they are overwritten or zeroed. As many as a swap-in has wanted to be zero are zeroed while they
    are free (`start_cleaning`); cleaning gives way to copies for a swap.
    """

    def __init__(self, device: DeviceMemory, *, poison: bool = False, busy_s: float = BUSY_S) -> None:
        """`busy_s`: how long memory of a killed process may be in use that the pool counts as free.

        `poison`, for tests: a frame that is not said to be zero is 0xFF, not what its last holder left."""
        self.device = device
        self.busy_s = busy_s
        self._poison = poison
        self._changed = threading.Condition()
        self._dirty: deque[Frame] = deque()
        self._clean: deque[Frame] = deque()
        self._cleaning = 0
        self._clean_wanted = 0
        """The most frames of one swap-in that had to be zero."""
        self._granted: dict[Frame, str] = {}
        self._held: Counter[str] = Counter()
        self._busy_until_s = 0.0
        """Until then memory of a killed process may be in use that the pool counts as free."""
        self._cleaner: threading.Thread | None = None
        self._closing = False

    @property
    def granted_frames(self) -> int:
        """Frames that some holder has."""
        return len(self._granted)

    @property
    def free_frames(self) -> int:
        """Frames that could be granted now, created or not."""
        return self.device.total_frames - len(self._granted)

    @property
    def clean_frames(self) -> int:
        """Free frames that are zero already."""
        return len(self._clean)

    def held_by(self, holder: str) -> int:
        """Frames granted to `holder`."""
        return self._held[holder]

    def grant(self, holder: str, count: int, zeroed: int | None = None) -> tuple[list[Frame], int]:
        """`count` frames for `holder`, the dirty ones first, and the number of dirty ones; the rest is zero.

        All or none. `zeroed`: how many, at the end of the list, have to be zero; the holder overwrites the others.
        None, for an engine that starts: all. Raises OutOfDeviceMemory; after a process was killed up to `busy_s` late,
        since the device may say that it is full while it clears away: not for a thread that must not block.
        """
        overwritten = 0 if zeroed is None else count - zeroed
        asked = 0
        with self._changed:
            while True:
                if count > self.free_frames:
                    raise OutOfDeviceMemory(
                        f"{self.device.name} has {self.free_frames} free frames, {holder} needs {count}"
                    )
                self._clean_wanted = max(self._clean_wanted, zeroed or 0)
                self._changed.wait_for(lambda: not self._cleaning or len(self._dirty) + len(self._clean) >= count)
                try:
                    dirty, clean = self._take_or_create(count, overwritten)
                    break
                except OutOfDeviceMemory as error:
                    if self._closing or time.monotonic() >= self._busy_until_s:
                        raise
                    asked += 1
                    if asked == 1:
                        log.info("%s: %s waits for memory of a killed process: %s", self.device.name, holder, error)
                    self._changed.wait(_RETRY_S)  # others give back and are granted meanwhile
            frames = dirty + clean
            self._granted.update(dict.fromkeys(frames, holder))
            self._held[holder] += len(frames)
        return frames, len(dirty)

    def _take_or_create(self, count: int, overwritten: int) -> tuple[list[Frame], list[Frame]]:
        """Dirty frames, as many as are overwritten where there are, and clean ones. What it cannot use is put back."""
        dirty = _take(self._dirty, overwritten)
        clean = _take(self._clean, count - len(dirty))
        dirty += _take(self._dirty, count - len(dirty) - len(clean))
        try:
            while len(dirty) + len(clean) < count:
                clean.append(self.device.create())
            if self._poison and len(dirty) < overwritten:
                spoilt = [clean.pop() for _ in range(overwritten - len(dirty))]
                dirty += spoilt
                self._spoil(spoilt)
        except BaseException:
            self._dirty.extend(dirty)
            self._clean.extend(clean)
            raise
        return dirty, clean

    def return_frames(self, holder: str, frames: Iterable[Frame], *, recycle: bool = True) -> None:
        """Take back frames that no process maps any more. Frames of a killed process are not recycled but released.

        Raises AccountingError for a frame that `holder` does not hold; then nothing changes.
        """
        frames = list(frames)
        with self._changed:
            if len(set(frames)) != len(frames):
                raise AccountingError(f"{holder} gives back a frame of {self.device.name} twice")
            for frame in frames:
                if self._granted.get(frame) != holder:
                    raise AccountingError(f"{holder} gives back a frame of {self.device.name} that it does not hold")
            if self._poison and recycle:
                self._spoil(frames)
            self._held[holder] -= len(frames)
            for frame in frames:
                del self._granted[frame]
            if recycle:
                self._dirty.extend(frames)
                self._changed.notify_all()
            elif frames:
                try:
                    self._destroy(frames, killed=True)
                finally:
                    self._busy_until_s = time.monotonic() + self.busy_s

    def _spoil(self, frames: list[Frame]) -> None:
        with self.device.transfer("swap_out") as transfer:
            for frame in frames:
                transfer.fill(frame, 0xFF)  # an engine that reads it unfilled computes NaN, not a plausible answer

    def trim(self) -> int:
        """Release every free frame to the driver or the operating system; returns how many there were."""
        with self._changed:
            self._changed.wait_for(lambda: not self._cleaning)
            released = [*_take(self._dirty, len(self._dirty)), *_take(self._clean, len(self._clean))]
            self._destroy(released)
        return len(released)

    def _destroy(self, frames: list[Frame], *, killed: bool = False) -> None:
        """Destroy every frame, then raise the first error. A frame that cannot be destroyed is lost to the device."""
        errors = []
        for frame in frames:
            try:
                self.device.destroy(frame, killed=killed)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def start_cleaning(self) -> None:
        """From now until `close`, a thread zeroes free frames before a grant wants zeroed ones."""
        self._cleaner = threading.Thread(target=self._clean_on, name=f"cleaning {self.device.name}", daemon=True)
        self._cleaner.start()

    def _clean_on(self) -> None:
        try:
            while self._wait_for_dirt():
                self.clean()
        except OSError:
            log.exception("%s: from now on frames are zeroed when they are needed, not before", self.device.name)

    def _wait_for_dirt(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or (self._dirty and len(self._clean) < self._clean_wanted))
            return not self._closing

    def clean(self) -> int:
        """Zero a few dirty frames, unless as many are as a swap-in has wanted; returns how many. Raises OSError."""
        with self._changed:
            frames = _take(self._dirty, min(_CLEANED_AT_ONCE, self._clean_wanted - len(self._clean)))
            self._cleaning += len(frames)
        now = self._dirty
        try:
            with self.device.transfer("clean") as transfer:
                for frame in frames:
                    transfer.fill(frame, 0)
            now = self._clean
        finally:
            with self._changed:
                now.extend(frames)
                self._cleaning -= len(frames)
                self._changed.notify_all()
        return len(frames)

    def close(self) -> None:
        """Let go of the device; nothing is granted or taken back after this."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._cleaner:
            self._cleaner.join()
        self.device.close()


def _take(frames: deque[Frame], most: int) -> list[Frame]:
    """Up to `most` frames, the last ones first: they may be in a cache still."""
    return [frames.pop() for _ in range(min(most, len(frames)))]
