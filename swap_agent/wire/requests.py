"""Messages on `engine-*.sock`: Triton stubs with one engine host (`Submit`, `Embed` …). The agent takes no part."""

from __future__ import annotations

import msgspec

from swap_agent.errors import Code
from swap_agent.wire.framing import Message


class Submit(Message, frozen=True):
    """One generation request. `id` is chosen by the stub, unique on its connection."""

    id: int
    prompt: str
    sampling_parameters: str
    """JSON object; the keys are vLLM's `SamplingParams`, string values are cast. Empty string: defaults."""
    stream: bool
    """True: an `Output` per engine step with deltas. False: one `Output`, whole."""


class Embed(Message, frozen=True):
    """One embedding request. `id` is chosen by the stub, unique on its connection.

    Answered by one `Output` whose one sequence is the embedding, a JSON list of numbers, or by `Failed`.
    """

    id: int
    prompt: str | list[int]
    """Text, or the numbers of its tokens."""
    pooling_parameters: str
    """JSON object; the keys are vLLM's `PoolingParams`. Empty string: defaults."""


class Abort(Message, frozen=True):
    """The client cancelled or went away. The host forgets the request and answers nothing more for it."""

    id: int


class Sequence(msgspec.Struct, frozen=True):
    """One of the `n` sequences of a request, in an `Output`."""

    text: str
    finish_reason: str | None
    """None while unfinished."""
    num_tokens: int
    """Tokens in this message (streaming) or in all (not streaming)."""


class Output(Message, frozen=True):
    """Progress of one request."""

    id: int
    sequences: list[Sequence]
    """All `n`, in order of their index; one without news has empty text and num_tokens 0."""
    num_input_tokens: int
    finished: bool


class Failed(Message, frozen=True):
    """The request ends with an error."""

    id: int
    code: Code
    message: str


class Step(Message, frozen=True):
    """What one engine step brought for all requests of one connection."""

    items: list[Output | Failed]


StubToEngine = Submit | Embed | Abort
EngineToStub = Step
