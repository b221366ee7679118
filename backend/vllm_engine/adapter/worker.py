"""The vLLM worker of a swappable engine: weights, state and KV cache lie in frames that the agent grants.

Tried on vLLM 0.32.0 and 0.26.0, CPU; untested on a GPU. vLLM finds the class by its name,
`vllm_engine.adapter.worker.SwappableWorker`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from vllm.platforms import current_platform

from swap_agent.errors import RolledBack, TritonSwapError, Unsupported
from swap_agent.wire.regions import Region
from vllm_engine.adapter import cuda_graphs, kv_frames, message_queue, versions
from vllm_engine.adapter.kv_plan import KVPlan
from vllm_engine.adapter.model_loader import VllmModelLoader
from vllm_engine.adapter.safetensors_header import read_past_cache
from vllm_engine.adapter.vllm_types import KVCacheConfig, VllmConfig
from vllm_engine.rank import relocate
from vllm_engine.rank.agent_link import Endpoint, RankConnection
from vllm_engine.rank.mapper import CudaMapper, HostMapper
from vllm_engine.rank.space import Space
from vllm_engine.rank.weights import Weights

log = logging.getLogger(__name__)
logging.getLogger("vllm_engine").parent = logging.getLogger("vllm")  # the only one that vLLM sets up in EngineCore


def _platform_worker() -> Any:
    """vLLM's own worker class for this machine."""
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    if current_platform.is_cuda():
        from vllm.v1.worker.gpu_worker import Worker

        return Worker
    raise Unsupported(f"vLLM on {current_platform.device_name} is not supported: only on CPU and on NVIDIA GPUs")


class SwappableWorker(_platform_worker()):  # type: ignore[misc]  # chosen at run time
    """One engine rank. `swap_out` and `swap_in` are called through `collective_rpc` while the scheduler is paused."""

    def __init__(self, vllm_config: VllmConfig, local_rank: int, rank: int, *args: Any, **kwargs: Any) -> None:
        """Connect to the agent, then as vLLM's worker. Raises TritonSwapError, of which the agent is told."""
        read_past_cache()  # as in the engine host: vLLM looks again when it copies its configuration
        world_size = vllm_config.parallel_config.world_size
        if world_size > 1:
            message_queue.wait_asleep()
        self._agent = RankConnection(Endpoint.from_environment(), rank, world_size)
        self._on_gpu = current_platform.is_cuda()
        with self._agent.reporting("create the worker"):
            versions.check("swap", "cuda" if self._on_gpu else "cpu")
        cuda = self._agent.welcome.device.startswith("cuda")
        if self._on_gpu and not cuda:
            raise Unsupported("this vLLM computes on the GPU, the agent has simulated devices: use --device cuda")
        mapper = CudaMapper(local_rank) if cuda else HostMapper()
        self._space = Space(self._agent.welcome.frame_bytes, mapper)
        self._graphs: cuda_graphs.GraphsInFrames | None = None
        self._resident = True
        cache = vllm_config.cache_config
        self._kv = KVPlan(vllm_config, self._agent.welcome)
        # Unset, vLLM would claim a share of the whole machine's memory. The true size is known after load_model.
        cache.kv_cache_memory_bytes = self._kv.declared_bytes or self._space.frame_bytes
        if self._on_gpu:
            cuda_graphs.claim_no_share(cache)
        with self._agent.reporting("create the worker"):
            super().__init__(vllm_config, local_rank, rank, *args, **kwargs)

    def init_device(self) -> None:
        """As vLLM's worker does; on a GPU with the memory of CUDA graphs in frames."""
        with self._agent.reporting("set up the device"):
            # Ranks share buffers of their graphs by IPC handles, which memory that is mapped has none of.
            if self._on_gpu and not self.model_config.enforce_eager and self.parallel_config.world_size == 1:
                torch.cuda.set_device(self.local_rank)
                self._graphs = cuda_graphs.GraphsInFrames(self._agent, self._space)
            super().init_device()
            if self._on_gpu:
                cuda_graphs.cap(self.device, self._agent.welcome.device_bytes)
        if self.parallel_config.world_size > 1:
            message_queue.forget_shared_memory()

    def load_model(self, **kwargs: Any) -> None:
        """Bring weights and state into frames, with a mirror of them at the agent."""
        with self._agent.reporting("load the model"):
            load = partial(super().load_model, **kwargs)
            loader = VllmModelLoader(
                self.vllm_config, self.model_runner, load, self._agent.engine_arguments, self._agent.rank
            )
            layout = Weights(self._agent, self._space, loader, self._reserve).bring()
        log.info(
            "weights %d bytes, state %d bytes in frames, KV cache of %d bytes planned",
            layout.size("weights"), layout.size("state"), self._kv.size,
        )  # fmt: skip

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """As vLLM's worker, which is asked once the model is loaded; first those in which a block lies in one place."""
        layouts: list[str] = super().get_supported_kv_cache_layouts()
        return kv_frames.blocks_outermost_first(layouts) if self._kv.blocks_come_and_go else layouts

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, as planned in load_model."""
        with self._agent.reporting("warm up the model"):
            size = self._kv.prepare(self.get_kv_cache_spec())
            if self._on_gpu:
                self.cache_config.kv_cache_memory_bytes = size
                super().determine_available_memory()  # a profiling run, whose answer is this size
            else:
                self.model_runner.warming_up_model()
            return size

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Set up the KV cache as vLLM does, with its buffers in frames."""
        with self._agent.reporting("create the KV cache"):
            sizes = kv_frames.buffer_sizes(kv_cache_config)
            aligned = sum(-(-size // relocate.ALIGNMENT_BYTES) * relocate.ALIGNMENT_BYTES for size in sizes)
            self._kv.settle(kv_cache_config)
            layout, most = self._kv.layout, self._frames(aligned)
            frames, order = (self._kv.frames, layout.order) if layout else (most, None)
            self._agent.reserve(self._space, "kv", frames, most, order, self._kv.preserved_bytes)
            with kv_frames.KVCacheInFrames(sizes, self._kv_buffers(sizes)) as hook:
                super().initialize_from_config(kv_cache_config)
            hook.check_all_replaced()
            if layout:
                kv_frames.check_layout(layout, self.model_runner.kv_caches, self._space.address("kv"))

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's worker does; captures CUDA graphs."""
        with self._agent.reporting("warm up the model"):
            times = super().compile_or_warm_up_model()
        if self._graphs:
            self._graphs.log_usage()
        return times

    def swap_out(self, epoch: int, keep: list[list[dict[Region, int]]], blocks: Sequence[int] = ()) -> None:
        """Take all frames but this rank's part of `keep` out of the address space, acknowledging each of its steps.

        These blocks of the KV cache are to be the same after the swap-in. Nothing may run on it after this.
        """
        if self._resident and self._kv.preserved_blocks:
            assert self._kv.layout
            self._agent.preserved(self._kv.layout.parts(blocks))
        self._resident = False
        steps = keep[self.rank] if keep else [{}]
        for number, step in enumerate(steps, 1):
            self._space.unmap(step)
            if self._kv.layout and number == len(steps):
                self._space.resize("kv", self._kv.frames)
            self._agent.unmapped(epoch)
        if self._on_gpu:
            cuda_graphs.let_go_of_unused_memory()

    def swap_in(self, epoch: int) -> tuple[float, float] | str:
        """Map what was missing, granted for `epoch`, and wait until it is filled. Returns seconds of each part.

        Returns the reason when it was rolled back.
        """
        if self._resident:
            raise TritonSwapError("swapped in twice")
        try:
            times = self._agent.swap_in(self._space, epoch)
        except RolledBack as error:
            return str(error)
        self._resident = True
        return times.map_s, times.fill_s

    def kv_size(self) -> tuple[int, ...]:
        """What the KV cache can be: the fields of KvCache; empty when it keeps its size."""
        layout, frames = self._kv.layout, self._kv.frames
        if layout is None or frames == layout.most_frames:
            return ()
        blocks = layout.blocks(frames)
        return frames, layout.most_frames, blocks, layout.most_blocks, len(layout.ranges)

    def kv_blocks(self, frames: int | None = None) -> int:
        """How many blocks `frames` frames back (None: those that are mapped); 0 for a KV cache that keeps its size."""
        if self._kv.layout is None:
            return 0
        return self._kv.layout.blocks(self._space.mapped["kv"] if frames is None else frames)

    def kv_frames(self, blocks: int) -> int:
        """How many frames back `blocks` blocks."""
        assert self._kv.layout
        return self._kv.layout.frames(blocks)

    def preserved_blocks(self) -> int:
        """How many blocks of the prefix cache outlive a swap, at most."""
        return self._kv.preserved_blocks

    def grow_kv(self, epoch: int, frames: int) -> int | str:
        """Map what was granted for `epoch`. Returns how many blocks are backed now, or why it was rolled back."""
        assert self._kv.layout
        try:
            self._agent.grow(self._space, "kv", epoch, min(frames, self._kv.layout.most_frames))
        except RolledBack as error:
            return str(error)
        return self.kv_blocks()

    def shrink_kv(self, epoch: int, frames: int) -> None:
        """Unmap all but `frames` frames of the KV cache and acknowledge. No block of them is used any more."""
        self._agent.shrink(self._space, "kv", epoch, frames)

    def shutdown(self) -> None:
        """End as vLLM's worker does."""
        super().shutdown()
        self._agent.close()

    def _reserve(self, layout: relocate.Layout) -> None:
        """Obtain the frames of weights and state, unless a try to restore them from a mirror has."""
        held: dict[Region, int] = {region: self._frames(layout.size(region)) for region in ("weights", "state")}
        fixed = held | {"scratch": self._space.regions.get("scratch", 0)}
        self._kv.fit(
            self.get_kv_cache_spec(), {region: frames * self._space.frame_bytes for region, frames in fixed.items()}
        )
        for region, frames in held.items():
            if self._space.regions.get(region) != frames:
                self._agent.reserve(self._space, region, frames)

    def _frames(self, size: int) -> int:
        return -(-size // self._space.frame_bytes)

    def _kv_buffers(self, sizes: list[int]) -> Any:
        """An allocator of int8 tensors, one after the other in region `kv`, which the agent has zeroed."""
        offset = 0

        def allocate(size: int) -> torch.Tensor:
            nonlocal offset
            storage = relocate.storage_at(self._space.place("kv", offset, size), size, self.device)
            offset += -(-size // relocate.ALIGNMENT_BYTES) * relocate.ALIGNMENT_BYTES
            return torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage)

        return allocate
