"""Host memory in anonymous files: what simulated frames, mirrors and staging are made of."""

from __future__ import annotations

import os

from swap_agent.device import mmap
from swap_agent.device.api import Bytes
from swap_agent.errors import OutOfHostMemory


class MemfdBuffer:
    """A zeroed memfd of fixed size, mapped and populated: a copy to or from it takes no page fault.

    On `numa_node` where that is given and has room.

    Raises OutOfHostMemory when the machine has no memory left.
    """

    def __init__(self, name: str, size_bytes: int, numa_node: int | None = None) -> None:
        self.size_bytes = size_bytes
        self.address = 0
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, size_bytes)
            self.address = mmap.reserve(size_bytes)
            mmap.map_file(self.fd, self.address, size_bytes)
            if numa_node is not None:
                mmap.prefer_node(self.address, size_bytes, numa_node)
            mmap.populate(self.address, size_bytes)
        except OSError as error:
            if self.address:
                mmap.unmap(self.address, size_bytes)  # or what was populated so far would stay
            os.close(self.fd)
            raise OutOfHostMemory(f"the machine has no {size_bytes} bytes left for {name}: {error.strerror}") from error
        self.bytes: Bytes = mmap.bytes_at(self.address, size_bytes)
        self.resident_bytes = os.fstat(self.fd).st_blocks * 512
        """Memory behind the file, which stays until `close` (`st_blocks` is in units of 512)."""

    def close(self) -> None:
        """Drop the mapping and the descriptor; the memory is free once no other process maps it."""
        del self.bytes
        mmap.unmap(self.address, self.size_bytes)
        os.close(self.fd)
