"""Every message that crosses a socket of triton-swap, one tagged struct each.

Three conversations, each on a Unix stream socket inside the runtime directory:

* `agent.sock`, control plane: Triton stubs (`Attach` …) and engine hosts (`HostHello` …) with the agent.
* `ranks.sock`, memory plane: one connection per engine rank, with file descriptors of frames (`RankHello` …).
* `engine-*.sock`, data plane: Triton stubs with one engine host (`Submit`, `Embed` …); the agent takes no part in it.

A message is a frame of `wire.framing`: four bytes of length, then msgpack. Sizes are bytes, durations seconds.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Region = Literal["weights", "state", "scratch", "kv"]
"""A part of an engine's space. `weights` never changes after load; `state` must survive a swap; `scratch` (CUDA graphs
and workspaces between two steps; on a GPU only) and `kv` may be dropped."""

Code = Literal["INVALID_ARG", "UNAVAILABLE", "NOT_FOUND", "CANCELLED", "UNSUPPORTED", "INTERNAL"]
"""Error codes; the names are those of Triton's `TRITONSERVER_Error_Code`."""


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """Base of all messages; the class name is the tag on the wire."""


# --- control plane: Triton stub -> agent ------------------------------------------------------------------------------


class Attach(Message, frozen=True):
    """A Triton model instance was loaded, or lost its engine, and wants an engine that is RESIDENT.

    Idempotent. Answered by `Attached` once the engine runs and its mirror is made, or by `Refused`.
    """

    model: str
    version: str
    instance: int
    version_dir: str
    """Absolute path of `<repository>/<model>/<version>`."""
    model_json: str
    """Content of `model.json`: vLLM engine arguments."""
    parameters: dict[str, str]
    """`parameters` of config.pbtxt as Triton read it, string values."""
    gpu: int | None = None
    """The one device on which an instance with KIND_GPU has to be; None: any."""


class Attached(Message, frozen=True):
    """The engine of this replica is RESIDENT and listens on `engine_socket`."""

    replica: str
    """`name/version#instance`."""
    engine_socket: str
    engine_pid: int


class Detach(Message, frozen=True):
    """Triton unloads the instance: park the model. Closing the connection without this parks nothing."""


class Detached(Message, frozen=True):
    """The model is parked (SWAPPED), or another stub still uses it."""


class Refused(Message, frozen=True):
    """The request that this answers cannot be granted; `message` is one line for a person."""

    code: Code
    message: str


# --- control plane: engine host <-> agent -----------------------------------------------------------------------------


class HostHello(Message, frozen=True):
    """First message of an engine host, right after it started."""

    replica: str
    token: str


class HostWelcome(Message, frozen=True):
    """What the engine host is to run."""

    version_dir: str
    model_json: str
    engine_socket: str
    """Path at which the host listens for stubs; created by the host, mode 0600."""
    ranks_socket: str
    max_queue: int
    """Most requests that may wait for residency in this host."""
    queue_timeout_s: float
    drain_timeout_s: float
    """When the agent is gone: how long requests that run may take before the host exits."""


class KvCache(msgspec.Struct, frozen=True):
    """A KV cache that grows and shrinks. Frames are those of region `kv` of each rank, the first ones."""

    frames: int
    """With which the engine starts and comes back from a swap; it never has fewer while it is RESIDENT."""
    most_frames: int
    """It has addresses for so many."""
    blocks: int
    """Of vLLM's, that `frames` frames back."""
    most_blocks: int
    ranges: int
    """In how many places of the region a block lies: the more, the coarser the steps in which blocks come and go."""


class HostReady(Message, frozen=True):
    """The engine is up, its gate is open and it listens for stubs. Sent once."""

    max_model_len: int
    kv: KvCache | None = None
    """None: there is no KV cache, or it keeps its size; the engine's log says why."""


class HostFailed(Message, frozen=True):
    """The engine cannot start. The host exits after this. `message` says which model.json field and what to do."""

    code: Code
    message: str


class Report(Message, frozen=True):
    """Traffic of the host. Sent when a count enters or leaves zero, else at most every 50 ms. It asks for nothing."""

    in_flight: int
    """Requests inside the engine."""
    waiting: int
    """Requests held at the gate because the model is not resident."""
    served: int
    """Requests ended since the engine started, however they ended."""


class Activate(Message, frozen=True):
    """Have the model swapped in: requests wait at the gate, or stand still inside since `Drain.preempt`.

    Sent once: when the first request has to wait, right after the `Report` that counts it, or at `Drain.preempt`. Sent
    again when an order of another epoch leaves the gate closed; the agent may have dropped what the older epoch asked.
    A `Report` without any such request withdraws it.
    """

    epoch: int
    """Of the last order that the host has taken; 0: none yet."""


class Drain(Message, frozen=True):
    """Close the gate: hold new requests. `wait=False`: only if nothing is in flight, else answer `DrainRefused`."""

    epoch: int
    wait: bool
    preempt: bool = False
    """Do not wait for what is in flight: it stands still while the engine is swapped out, and goes on afterwards."""


class Drained(Message, frozen=True):
    """The gate is closed, and nothing is in flight that may not be preempted."""

    epoch: int


class DrainRefused(Message, frozen=True):
    """The gate is open: something is in flight."""

    epoch: int


class SwapOut(Message, frozen=True):
    """After `Drained`: pause the scheduler, forget the prefix cache but for `KvPreserved`, have every rank synchronise,
    unmap and ack.

    Also for an engine that is swapped out already and still holds frames.
    """

    epoch: int
    keep: list[list[dict[Region, int]]] = []
    """Per rank and step, of which each is acknowledged: frames of each region that stay mapped, the first ones; what KV
    they hold is void unless it is preserved. Absent: one step, and none."""


class SwappedOut(Message, frozen=True):
    """Every rank has unmapped what it was told to."""

    epoch: int


class SwapIn(Message, frozen=True):
    """Have every rank map its grants and wait for `Filled`; then resume the scheduler and open the gate."""

    epoch: int


class SwappedIn(Message, frozen=True):
    """The scheduler runs and the gate is open."""

    epoch: int


class SwapInFailed(Message, frozen=True):
    """The swap-in was undone: every rank has unmapped what it had mapped, the gate is closed, the scheduler paused."""

    epoch: int
    message: str


class OrderFailed(Message, frozen=True):
    """The order of this epoch failed; the host's state is undefined and the agent ends the engine."""

    epoch: int
    message: str


class KvWanted(Message, frozen=True):
    """Of a KV cache that grows: the frames of region `kv` that each rank would use now, in all.

    Between `frames` and `most_frames` of `KvCache`. Sent when that changes, up at once and down after a while; at first
    and after a swap it is `frames`. What is more than this is used as a prefix cache only.
    """

    frames: int


class GrowKv(Message, frozen=True):
    """Have every rank map its grants of region `kv`, so that it has `frames` frames (a rank never has more than its
    `Reserve.most`), and wait for `Filled`; then use their blocks. The frames are zero when they are granted.

    While the gate is open, and no other order is under way. Requests go on. Answered by `KvGrown` or `KvGrowFailed`.
    """

    epoch: int
    frames: int


class KvGrown(Message, frozen=True):
    """The KV cache has so many blocks now."""

    epoch: int
    blocks: int


class KvGrowFailed(Message, frozen=True):
    """The growth was undone: every rank has unmapped what came."""

    epoch: int
    message: str


class ShrinkKv(Message, frozen=True):
    """Have every rank unmap all frames of region `kv` but the first `frames`, and ack with `Unmapped`.

    `frames` is at least that of `KvCache`. At once nobody gets a block of the others any more. Requests that use some
    may go on until `deadline_s` seconds from now; then they are preempted, the youngest first, and computed again.
    While the gate is open, and no other order is under way.
    """

    epoch: int
    frames: int
    deadline_s: float | None = 0.0
    """None: nobody waits for them. What requests use stays, with all that lies before it; blocks beyond `frames` are
    handed out last from then on, so that more can go when this is ordered again."""


class KvShrunk(Message, frozen=True):
    """The KV cache has so many frames and blocks now, and so many requests were preempted for it."""

    epoch: int
    frames: int
    """As ordered; or more, without a deadline."""
    blocks: int
    preempted: int


class RefuseWaiting(Message, frozen=True):
    """Fail every request held at the gate with this error."""

    code: Code
    message: str


class QueueLimits(Message, frozen=True):
    """The limits of `HostWelcome` have changed, for requests that come from now on."""

    max_queue: int
    queue_timeout_s: float


class Shutdown(Message, frozen=True):
    """Finish what runs (at most `drain_timeout_s`), refuse the rest with `message`, exit 0."""

    message: str


# --- memory plane: engine rank <-> agent ------------------------------------------------------------------------------


class RankHello(Message, frozen=True):
    """First message of an engine rank (the process that maps frames); ranks count from 0 to `world_size` - 1."""

    replica: str
    token: str
    rank: int
    world_size: int


class RankWelcome(Message, frozen=True):
    """The device the rank's frames come from."""

    device: str
    frame_bytes: int
    request_bytes: int | None
    """GPU_MEMORY_REQUEST in bytes: the sum of this rank's regions may not exceed it. None: not declared."""
    device_bytes: int
    limit_bytes: int | None = None
    """GPU_MEMORY_LIMIT in bytes: binds the same sum where no request is declared. None: not declared."""
    preserve_kv_bytes: int = 0
    """This rank's part of PRESERVE_KV: host memory for what of region `kv` outlives a swap."""


class Reserve(Message, frozen=True):
    """While the engine starts: frames for one region, zeroed. Answered by `Grant`s that sum up to it, or `Refused`."""

    region: Region
    frames: int
    most: int = 0
    """The region can have up to so many frames later on, by GrowKv. 0: as many as now."""
    preserved_bytes: int = 0
    """Of region `kv`: host memory for `KvPreserved`. At most what `RankWelcome` says."""


class Grant(Message, frozen=True):
    """Frames `first`… of a region, one file descriptor each, in order, at most 128 a message; they ride on it."""

    epoch: int
    region: Region
    first: int
    count: int


class Extent(msgspec.Struct, frozen=True):
    """One tensor inside a region."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Bytes from the start of the region."""
    bytes: int


class Recall(Message, frozen=True):
    """Before anything is loaded: is there a mirror of exactly these weights? Answered by `Recalled`.

    An empty fingerprint: they can only come from disk.
    """

    fingerprint: str


class Recalled(Message, frozen=True):
    """The manifest of the mirror with that fingerprint, kept for this rank; empty when there is none."""

    weights: list[Extent] = []
    state: list[Extent] = []
    model_digest: str = ""


class Restore(Message, frozen=True):
    """The rank's regions are reserved: fill weights and state, by name, from the mirror that was recalled.

    Answered by `Mirrored`, or by `Refused`: then the rank loads from disk and says `Loaded`.
    """

    weights: list[Extent]
    state: list[Extent]


class Loaded(Message, frozen=True):
    """The rank's weights and state are in place: make the mirror. Answered by `Mirrored`."""

    weights: list[Extent]
    state: list[Extent]
    fingerprint: str = ""
    """Under which the mirror may be recalled by an engine that starts later; empty: by none."""
    model_digest: str = ""
    """Digest of what the model keeps outside of its extents; a restored model must come to the same."""


class Mirrored(Message, frozen=True):
    """This rank's weights are in its frames and in a mirror."""

    bytes: int


class RankFailed(Message, frozen=True):
    """The rank cannot start or swap; `message` becomes the reason that users read. The rank raises after this."""

    code: Code
    message: str


class Mapped(Message, frozen=True):
    """No frame is missing any more, and the rank has closed its copies of the descriptors."""

    epoch: int


class MapFailed(Message, frozen=True):
    """Instead of `Mapped`: the rank cannot map what was granted. Answered by `Refused`, and by that to every rank."""

    epoch: int
    message: str


class Filled(Message, frozen=True):
    """Every rank has mapped and every byte of this epoch's frames is in place, on every device; the rank may run.

    Instead, `Refused` takes the swap-in back, at any time before this: the rank answers `Unmapped`.
    """

    epoch: int


class Unmapped(Message, frozen=True):
    """The rank has synchronised and unmapped every frame but those to keep, of one step of a swap-out; it holds no
    reference to any other.

    Also when `Refused` undoes a swap-in: what the rank had before it keeps.
    """

    epoch: int


class KvPreserved(Message, frozen=True):
    """Before the first `Unmapped` of a swap-out: what of region `kv` has to be the same after the swap-in.

    It holds until `Filled`. Without it nothing of the region has to be.
    """

    parts: list[tuple[int, int, int]]
    """Frame of the region, first byte in it, number of bytes; no two have a byte in common."""


# --- data plane: Triton stub <-> engine host --------------------------------------------------------------------------


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


FromStub = Attach | Detach
ToStub = Attached | Detached | Refused
FromHost = (
    HostHello | HostReady | HostFailed | Report | Activate | Drained | DrainRefused | SwappedOut | SwappedIn
    | SwapInFailed | OrderFailed | KvWanted | KvGrown | KvGrowFailed | KvShrunk
)  # fmt: skip
ToHost = HostWelcome | Drain | SwapOut | SwapIn | GrowKv | ShrinkKv | RefuseWaiting | QueueLimits | Shutdown | Refused
FromRank = RankHello | Recall | Reserve | Restore | Loaded | RankFailed | Mapped | MapFailed | KvPreserved | Unmapped
ToRank = RankWelcome | Recalled | Grant | Mirrored | Filled | Refused
StubToEngine = Submit | Embed | Abort
EngineToStub = Step
