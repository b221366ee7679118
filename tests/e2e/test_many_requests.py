"""Many requests at once over models that cannot all be resident, and clients that give up."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc_aio
from support.scene import LLAMA, MODELS, QWEN, until
from tokenizers import Tokenizer

from loadtest.clients import Client
from loadtest.models import MODELS_DIR
from loadtest.prompts import Prompts
from loadtest.server import Server
from loadtest.workload import Answer

REQUESTS = 200


def tensors(prompt: str, max_tokens: int) -> list[grpc_aio.InferInput]:
    """A request that does not stream and gets its own prompt back before the text."""
    sampling = json.dumps({"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens})
    values: dict[str, Any] = {
        "text_input": prompt.encode(),
        "sampling_parameters": sampling.encode(),
        "return_num_input_tokens": True,
        "return_num_output_tokens": True,
        "return_finish_reason": True,
    }
    made = []
    for name, value in values.items():
        tensor = grpc_aio.InferInput(name, [1], "BOOL" if value is True else "BYTES")
        tensor.set_data_from_numpy(np.array([value], dtype=np.bool_ if value is True else np.object_))
        made.append(tensor)
    return made


async def occupy(server: Server, client: Client, prompts: dict[str, Prompts]) -> asyncio.Task[Answer]:
    """Have qwen answer for seconds, so that requests for llama have to wait for its memory."""
    await client.stream(QWEN, prompts[QWEN].next(16), 1)
    assert server.model(LLAMA)["state"] == "SWAPPED"
    long = asyncio.create_task(client.stream(QWEN, prompts[QWEN].next(16), 150))
    await until(lambda: server.model(QWEN)["in_flight"] == 1)
    return long


async def test_200_requests_at_once_lose_nothing(server: Server, prompts: dict[str, Prompts]) -> None:
    lengths = [8 + number % 40 for number in range(REQUESTS)]
    models = [MODELS[number % 3] for number in range(REQUESTS)]
    texts = [prompts[model].next(length) for model, length in zip(models, lengths, strict=True)]
    assert len(set(texts)) == REQUESTS
    swaps = sum(server.model(model)["swaps_in"] for model in MODELS)
    answers: Counter[int] = Counter()
    tokenizers = {model: Tokenizer.from_file(str(MODELS_DIR / model / "tokenizer.json")) for model in MODELS}

    async def ask(client: grpc_aio.InferenceServerClient, number: int) -> None:
        model, max_tokens = models[number], 1 + number % 7

        async def requests() -> AsyncIterator[dict[str, Any]]:
            inputs = tensors(texts[number], max_tokens)
            yield {"model_name": model, "inputs": inputs, "request_id": str(number)}

        async for result, error in client.stream_infer(requests()):
            assert error is None, f"{model}: {error}"
            response = result.get_response()
            if result.as_numpy("text_output") is None:
                continue  # the empty response that ends a decoupled request
            answers[number] += 1
            assert (response.id, response.model_name) == (str(number), model)
            text = result.as_numpy("text_output")[0].decode()
            assert text.startswith(texts[number]) and len(text) > len(texts[number])
            expected = len(tokenizers[model].encode(texts[number]).ids)
            assert int(result.as_numpy("num_input_tokens")[0]) == expected
            assert int(result.as_numpy("num_output_tokens")[0]) == max_tokens
            assert result.as_numpy("finish_reason")[0] == b"length"

    async with grpc_aio.InferenceServerClient(server.grpc_url) as client:
        await asyncio.gather(*(ask(client, number) for number in range(REQUESTS)))
    assert answers == Counter(range(REQUESTS)), "every request has exactly one answer"
    assert sum(server.model(model)["swaps_in"] for model in MODELS) > swaps, "the models did take turns"
    assert all(server.model(model)["in_flight"] == server.model(model)["waiting"] == 0 for model in MODELS)


async def test_who_gives_up_while_waiting_for_a_swap_leaves_nothing_behind(
    server: Server, client: Client, prompts: dict[str, Prompts]
) -> None:
    """Twice: by cancelling the call, and by vanishing with its connection."""
    for way in ("cancel", "vanish"):
        long = await occupy(server, client, prompts)
        swaps_in = server.model(LLAMA)["swaps_in"]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": LLAMA, "inputs": tensors(prompts[LLAMA].next(16), 4)}
            await asyncio.sleep(60)

        other = grpc_aio.InferenceServerClient(server.grpc_url)
        stream = other.stream_infer(requests())
        waiting = asyncio.ensure_future(anext(aiter(stream)))
        await until(lambda: server.model(LLAMA)["waiting"] == 1)
        if way == "cancel":
            stream.cancel()
        else:
            await other.close()
        await until(lambda: server.model(LLAMA)["waiting"] == 0)
        await asyncio.gather(waiting, return_exceptions=True)
        await other.close()
        answer = await long
        assert answer.output_tokens == 150
        await asyncio.sleep(0.5)
        entry = server.model(LLAMA)
        assert (entry["state"], entry["swaps_in"], entry["in_flight"]) == ("SWAPPED", swaps_in, 0)
        await client.load(QWEN)  # its turn may have been over: then it left when its request was done


async def test_an_http_client_that_vanished_while_waiting_is_noticed_at_the_first_token(
    server: Server, client: Client, prompts: dict[str, Prompts]
) -> None:
    """tritonserver tells nobody before it has something to write (docs/triton-contract.md)."""
    long = await occupy(server, client, prompts)
    waiting = asyncio.create_task(client.generate_stream(LLAMA, prompts[LLAMA].next(16), 3000))
    await until(lambda: server.model(LLAMA)["waiting"] == 1)
    waiting.cancel()
    assert (await long).output_tokens == 150
    await until(lambda: server.model(LLAMA)["state"] == "RESIDENT" and server.model(LLAMA)["in_flight"] == 0)
    assert server.model(LLAMA)["waiting"] == 0
    answer = await client.generate(LLAMA, prompts[LLAMA].next(16), 4)
    assert answer.output_tokens == 4
