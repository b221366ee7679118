"""Messages on `agent.sock`: Triton stubs (`Attach` …) and engine hosts (`HostHello` …) with the agent.

Sizes are bytes, durations seconds.
"""

from __future__ import annotations

import msgspec

from swap_agent.errors import Code
from swap_agent.wire.framing import Message
from swap_agent.wire.regions import Region

# --- Triton stub -> agent ---------------------------------------------------------------------------------------------


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


# --- engine host <-> agent --------------------------------------------------------------------------------------------


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
    """Most frames for which it has addresses."""
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
    A `Report` with none of these requests withdraws it.
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
    keep: list[list[dict[Region, int]]] = msgspec.field(default_factory=list)
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
    """The KV cache has `blocks` blocks now."""

    epoch: int
    blocks: int


class KvGrowFailed(Message, frozen=True):
    """The growth was undone: every rank has unmapped what came."""

    epoch: int
    message: str


class ShrinkKv(Message, frozen=True):
    """Have every rank unmap all frames of region `kv` but the first `frames`, and ack with `Unmapped`.

    `frames` is at least that of `KvCache`. From now on no request gets a block of the others. Requests that use some
    may go on for `within_s` seconds; then they are preempted, the youngest first, and computed again.
    While the gate is open, and no other order is under way.
    """

    epoch: int
    frames: int
    within_s: float | None = 0.0
    """None: no wait. What requests use stays, with all that lies before it; blocks beyond `frames` are
    handed out last from then on, so that more can go when this is ordered again."""


class KvShrunk(Message, frozen=True):
    """What the KV cache has now, and how many requests were preempted for it."""

    epoch: int
    frames: int
    """As ordered; or more, where `within_s` was None."""
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


FromStub = Attach | Detach
ToStub = Attached | Detached | Refused
FromHost = (
    HostHello | HostReady | HostFailed | Report | Activate | Drained | DrainRefused | SwappedOut | SwappedIn
    | SwapInFailed | OrderFailed | KvWanted | KvGrown | KvGrowFailed | KvShrunk
)  # fmt: skip
ToHost = HostWelcome | Drain | SwapOut | SwapIn | GrowKv | ShrinkKv | RefuseWaiting | QueueLimits | Shutdown | Refused
