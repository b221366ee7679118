"""The only place that drives vLLM's AsyncLLM: start, generate, pause and resume around a swap, stop.

Tried on vLLM 0.32.0 and 0.26.0 (growing KV caches on 0.32.0 only).
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from swap_agent.errors import RolledBack, TritonSwapError, Unavailable, Unsupported
from swap_agent.wire.control import KvCache
from swap_agent.wire.regions import Region
from swap_agent.wire.requests import Embed, Output, Sequence, Submit
from vllm_engine.adapter.executor import compute_threads
from vllm_engine.adapter.kv_rpc import Order
from vllm_engine.adapter.requests import CLIENT_ERRORS, InvalidRequest, parameters
from vllm_engine.adapter.vllm_types import VllmConfig
from vllm_engine.host.engine import KvUsage, SwapInTimes, SwapOutTimes

RPC_TIMEOUT_S = 150.0
"""Longest order to the ranks; above the ranks' own limits, whose errors say more."""
SHUTDOWN_TIMEOUT_S = 1.0
"""How long EngineCore may take to end by itself."""


class VllmEngine:
    """One vLLM engine with swappable workers, on the running asyncio loop."""

    def __init__(self, name: str, config: VllmConfig, args: Any) -> None:
        """Start it: seconds to minutes, blocking. Raises TritonSwapError; the cause is in the engine's log."""
        if not (current_platform.is_cpu() or current_platform.is_cuda()):
            raise Unsupported(
                f"vLLM on {current_platform.device_name} is not supported: only on CPU and on NVIDIA GPUs"
            )
        self._name = name
        self._requests = 0
        try:
            with compute_threads(config):
                self._llm = AsyncLLM.from_vllm_config(config, disable_log_stats=args.disable_log_stats)
        except Exception as error:
            raise TritonSwapError(f"vLLM's engine did not start: {error}".splitlines()[0]) from error
        self.max_model_len = int(self._llm.model_config.max_model_len)
        self.embeds = self._llm.model_config.runner_type == "pooling"
        """Whether the model makes embeddings; else it generates text."""

    @property
    def is_dead(self) -> bool:
        """True once EngineCore has died."""
        return bool(self._llm.errored)

    def parameters(self, request: Submit | Embed) -> SamplingParams | PoolingParams:
        """What `generate` takes as `params` for `request`. Raises InvalidRequest."""
        return parameters(self._name, self.embeds, request)

    async def generate(
        self, request: int, prompt: str | list[int], params: SamplingParams | PoolingParams
    ) -> AsyncIterator[Output]:
        """Outputs of one request, numbered `request`; the last one is finished. Closing it aborts the request.

        Raises InvalidRequest, Unavailable (engine dead), TritonSwapError.
        """
        self._requests += 1
        name = str(self._requests)  # `request` is unique on its connection only
        if isinstance(params, PoolingParams):
            outputs = self._embedding(name, request, prompt, params)
        else:
            outputs = self._texts(name, request, str(prompt), params)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise Unavailable(f"the engine of {self._name} died while it served this request") from error
        except EngineGenerateError as error:
            cause = error.__cause__ or error
            raise TritonSwapError(f"the engine failed: {type(cause).__name__}: {cause}") from error
        except CLIENT_ERRORS as error:
            raise InvalidRequest(str(error)) from error

    async def _texts(
        self, name: str, request: int, prompt: str, params: SamplingParams
    ) -> AsyncGenerator[Output, None]:
        n = params.n
        finish_reasons: list[str | None] = [None] * n
        async for result in self._llm.generate(prompt, params, name):
            sequences = [Sequence("", reason, 0) for reason in finish_reasons]
            for completion in result.outputs:
                finish_reasons[completion.index] = completion.finish_reason
                sequences[completion.index] = Sequence(
                    completion.text, completion.finish_reason, len(completion.token_ids)
                )
            yield Output(request, sequences, len(result.prompt_token_ids or ()), result.finished)

    async def _embedding(
        self, name: str, request: int, prompt: str | list[int], params: PoolingParams
    ) -> AsyncGenerator[Output, None]:
        given = prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt)
        async for result in self._llm.encode(given, params, name):
            text = json.dumps(result.outputs.data.tolist())
            yield Output(request, [Sequence(text, None, 0)], len(result.prompt_token_ids), result.finished)

    async def preserves_kv(self) -> bool:
        """Whether any of the prefix cache outlives a swap."""
        return bool(min(await self._order("preserved_blocks")))

    async def swap_out(
        self, epoch: int, keep: list[list[dict[Region, int]]], *, preempt: bool, forget: bool = True
    ) -> SwapOutTimes:
        """Pause, forget the KV cache, and have every rank unmap all but its part of `keep` (empty: all of it).

        `forget` is false for an engine that `preserves_kv`: then it forgets what has no room in host memory.
        Call it when nothing is in flight, or with `preempt`: then requests stand still until the swap-in, and what KV
        is forgotten is computed again. What they have generated stays (vLLM preempts them when it resets its cache).
        """
        begin = time.monotonic()
        mode = "keep" if preempt else "wait"
        await self._llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=forget)
        paused = time.monotonic()
        await self._llm.collective_rpc(Order.SWAP_OUT, RPC_TIMEOUT_S, (epoch, keep))
        return SwapOutTimes(paused - begin, time.monotonic() - paused)

    async def swap_in(self, epoch: int) -> SwapInTimes:
        """Have every rank map its grants and wait until all are filled, then let the scheduler run.

        Raises RolledBack: no rank has mapped anything then that it had not before.
        """
        begin = time.monotonic()
        answers: list[tuple[float, float] | str] = await self._llm.collective_rpc("swap_in", RPC_TIMEOUT_S, (epoch,))
        ranks = [answer for answer in answers if not isinstance(answer, str)]
        refusals = [answer for answer in answers if isinstance(answer, str)]
        if ranks and refusals:
            raise TritonSwapError(f"{len(ranks)} ranks were filled, {len(refusals)} rolled back ({refusals[0]}): a bug")
        if refusals:
            raise RolledBack(refusals[0])
        mapped = time.monotonic()
        await self._llm.engine_core.resume_scheduler_async()
        map_s, fill_s = max(ranks, key=sum)
        return SwapInTimes(mapped - begin, map_s, fill_s, time.monotonic() - mapped)

    async def kv_size(self) -> KvCache | None:
        """What the KV cache can be; None when it keeps its size, as it does where ranks differ: they grow alike."""
        answers = await self._order("kv_size")
        sizes = [KvCache(*answer) for answer in answers if answer]
        if len(sizes) < len(answers) or len({(size.frames, size.blocks) for size in sizes}) != 1:
            return None
        return min(sizes, key=lambda size: size.most_blocks)

    async def kv_usage(self) -> KvUsage:
        """How its requests fill a KV cache that grows."""
        (usage,) = await self._order(Order.KV_USAGE)
        return KvUsage(*usage)

    async def kv_frames(self, blocks: int) -> int:
        """How many frames of region `kv` back `blocks` blocks, on each rank."""
        return int(max(await self._order("kv_frames", blocks)))

    async def grow_kv(self, epoch: int, frames: int) -> int:
        """Have every rank map its grants and wait until all have, then use them. Returns the number of blocks.

        Raises RolledBack: no rank has mapped anything then that it had not before.
        """
        (answer,) = await self._order(Order.GROW_KV, epoch, frames)
        if isinstance(answer, str):
            raise RolledBack(answer)
        return int(answer)

    async def want_kv(self, blocks: int) -> None:
        """Requests want `blocks` blocks again: the engine keeps and fills these, though a shrink was to take them."""
        await self._order(Order.WANT_KV, blocks)

    async def withhold_kv(self, frames: int) -> int:
        """Use no block any more that more than `frames` frames back. Returns how many of them requests hold yet."""
        (left,) = await self._order(Order.WITHHOLD_KV, frames)
        return int(left)

    async def shrink_kv(self, epoch: int, frames: int, within_s: float | None) -> tuple[int, int, int]:
        """Have every rank unmap all but `frames` frames of region `kv`.

        Requests in the way are computed again; with `within_s` None they stay, and so do the frames that they use.
        Returns the number of frames, of blocks and of preempted requests.
        """
        ((kept, blocks, preempted),) = await self._order(Order.SHRINK_KV, epoch, frames, within_s)
        return kept, blocks, preempted

    async def _order(self, name: str, *args: float | None) -> list[Any]:
        answers: list[Any] = await self._llm.collective_rpc(name, RPC_TIMEOUT_S, args)
        return answers

    def shutdown(self) -> None:
        """End EngineCore; blocking. It has nothing to save, so it is killed if it lingers."""
        self._llm.shutdown(timeout=SHUTDOWN_TIMEOUT_S)
