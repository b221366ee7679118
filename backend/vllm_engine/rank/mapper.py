"""How one process maps granted frames: with mmap on a simulated device, with CUDA's driver on a GPU.

Knows neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from swap_agent.device import mmap
from swap_agent.device.cuda_driver import Context, call


class Mapper(Protocol):
    """Maps frames at ranges of addresses of one device."""

    def reserve(self, size_bytes: int) -> int:
        """Addresses with nothing behind them: any access faults. Raises OSError."""

    def map(self, address: int, fds: list[int], frame_bytes: int, *, touch: bool) -> None:
        """Put frames at `address`, one behind the other; the caller still owns the descriptors. Raises OSError.

        `touch`: have their pages mapped now rather than at their first use, where there is a difference.
        """

    def vacate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """When nothing runs on these any more (address and size), take away what is mapped in them. Raises OSError."""


class HostMapper:
    """Frames are memfds; see `swap_agent.device.mmap`."""

    def reserve(self, size_bytes: int) -> int:
        """A PROT_NONE range."""
        return mmap.reserve(size_bytes)

    def map(self, address: int, fds: list[int], frame_bytes: int, *, touch: bool) -> None:
        """Map each file, shared."""
        for position, fd in enumerate(fds):
            mmap.map_file(fd, address + position * frame_bytes, frame_bytes)
        if touch:
            mmap.touch(address, len(fds) * frame_bytes)

    def vacate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """PROT_NONE again, whatever was mapped; nothing runs beside the caller."""
        for address, size_bytes in ranges:
            mmap.vacate(address, size_bytes)


class CudaMapper:
    """Frames are allocations of the agent's; a mapping is the only reference to them that this process keeps."""

    def __init__(self, ordinal: int) -> None:
        """The GPU that this process calls `ordinal`. Raises Unsupported, CudaError."""
        self._context = Context(ordinal)
        self._mapped: dict[int, int] = {}
        """Address and size of each mapping: CUDA unmaps exactly what was mapped."""

    def reserve(self, size_bytes: int) -> int:
        """Addresses of the GPU; none for an empty range."""
        self._context.use()
        return self._context.reserve(size_bytes) if size_bytes else 0

    def map(self, address: int, fds: list[int], frame_bytes: int, *, touch: bool) -> None:
        """Import, map and release each handle; one call gives access to all. Pages always exist."""
        self._context.use()
        for position, fd in enumerate(fds):
            handle = call("cuMemImportFromShareableHandle", fd, self._context.handle_type)
            try:
                start = address + position * frame_bytes
                self._context.map(start, frame_bytes, handle)
                self._mapped[start] = frame_bytes
            finally:
                call("cuMemRelease", handle)
        if fds:
            self._context.allow(address, len(fds) * frame_bytes)

    def vacate(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Wait once until the GPU is idle, then unmap frame by frame."""
        if not ranges:
            return
        self._context.use()
        call("cuCtxSynchronize")
        for address, size_bytes in ranges:
            for start in sorted(start for start in self._mapped if address <= start < address + size_bytes):
                self._context.unmap(start, self._mapped[start])
                del self._mapped[start]
