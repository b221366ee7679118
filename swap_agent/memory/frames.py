"""The pool of a device's frames: which are free, which are granted, and the check that none is lost."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable

from swap_agent.errors import BooksDoNotBalance, OutOfFrames
from swap_agent.memory.device import DeviceMemory, Frame


class FramePool:
    """All frames of one device. Thread-safe; every method leaves free + granted == total.

    A returned frame is kept for the next holder (already created, already populated). Its bytes are the last holder's
    until they are overwritten or zeroed: `Grant` says which frames are dirty.
    """

    def __init__(self, device: DeviceMemory, *, poison: bool = False) -> None:
        self.device = device
        self._poison = poison
        self._lock = threading.Lock()
        self._dirty: list[Frame] = []
        self._granted: dict[Frame, str] = {}
        self._held: Counter[str] = Counter()

    @property
    def granted_frames(self) -> int:
        """Frames that some holder has."""
        return len(self._granted)

    @property
    def free_frames(self) -> int:
        """Frames that could be granted now, created or not."""
        return self.device.total_frames - len(self._granted)

    def held_by(self, holder: str) -> int:
        """Frames granted to `holder`."""
        return self._held[holder]

    def grant(self, holder: str, count: int) -> tuple[list[Frame], int]:
        """`count` frames for `holder`, and how many of them, at the front of the list, are dirty.

        All or none. Raises OutOfFrames.
        """
        with self._lock:
            if count > self.free_frames:
                raise OutOfFrames(f"{self.device.name} has {self.free_frames} free frames, {holder} needs {count}")
            recycled = [self._dirty.pop() for _ in range(min(count, len(self._dirty)))]
            frames = list(recycled)
            try:
                while len(frames) < count:
                    frames.append(self.device.create())
            except BaseException:
                self._dirty.extend(frames)
                raise
            self._granted.update(dict.fromkeys(frames, holder))
            self._held[holder] += len(frames)
        return frames, len(recycled)

    def give_back(self, holder: str, frames: Iterable[Frame], *, recycle: bool = True) -> None:
        """Take frames back that nobody maps any more. Frames of a killed process are not recycled but released.

        Raises BooksDoNotBalance for a frame that `holder` does not hold; then nothing changes.
        """
        frames = list(frames)
        with self._lock:
            if len(set(frames)) != len(frames):
                raise BooksDoNotBalance(f"{holder} gives back a frame of {self.device.name} twice")
            for frame in frames:
                if self._granted.get(frame) != holder:
                    raise BooksDoNotBalance(f"{holder} gives back a frame of {self.device.name} that it does not hold")
            if self._poison and recycle:
                with self.device.transfer("swap_out") as transfer:
                    for frame in frames:
                        transfer.fill(frame, 0xFF)  # who reads it unfilled computes NaN, not a plausible answer
            self._held[holder] -= len(frames)
            for frame in frames:
                del self._granted[frame]
            if recycle:
                self._dirty.extend(frames)
            else:
                self._destroy(frames)

    def trim(self) -> int:
        """Release every free frame to the driver or the operating system; returns how many there were."""
        with self._lock:
            released, self._dirty = self._dirty, []
            self._destroy(released)
        return len(released)

    def _destroy(self, frames: list[Frame]) -> None:
        """Every one of them; then raises the first error. A frame that cannot be destroyed is the device's loss."""
        errors = []
        for frame in frames:
            try:
                self.device.destroy(frame)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Let go of the device; nothing is granted or taken back after this."""
        self.device.close()
