"""The vLLM worker of a swappable engine: weights, state and KV cache lie in frames that the agent grants.

Tried on vLLM 0.32.0 and 0.26.0, CPU; untested on a GPU. Hooks into vLLM: the worker methods overridden here,
`linear.py`, `placeholders.py`, `kv_cache.py` and `gpu.py`. vLLM finds the class by its name,
`vllm_engine.worker.SwappableWorker`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from vllm.platforms import current_platform

from swap_agent.errors import InvalidModel, TakenBack, TritonSwapError, Unsupported
from swap_agent.wire.messages import Region
from vllm_engine import between_ranks, elastic, gpu, kv_cache, quantized, rehome
from vllm_engine.addresses import CudaAddresses, HostAddresses
from vllm_engine.budget import bound_of, most_kv_cache, plan_kv_cache
from vllm_engine.headers import read_past_cache
from vllm_engine.kv_layout import KVLayout
from vllm_engine.rank import Endpoint, RankConnection
from vllm_engine.space import Space
from vllm_engine.weights import Weights

_MOST_PARTS = 100_000
"""Of the KV cache that outlive a swap: with more, small ones, the copies take longer than their bytes."""

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

    def __init__(self, vllm_config: Any, local_rank: int, rank: int, *args: Any, **kwargs: Any) -> None:
        """Connect to the agent, then as vLLM's worker. Raises TritonSwapError, of which the agent is told."""
        read_past_cache()  # as in the engine host: vLLM looks again when it copies its configuration
        world_size = vllm_config.parallel_config.world_size
        if world_size > 1:
            between_ranks.wait_asleep()
        self._agent = RankConnection(Endpoint.from_environment(), rank, world_size)
        self._on_gpu = current_platform.is_cuda()
        cuda = self._agent.welcome.device.startswith("cuda")
        if self._on_gpu and not cuda:
            raise Unsupported("this vLLM computes on the GPU, the agent has simulated devices: use --device cuda")
        addresses = CudaAddresses(local_rank) if cuda else HostAddresses()
        self._space = Space(self._agent.welcome.frame_bytes, addresses)
        self._graphs: gpu.GraphsInFrames | None = None
        self._resident = True
        cache = vllm_config.cache_config
        self._declared_kv_bytes: int | None = cache.kv_cache_memory_bytes
        self._kv_bytes = 0
        self._most_kv_bytes = 0
        """To which the KV cache may grow; 0: it does not."""
        self._kv_layout: KVLayout | None = None
        """Of a KV cache that grows or outlives swaps."""
        self._first_kv_bytes = 0
        """What it may have at first."""
        self._kv_frames = 0
        """With which it starts and comes back from a swap."""
        self._preserved_blocks = 0
        """Of the prefix cache, that outlive a swap."""
        # Unset, vLLM would claim a share of the whole machine's memory. The true size is known after load_model.
        cache.kv_cache_memory_bytes = self._declared_kv_bytes or self._space.frame_bytes
        if self._on_gpu:
            gpu.claim_no_share(cache)
        with self._agent.reporting("create the worker"):
            super().__init__(vllm_config, local_rank, rank, *args, **kwargs)

    def init_device(self) -> None:
        """As vLLM's worker does; on a GPU with the memory of CUDA graphs in frames."""
        with self._agent.reporting("set up the device"):
            # Ranks share buffers of their graphs by IPC handles, which memory that is mapped has none of.
            if self._on_gpu and not self.model_config.enforce_eager and self.parallel_config.world_size == 1:
                torch.cuda.set_device(self.local_rank)
                self._graphs = gpu.GraphsInFrames(self._agent, self._space)
            super().init_device()
            if self._on_gpu:
                gpu.cap(self.device, self._agent.welcome.device_bytes)
        if self.parallel_config.world_size > 1:
            between_ranks.forget_shared_memory()

    def load_model(self, **kwargs: Any) -> None:
        """Bring weights and state into frames, with a mirror of them at the agent."""
        with self._agent.reporting("load the model"):
            weights = Weights(
                self._agent, self._space, self.vllm_config, self.model_runner,
                load=lambda placeholders: self._load(placeholders, kwargs), reserve=self._reserve,
            )  # fmt: skip
            layout = weights.bring()
        log.info(
            "weights %d bytes, state %d bytes in frames, KV cache of %d bytes planned",
            layout.size("weights"), layout.size("state"), self._kv_bytes,
        )  # fmt: skip

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """As vLLM's worker, which is asked once the model is loaded; first those in which a block lies in one place.

        That counts where blocks come and go: when the KV cache may grow, or outlives swaps.
        """
        layouts: list[str] = super().get_supported_kv_cache_layouts()
        wanted = self._most_kv_bytes > self._kv_bytes or self._agent.welcome.preserve_kv_bytes
        if wanted and not elastic.why_fixed(self.vllm_config):
            layouts = kv_cache.blocks_outermost_first(layouts)
        return layouts

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache, as planned in load_model."""
        with self._agent.reporting("warm up the model"):
            kv_cache.check_holds_one_sequence(self.vllm_config, self.get_kv_cache_spec(), self._kv_bytes)
            if self._most_kv_bytes > self._kv_bytes:
                self._prepare_growth()
            if self._agent.welcome.preserve_kv_bytes:
                self._prepare_preserving()
            size = max(self._kv_bytes, self._most_kv_bytes)
            if self._on_gpu:
                self.cache_config.kv_cache_memory_bytes = size
                super().determine_available_memory()  # a profiling run, whose answer is this size
            else:
                self.model_runner.warming_up_model()
            return size

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Set up the KV cache as vLLM does, with its buffers in frames."""
        with self._agent.reporting("create the KV cache"):
            sizes = kv_cache.buffer_sizes(kv_cache_config)
            aligned = sum(-(-size // rehome.ALIGNMENT_BYTES) * rehome.ALIGNMENT_BYTES for size in sizes)
            frames, most = self._frames(aligned), self._frames(aligned)
            layout = self._kv_layout
            if layout:  # this time with the number of blocks that all ranks can have
                layout = kv_cache.planned_layout(self.vllm_config, kv_cache_config, self._space.frame_bytes)
                self._kv_layout = layout
                frames = self._kv_frames = min(self._kv_frames, layout.most_frames)
            preserved = self._plan_preserved()
            self._agent.reserve(self._space, "kv", frames, most, layout.order if layout else None, preserved)
            with kv_cache.KVCacheInFrames(sizes, self._kv_buffers(sizes)) as hook:
                super().initialize_from_config(kv_cache_config)
            hook.check_all_replaced()
            if layout:
                kv_cache.check_layout(layout, self.model_runner.kv_caches, self._space.address("kv"))

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM's worker does; captures CUDA graphs."""
        with self._agent.reporting("warm up the model"):
            times = super().compile_or_warm_up_model()
        if self._graphs:
            self._graphs.log_figures()
        return times

    def swap_out(self, epoch: int, keep: list[list[dict[Region, int]]], blocks: Sequence[int] = ()) -> None:
        """Take all frames but this rank's part of `keep` out of the address space, acknowledging each of its steps.

        These blocks of the KV cache are to be the same after the swap-in. Nothing may run on it after this.
        """
        if self._resident and self._preserved_blocks:
            assert self._kv_layout
            self._agent.preserved(self._kv_layout.parts(blocks))
        self._resident = False
        steps = keep[self.rank] if keep else [{}]
        for number, step in enumerate(steps, 1):
            self._space.unmap(step)
            if self._kv_layout and number == len(steps):
                self._space.resize("kv", self._kv_frames)
            self._agent.unmapped(epoch)
        if self._on_gpu:
            gpu.let_go_of_unused_memory()

    def swap_in(self, epoch: int) -> tuple[float, float] | str:
        """Map what was missing, granted for `epoch`, and wait until it is filled. Returns seconds of each part.

        Returns the reason when it was taken back.
        """
        if self._resident:
            raise TritonSwapError("swapped in twice")
        try:
            times = self._agent.swap_in(self._space, epoch)
        except TakenBack as error:
            return str(error)
        self._resident = True
        return times.map_s, times.fill_s

    def kv_size(self) -> tuple[int, ...]:
        """What the KV cache can be: the fields of KvCache; empty when it keeps its size."""
        layout = self._kv_layout
        if layout is None or self._kv_frames == layout.most_frames:
            return ()
        blocks = layout.blocks(self._kv_frames)
        return self._kv_frames, layout.most_frames, blocks, layout.most_blocks, len(layout.ranges)

    def kv_blocks(self, frames: int | None = None) -> int:
        """How many blocks so many frames back (None: those that are mapped); 0 when nobody has to know."""
        if self._kv_layout is None:
            return 0
        return self._kv_layout.blocks(self._space.mapped["kv"] if frames is None else frames)

    def kv_frames(self, blocks: int) -> int:
        """How many frames back so many blocks."""
        assert self._kv_layout
        return self._kv_layout.frames(blocks)

    def preserved_blocks(self) -> int:
        """How many blocks of the prefix cache outlive a swap, at most."""
        return self._preserved_blocks

    def grow_kv(self, epoch: int, frames: int) -> int | str:
        """Map what was granted for `epoch`. Returns how many blocks are backed now, or why it was taken back."""
        assert self._kv_layout
        try:
            self._agent.grow(self._space, "kv", epoch, min(frames, self._kv_layout.most_frames))
        except TakenBack as error:
            return str(error)
        return self.kv_blocks()

    def shrink_kv(self, epoch: int, frames: int) -> None:
        """Unmap all but `frames` frames of the KV cache and acknowledge. No block of them is used any more."""
        self._agent.shrink(self._space, "kv", epoch, frames)

    def shutdown(self) -> None:
        """End as vLLM's worker does."""
        super().shutdown()
        self._agent.close()

    def _load(self, placeholders: bool, kwargs: dict[str, Any]) -> None:
        """Have vLLM load the model, or with `placeholders` make of its empty tensors what it would make of weights."""
        load = super().load_model
        if self._on_gpu:
            load(**kwargs)
        else:
            from vllm_engine import linear

            linear.load_with_ordinary_weights(lambda: load(**kwargs), self.get_model, placeholders=placeholders)
        if self.vllm_config.quant_config is not None:
            quantized.check_all_registered(self.get_model())

    def _reserve(self, layout: rehome.Layout) -> None:
        """Obtain the frames of weights and state, unless a try to restore them from a mirror has."""
        self._kv_bytes = self._plan_kv_cache(layout)
        for region in ("weights", "state"):
            frames = self._frames(layout.size(region))
            if self._space.regions.get(region) != frames:
                self._agent.reserve(self._space, region, frames)

    def _frames(self, size: int) -> int:
        return -(-size // self._space.frame_bytes)

    def _plan_kv_cache(self, layout: rehome.Layout) -> int:
        """Size of the KV cache, so that everything fits what it may have. Raises InvalidModel with the sum."""
        specs = self.get_kv_cache_spec()
        kv_key, kv_name = "kv_cache_memory_bytes", "KV cache (kv_cache_memory_bytes)"
        needed = (self._declared_kv_bytes or 0) if specs else 0
        if self._declared_kv_bytes is None:
            length = self.model_config.max_model_len
            kv_key, kv_name = "max_model_len", f"KV cache of one sequence of max_model_len={length} tokens"
            needed = kv_cache.one_sequence_bytes(self.vllm_config, specs)
        frame_bytes = self._space.frame_bytes
        fixed: dict[Region, int] = {
            "weights": self._frames(layout.size("weights")) * frame_bytes,
            "state": self._frames(layout.size("state")) * frame_bytes,
            "scratch": self._space.regions.get("scratch", 0) * frame_bytes,
        }
        grows = bool(specs) and self._declared_kv_bytes is None
        size = plan_kv_cache(self._agent.welcome, fixed, needed, kv_name, kv_key, grows=grows)
        if grows:
            self._most_kv_bytes = most_kv_cache(self._agent.welcome, fixed)
            self._first_kv_bytes = bound_of(self._agent.welcome)[0] - sum(fixed.values())
            if self._agent.welcome.request_bytes is None:  # it takes what it needs, and not much more
                self._first_kv_bytes = min(self._first_kv_bytes, 2 * size)
        return size

    def _prepare_growth(self) -> None:
        """Plan for the most KV cache, and with how much of it the engine starts; or leave it as it is, and say why.

        A first part of it takes more frames than a cache of the same size, by a few for each range.
        """
        try:
            if reason := elastic.why_fixed(self.vllm_config):
                raise Unsupported(reason)
            specs, frame_bytes = self.get_kv_cache_spec(), self._space.frame_bytes
            config = kv_cache.planned_config(self.vllm_config, specs, self._most_kv_bytes)
            layout = kv_cache.planned_layout(self.vllm_config, config, frame_bytes)
            if (blocks := layout.even_blocks(frame_bytes)) < layout.most_blocks:
                self._most_kv_bytes = blocks * kv_cache.block_bytes(config)
                config = kv_cache.planned_config(self.vllm_config, specs, self._most_kv_bytes)
                layout = kv_cache.planned_layout(self.vllm_config, config, frame_bytes)
            needed = layout.frames(kv_cache.blocks_of_one_sequence(self.vllm_config, specs, config))
            first = min(max(self._kv_bytes // frame_bytes, needed), layout.most_frames)
            if first * frame_bytes > self._first_kv_bytes:
                raise Unsupported(
                    f"one sequence takes {needed} frames of one that grows, in {len(layout.ranges)} places, and there "
                    f"may be {self._first_kv_bytes // frame_bytes} at first: raise GPU_MEMORY_REQUEST"
                )
        except Unsupported as error:
            log.warning("the KV cache keeps its size: %s", error)
            self._most_kv_bytes = 0
            return
        self._kv_frames, self._kv_layout = first, layout
        log.info(
            "the KV cache starts with %d of %d frames and %d of %d blocks, in %d places",
            first, layout.most_frames, layout.blocks(first), layout.most_blocks, len(layout.ranges),
        )  # fmt: skip

    def _prepare_preserving(self) -> None:
        """Plan where the blocks lie also of a KV cache that keeps its size; where that cannot be, say why."""
        if not self.cache_config.enable_prefix_caching:
            raise InvalidModel("PRESERVE_KV in config.pbtxt: there is no prefix cache to preserve: remove it")
        if self._kv_layout:
            return
        try:
            if reason := elastic.why_fixed(self.vllm_config):
                raise Unsupported(reason)
            config = kv_cache.planned_config(self.vllm_config, self.get_kv_cache_spec(), self._kv_bytes)
            self._kv_layout = kv_cache.planned_layout(self.vllm_config, config, self._space.frame_bytes)
            self._kv_frames = self._kv_layout.most_frames
        except Unsupported as error:
            log.warning("PRESERVE_KV has no effect: %s", error)

    def _plan_preserved(self) -> int:
        """How many blocks outlive a swap; returns their bytes. Raises InvalidModel when there can be none."""
        size, layout = self._agent.welcome.preserve_kv_bytes, self._kv_layout
        if not size or layout is None:
            return 0
        blocks = min(size // layout.block_bytes, layout.blocks(self._kv_frames) - 1)
        if not blocks:
            raise InvalidModel(
                f"PRESERVE_KV in config.pbtxt: {size} bytes for each rank hold no block of {layout.block_bytes} bytes: "
                "raise it or remove it"
            )
        if (most := max(1, _MOST_PARTS // len(layout.ranges))) < blocks:
            log.warning(
                "%d KV blocks instead of %d outlive a swap: each lies in %d places", most, blocks, len(layout.ranges)
            )
            blocks = most
        self._preserved_blocks = blocks
        log.info("up to %d KV blocks of the prefix cache outlive a swap", blocks)
        return blocks * layout.block_bytes

    def _kv_buffers(self, sizes: list[int]) -> Any:
        """An allocator of int8 tensors, one after the other in region `kv`, which the agent has zeroed."""
        offset = 0

        def allocate(size: int) -> torch.Tensor:
            nonlocal offset
            storage = rehome.storage_at(self._space.place("kv", offset, size), size, self.device)
            offset += -(-size // rehome.ALIGNMENT_BYTES) * rehome.ALIGNMENT_BYTES
            return torch.empty(0, dtype=torch.int8, device=storage.device).set_(storage)

        return allocate
