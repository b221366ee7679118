"""Steps of first.py that need torch: tensors, CUDA graphs and the end of a process over frames of the agent's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from first_gpu import FRAME, create_frames, grant, open_gpu
from first_request import Request

from swap_agent.device.cuda_driver import Context, call
from vllm_engine.adapter.scratch import Scratch
from vllm_engine.rank import relocate
from vllm_engine.rank.mapper import CudaMapper

EXIT = Path(__file__).with_name("first_torch_exit.py")


def torch_storage(request: Request) -> dict[str, Any]:
    """Parameters and buffers in frames: do they stay where they are, and go on working with other frames?"""
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    device = torch.device("cuda:0")
    context = open_gpu()
    size = 2 * FRAME
    mapper = CudaMapper(0)
    address = mapper.reserve(size)
    first = create_frames(context, 2)
    grant(context, mapper, address, first)
    storage = relocate.storage_at(address, size, device)
    parameter = torch.nn.Parameter(torch.randn(1024, 1024, device="cuda", dtype=torch.bfloat16), requires_grad=False)
    rows = torch.randn(8, 1024, device="cuda", dtype=torch.bfloat16)
    before = (rows @ parameter).clone()
    old = parameter.untyped_storage()
    part = relocate.storage_at(address + 512, old.nbytes(), device)
    part.copy_(old)
    parameter.data = relocate._view(part, parameter)
    after = rows @ parameter
    found: dict[str, Any] = {
        "address kept": storage.data_ptr() == address and parameter.data_ptr() == address + 512,
        "same product": bool(torch.equal(before, after)),
    }
    content = torch.as_tensor(relocate._CudaMemory(address, size), device=device)
    content.fill_(3)
    found["across frames"] = int((content == 3).sum()) == size
    torch.cuda.synchronize()
    mapper.vacate([(address, size)])
    torch.cuda.empty_cache()
    second = create_frames(context, 2)
    grant(context, mapper, address, second)
    content.fill_(5)
    found["after other frames came"] = int((content == 5).sum()) == size
    found["torch counts frames as reserved"] = torch.cuda.memory_reserved() >= size
    torch.cuda.set_per_process_memory_fraction(0.01)
    found["fraction is taken"] = True
    return found


def torch_graph_pool(request: Request) -> dict[str, Any]:
    """Graphs in scratch: is replay right when scratch comes back as zeros, as 0xFF, or as it was?"""
    torch.cuda.init()
    context = open_gpu()
    count = 4
    size = count * FRAME
    mapper = CudaMapper(0)
    address = mapper.reserve(size)
    frames = create_frames(context, count)
    grant(context, mapper, address, frames)
    call("cuMemsetD8", address, 0, size)
    scratch = Scratch(address, size)
    pool = scratch.memory_pool()
    graphs = _Graphs(pool.id)
    found: dict[str, Any] = {"scratch after capture": scratch.usage()._asdict(), "use_count": pool.use_count()}
    expected = graphs.replay()
    found["replay is reproducible"] = _equal(expected, graphs.replay())
    saved = torch.empty(size, dtype=torch.uint8)
    call("cuMemcpyDtoH", saved.data_ptr(), address, size)
    for content in ("zeros", "0xFF", "as it was"):
        others = _other_frames(context, mapper, address, count)
        if content == "as it was":
            call("cuMemcpyHtoD", address, saved.data_ptr(), size)
        else:
            call("cuMemsetD8", address, 255 if content == "0xFF" else 0, size)
        call("cuCtxSynchronize")
        try:
            found[f"scratch comes back as {content}"] = _equal(expected, graphs.replay())
        except Exception as error:
            found[f"scratch comes back as {content}"] = repr(error)[:200]
            break
        for frame in others:
            call("cuMemRelease", frame)
    found["after"] = scratch.usage()._asdict()
    return found


class _Graphs:
    """Two CUDA graphs, captured in one pool, with the kinds of kernels that a model runs."""

    def __init__(self, pool: Any) -> None:
        self._weights = [torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
        self._query = torch.randn(1, 8, 256, 64, device="cuda", dtype=torch.bfloat16)
        self._rows = torch.randn(32, 2048, device="cuda", dtype=torch.bfloat16)
        self._results: dict[int, list[torch.Tensor]] = {}
        self._lazy: torch.Tensor | None = None
        self._kept: list[torch.Tensor] = []
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self._work(0)
            self._work(1)
        torch.cuda.synchronize()
        self._lazy = None
        self._graphs = []
        for number in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._work(number)
            self._graphs.append(graph)
        torch.cuda.synchronize()

    def replay(self) -> list[torch.Tensor]:
        """The results of both graphs."""
        for graph in self._graphs:
            graph.replay()
        torch.cuda.synchronize()
        return [tensor.clone() for number in range(2) for tensor in self._results[number]]

    def _work(self, number: int) -> None:
        hidden = self._rows
        for weights in self._weights:
            hidden = torch.nn.functional.silu(hidden @ weights) / 8
        hidden = hidden.float().softmax(-1)
        attention = torch.nn.functional.scaled_dot_product_attention(self._query, self._query, self._query)
        largest = torch.topk(hidden, 50).values.sum(-1)
        lowest = hidden.sort(-1).values[:, :16]
        values = (hidden, attention, largest, lowest)
        if number not in self._results:
            self._results[number] = [torch.empty_like(tensor) for tensor in values]
        for result, value in zip(self._results[number], values, strict=True):
            result.copy_(value)
        new = torch.zeros(1024, device="cuda")
        if self._lazy is None:  # made inside the first capture, as some backends do
            self._lazy = new
        self._lazy.add_(1)
        self._kept.append(self._lazy)


def _other_frames(context: Context, mapper: CudaMapper, address: int, count: int) -> list[Any]:
    """Take the frames at `address` away and put new ones there, in another order."""
    torch.cuda.synchronize()
    mapper.vacate([(address, count * FRAME)])
    torch.cuda.empty_cache()
    frames = create_frames(context, count)[::-1]
    grant(context, mapper, address, frames)
    return frames


def _equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def torch_exit(request: Request) -> dict[str, Any]:
    """Does a process end cleanly, in whichever order graph, pool, scratch and frames go?"""
    found = {}
    for name, way in {
        "all alive": "all-alive",
        "graph, then scratch before pool (as GraphsInFrames is destroyed)": "graph-first",
        "pool before the graph": "pool-first",
        "frames gone first": "frames-first",
    }.items():
        command = [sys.executable, str(EXIT), str(request.root), way]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
        found[name] = {"exit": ended.returncode, "said": (ended.stdout + ended.stderr)[-300:]}
    return found
