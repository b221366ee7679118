"""One process of the step `torch_exit` of first.py: `first_torch_exit.py ROOT WAY`.

Everything is a global of the main module, so that the interpreter destroys what is left as it ends.
"""

from __future__ import annotations

import gc
import sys

ROOT, WAY = sys.argv[1:]
sys.path[:0] = [ROOT, f"{ROOT}/backend"]

import torch  # noqa: E402
from first_gpu import FRAME, create_frames, grant, open_gpu  # noqa: E402

from vllm_engine.adapter.scratch import Scratch  # noqa: E402
from vllm_engine.rank.mapper import CudaMapper  # noqa: E402


class Holder:
    """As the engine's object that keeps scratch and pool together."""

    def __init__(self, address: int, size: int) -> None:
        self.scratch = Scratch(address, size)
        self.pool = self.scratch.memory_pool()


torch.cuda.init()
context = open_gpu()
size = 2 * FRAME
mapper = CudaMapper(0)
address = mapper.reserve(size)
grant(context, mapper, address, create_frames(context, 2))
holder = Holder(address, size)
factors = torch.randn(256, 256, device="cuda")
product = factors @ factors
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph, pool=holder.pool.id):
    product = factors @ factors
torch.cuda.synchronize()
if WAY == "graph-first":
    del product, graph
    gc.collect()
    del holder
    gc.collect()
    torch.cuda.empty_cache()
elif WAY == "pool-first":
    del holder.pool
    gc.collect()
    torch.cuda.empty_cache()
elif WAY == "frames-first":
    mapper.vacate([(address, size)])
print("ended")
