"""Moves a loaded model's tensors into the frames of a space, at addresses that stay.

Parameters never change after load and go to `weights`; buffers go to `state`. The unit is the storage, not the tensor:
tensors that share one (tied weights, views) share it afterwards, with their offsets and strides. Knows torch, not vLLM.
"""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from swap_agent.errors import Unsupported
from swap_agent.wire.regions import Extent, Region
from vllm_engine.rank.space import Space

ALIGNMENT_BYTES = 512
"""What torch's allocator aligns to on a GPU (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize); on a CPU it is 64."""

log = logging.getLogger(__name__)


@dataclass
class Layout:
    """Where each storage of a model goes. Holds the storages until `move`."""

    weights: list[Extent]
    state: list[Extent]
    storages: dict[Region, list[torch.UntypedStorage]]
    device: torch.device

    def size(self, region: Region) -> int:
        """Bytes of one region, up to the end of its last extent."""
        extents = self.extents(region)
        return extents[-1].offset + extents[-1].bytes if extents else 0

    def extents(self, region: Region) -> list[Extent]:
        """The extents of one region, by rising offset."""
        return {"weights": self.weights, "state": self.state}.get(region, [])


def plan(module: torch.nn.Module, device: torch.device) -> Layout:
    """Lay out every distinct storage behind the parameters and buffers of `module`, which computes on `device`.

    A storage that a parameter and a buffer share is state: it may change. Raises Unsupported for a tensor that is not
    in plain memory of the one device.
    """
    found: dict[int, tuple[Region, str, torch.Tensor]] = {}
    named: Iterable[tuple[Region, str, torch.Tensor]] = [
        *(("weights", name, tensor) for name, tensor in module.named_parameters()),
        *(("state", name, tensor) for name, tensor in module.named_buffers()),
    ]
    for region, name, tensor in named:
        if tensor.is_meta or tensor.numel() == 0:
            continue
        if tensor.device.type != device.type or tensor.layout != torch.strided:
            where = f"{tensor.layout} on {tensor.device}"
            raise Unsupported(f"{name} is {where}: only plain tensors on {device.type} can be swapped")
        key = tensor.untyped_storage().data_ptr()
        if key in found:
            _, first_name, first = found[key]
            found[key] = (region, first_name, first)
        else:
            found[key] = (region, name, tensor)

    layout = Layout([], [], {"weights": [], "state": []}, device)
    for region, name, tensor in found.values():
        storage = tensor.untyped_storage()
        offset = -(-layout.size(region) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        layout.extents(region).append(Extent(name, dtype, shape, stride, offset, storage.nbytes()))
        layout.storages[region].append(storage)
    return layout


def move(layout: Layout, space: Space, *, copy: bool = True) -> None:
    """Copy each storage of `layout` into its mapped region, point every tensor there, and free the originals.

    Without `copy` the bytes are there already.
    """
    homes: dict[int, torch.UntypedStorage] = {}
    originals: list[torch.UntypedStorage] = []
    for region, storages in layout.storages.items():
        for extent, storage in zip(layout.extents(region), storages, strict=True):
            home = storage_at(space.place(region, extent.offset, extent.bytes), extent.bytes, layout.device)
            if copy:
                home.copy_(storage)
            homes[storage.data_ptr()] = home
            originals.append(storage)
        storages.clear()
    for tensor in _tensors_over(homes, layout.device):
        home = homes[tensor.untyped_storage().data_ptr()]
        tensor.data = _view(home, tensor)
    # A name that refers to the last tensor or storage would keep it alive.
    tensor = storage = home = None
    gc.collect()
    kept = sum(original.nbytes() for original in originals if torch._C._storage_Use_Count(original._cdata) > 1)
    if kept:
        log.warning("%d bytes stay in private memory: something outside of Python still refers to them", kept)
    originals.clear()
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    release_freed_memory()


def storage_at(address: int, size: int, device: torch.device) -> torch.UntypedStorage:
    """A storage over mapped memory of `device`, which it does not own."""
    if device.type == "cpu":
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.as_tensor(_CudaMemory(address, size), device=device).untyped_storage()


class _CudaMemory:
    """What `torch.as_tensor` takes for a tensor of uint8 (CUDA Array Interface, version 3)."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3
        }  # fmt: skip


def release_freed_memory() -> None:
    """Return what was freed to the operating system, under glibc or tcmalloc."""
    gc.collect()
    libc = ctypes.CDLL(None)
    for function, argument in (("MallocExtension_ReleaseFreeMemory", None), ("malloc_trim", 0)):
        if hasattr(libc, function):
            getattr(libc, function)(*([] if argument is None else [argument]))


def _tensors_over(storages: dict[int, torch.UntypedStorage], device: torch.device) -> list[torch.Tensor]:
    """Every living Python tensor on one of `storages`, also those that a module keeps as plain attributes."""
    return [
        candidate
        for candidate in gc.get_objects()
        # type(), not isinstance(): the latter calls into lazy proxies of other libraries.
        if issubclass(type(candidate), torch.Tensor)
        and candidate.layout == torch.strided
        and candidate.device.type == device.type
        and candidate.numel() > 0
        and candidate.untyped_storage().data_ptr() in storages
    ]


def _view(storage: torch.UntypedStorage, like: torch.Tensor) -> Any:
    empty = torch.empty(0, dtype=like.dtype, device=storage.device)
    return empty.set_(storage, like.storage_offset(), like.shape, like.stride())
