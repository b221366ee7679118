"""A swap changes no answer."""

from __future__ import annotations

from support.scene import LLAMA, QWEN, REFERENCE_TOKENS, Reference

from loadtest.clients import Client
from loadtest.server import Server

SWAPS = 10


async def test_64_greedy_tokens_are_plain_vllms_after_each_of_10_swaps(
    server: Server, client: Client, references: dict[str, Reference]
) -> None:
    """llama and qwen use the same frames in turn: each request pushes the other model out.

    The prompts stay the same and are longer than two blocks of the prefix cache: a hash that outlives its KV shows.
    """
    before = {model: server.model(model)["swaps_in"] for model in (LLAMA, QWEN)}
    for swap in range(SWAPS + 1):
        for model in (LLAMA, QWEN):
            if swap:
                server.park(model)  # what the other one had no need of is still on the device
                assert server.model(model)["device_bytes"] == 0
            answer = await client.stream(model, references[model].prompt, REFERENCE_TOKENS)
            assert server.model(model)["device_bytes"] > 0
            assert (answer.input_tokens, answer.output_tokens) == (300, REFERENCE_TOKENS)
            assert answer.text == references[model].answer.text, f"{model}, swap {swap}"
    for model in (LLAMA, QWEN):
        assert server.model(model)["swaps_in"] - before[model] >= SWAPS
