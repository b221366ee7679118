"""The decision tree: `Coordinator.on_event(event) -> actions`, pure and synchronous.

Activations are served first come, first served. Idle memory is a cache: a model keeps its frames until somebody needs
them, and then loses as many as are needed: first idle models, least recently used first. When none is left and the head
of the queue has waited `TURN_S`, busy models take turns: the one that has been resident longest drains. One engine
starts at a time. A replica of several ranks has a device for each, and as many frames on every one: all or none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from swap_agent.policy import events as ev
from swap_agent.policy import eviction
from swap_agent.policy.eviction import LEAVING, TURN_S
from swap_agent.policy.host_memory import HostMemory
from swap_agent.policy.inventory import Device, Inventory, Mirror, Replica
from swap_agent.policy.lifecycle import State


class Coordinator:
    """Owns the states of all replicas and the reservations on all devices."""

    def __init__(self, devices: list[Device], host_limit_bytes: int | None = None) -> None:
        """`host_limit_bytes` bounds mirrors and engine processes together; None: no bound."""
        self._host_memory = HostMemory(host_limit_bytes)
        self.inventory = Inventory({device.name: device for device in devices})
        self._queue: dict[str, float] = {}
        """Replicas that wait for activation, in order, with the time since which they wait."""
        self._growth: dict[tuple[str, int], int] = {}
        """Frames that a rank of a starting replica wants beyond its reservation."""
        self._actions: list[ev.Action] = []

    def on_event(self, event: ev.Event) -> list[ev.Action]:
        """Take note of `event`, decide, and return the orders that follow, to be carried out in this order.

        1. Take note: each event type has one handler below. Answers with an old epoch are dropped.
        2. Follow up on wishes that had to wait: unload, purge (`_follow_wishes`).
        3. Swap out what has been idle for its keep-alive (`_expire`).
        4. Serve the queue, making room where needed (`_serve_queue`).
        5. Keep within the host's memory (`_fit_host_memory`), drop mirrors that nobody needs (`_drop_mirrors`).
        """
        self._actions = []
        if not isinstance(event, ev.Tick):
            replica = self.inventory.replicas.get(event.name)  # type: ignore[attr-defined]
            if replica is None:
                replica = Replica(event.name)  # type: ignore[attr-defined]
                if isinstance(event, ev.Registered):
                    self.inventory.replicas[replica.name] = replica
            _HANDLERS[type(event)](self, replica, event)
        for replica in list(self.inventory.replicas.values()):
            self._follow_wishes(replica, event.now_s)
            self._expire(replica, event.now_s)
        self._serve_queue(event.now_s)
        self._fit_host_memory()
        self._drop_mirrors()
        return self._actions

    # --- 1. notes -----------------------------------------------------------------------------------------------------

    def _registered(self, replica: Replica, event: ev.Registered) -> None:
        replica.ranks = event.ranks
        replica.request_frames = event.request_frames
        replica.keep_alive_s = event.keep_alive_s

    def _load_wanted(self, replica: Replica, event: ev.LoadWanted) -> None:
        replica.unload_wanted = replica.purge_wanted = replica.drop_wanted = False
        replica.load_wanted = replica.state is not State.RESIDENT
        if replica.state is State.RESIDENT:
            replica.idle_since_s = event.now_s
            self._actions.append(ev.Activated(replica.name))

    def _unload_wanted(self, replica: Replica, event: ev.UnloadWanted) -> None:
        if replica.load_wanted and replica.state not in (State.STARTING, State.SWAPPING_IN):
            self._actions.append(ev.Refuse(replica.name, f"{replica.name} was unloaded while its load waited"))
        replica.load_wanted = False
        replica.unload_wanted = True
        replica.purge_wanted |= event.purge

    def _load_reported(self, replica: Replica, event: ev.LoadReported) -> None:
        was_busy = not replica.idle
        replica.in_flight, replica.waiting = event.in_flight, event.waiting
        if replica.idle and was_busy:
            replica.idle_since_s = event.now_s

    def _frames_wanted(self, replica: Replica, event: ev.FramesWanted) -> None:
        rank = event.rank
        if replica.state is not State.STARTING:
            self._actions.append(ev.RefuseFrames(replica.name, f"{replica.name} is {replica.state.value}", rank))
            return
        replica.footprints[rank] = replica.footprints.get(rank, 0) + event.frames
        beyond = replica.footprints[rank] - replica.reserved_frames
        if beyond <= 0:
            self._actions.append(ev.GrantFrames(replica.name, event.frames, rank))
        elif replica.request_frames is not None:
            message = f"{beyond} frames more than GPU_MEMORY_REQUEST allows"
            self._actions.append(ev.RefuseFrames(replica.name, message, rank))
        else:
            self._growth[replica.name, rank] = event.frames

    def _host_memory_wanted(self, replica: Replica, event: ev.HostMemoryWanted) -> None:
        self._host_memory.wanted[replica.name] = event.total_bytes

    def _host_memory_measured(self, replica: Replica, event: ev.HostMemoryMeasured) -> None:
        if replica.state not in (State.COLD, State.FAILED):
            replica.host_bytes = event.total_bytes

    def _mirror_wanted(self, replica: Replica, event: ev.MirrorWanted) -> None:
        self._own_mirror((replica.name, event.rank), event.mirror)

    def _mirror_kept(self, replica: Replica, event: ev.MirrorKept) -> None:
        self.inventory.mirrors[event.mirror] = Mirror(event.mirror, event.bytes, idle_since_s=event.now_s)
        replica.host_bytes = max(0, replica.host_bytes - event.bytes)
        self._host_memory.kept(replica.name, event.bytes)
        self._own_mirror((replica.name, event.rank), event.mirror)

    def _own_mirror(self, rank: tuple[str, int], name: str) -> None:
        """This mirror and no other is the rank's; an empty name: none is."""
        for mirror in self.inventory.mirrors.values():
            change = set.add if mirror.name == name else set.discard
            change(mirror.users, rank)
            change(mirror.owners, rank)
            mirror.drop_wanted = mirror.drop_wanted and mirror.name != name

    def _forget_mirrors(self, replica: Replica) -> None:
        for mirror in self.inventory.mirrors.values():
            mirror.owners = {owner for owner in mirror.owners if owner[0] != replica.name}

    def _mirror_voided(self, replica: Replica, event: ev.MirrorVoided) -> None:
        if event.mirror in self.inventory.mirrors:
            self.inventory.mirrors[event.mirror].owners.clear()

    def _mirror_dropped(self, replica: Replica, event: ev.MirrorDropped) -> None:
        del self.inventory.mirrors[event.name]

    def _engine_ready(self, replica: Replica, event: ev.EngineReady) -> None:
        replica.move(State.RESIDENT)
        self._settle(replica, event.now_s)

    def _drained(self, replica: Replica, event: ev.Drained) -> None:
        if event.epoch == replica.epoch and replica.state is State.DRAINING:
            replica.move(State.SWAPPING_OUT)
            self._actions.append(ev.SwapOut(replica.name, replica.epoch, replica.keep_frames))

    def _drain_refused(self, replica: Replica, event: ev.DrainRefused) -> None:
        if event.epoch == replica.epoch and replica.state is State.DRAINING:
            replica.move(State.RESIDENT)
            replica.in_flight = max(replica.in_flight, 1)
            replica.drop_wanted = False
            if replica.load_wanted:
                replica.load_wanted = False
                self._actions.append(ev.Activated(replica.name))

    def _swapped_out(self, replica: Replica, event: ev.SwappedOut) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_OUT:
            replica.move(State.SWAPPED)
            replica.reserved_frames = replica.keep_frames

    def _swapped_in(self, replica: Replica, event: ev.SwappedIn) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_IN:
            replica.move(State.RESIDENT)
            self._settle(replica, event.now_s)

    def _swap_in_failed(self, replica: Replica, event: ev.SwapInFailed) -> None:
        if event.epoch == replica.epoch and replica.state is State.SWAPPING_IN:
            replica.move(State.SWAPPED)
            replica.reserved_frames = replica.keep_frames
            replica.load_wanted = False
            replica.waiting = 0  # they are refused; who comes later has it tried again
            self._actions.append(ev.Refuse(replica.name, event.reason))

    def _engine_exited(self, replica: Replica, event: ev.EngineExited) -> None:
        replica.move(State.FAILED)
        if replica.stopping:
            replica.move(State.COLD)
        else:
            replica.failure = event.reason
            self._actions.append(ev.Refuse(replica.name, event.reason))
        replica.devices = ()
        replica.footprints = {}
        replica.reserved_frames = replica.in_flight = replica.waiting = replica.host_bytes = 0
        for mirror in self.inventory.mirrors.values():
            if replica.name in {name for name, _ in mirror.users}:
                mirror.users = {user for user in mirror.users if user[0] != replica.name}
                mirror.idle_since_s = event.now_s
        if replica.purge_wanted:
            self._forget_mirrors(replica)
        replica.stopping = replica.unload_wanted = replica.purge_wanted = replica.drop_wanted = False
        # A load that came while the old engine was being stopped is still wanted; one that the failure answers is not.
        replica.load_wanted = replica.load_wanted and not replica.failure
        self._growth = {key: frames for key, frames in self._growth.items() if key[0] != replica.name}
        self._host_memory.wanted.pop(replica.name, None)

    def _settle(self, replica: Replica, now_s: float) -> None:
        replica.load_wanted = False
        replica.waiting = 0  # the gate is open: the host's next report counts anew
        replica.idle_since_s = replica.resident_since_s = now_s
        self._actions.append(ev.Activated(replica.name))

    # --- 2. and 3. wishes and timers ----------------------------------------------------------------------------------

    def _follow_wishes(self, replica: Replica, now_s: float) -> None:
        if replica.unload_wanted and replica.state is State.RESIDENT:
            self._drain(replica, 0, wait=True, reason="unload")
        elif replica.unload_wanted and replica.state is State.SWAPPED and replica.reserved_frames:
            self._release(replica, 0)
        elif replica.unload_wanted and replica.state in (State.SWAPPED, State.COLD, State.FAILED):
            replica.unload_wanted = False
        if replica.drop_wanted and replica.state is State.SWAPPED and not replica.stopping:
            self._drop(replica)
        if replica.purge_wanted and not replica.unload_wanted and not replica.stopping:
            if replica.state is State.SWAPPED:
                self._stop(replica, f"model {replica.name} was unloaded")
            elif replica.state in (State.COLD, State.FAILED):
                replica.purge_wanted = False
                self._forget_mirrors(replica)
                if replica.state is State.FAILED:
                    replica.move(State.COLD)

    def _drop(self, replica: Replica) -> None:
        """End a parked engine for the sake of host memory, unless somebody has come to want it."""
        replica.drop_wanted = False
        if not replica.activation_wanted:
            self._stop(replica, f"{replica.name} becomes COLD: --host-memory is short, and it was idle for longest")

    def _stop(self, replica: Replica, reason: str) -> None:
        replica.stopping = True
        self._actions.append(ev.StopEngine(replica.name, reason))

    def _expire(self, replica: Replica, now_s: float) -> None:
        if replica.keep_alive_s is None or not replica.idle or now_s - replica.idle_since_s < replica.keep_alive_s:
            return
        if replica.state is State.RESIDENT:
            self._drain(replica, 0, wait=False, reason="keep_alive")
        elif replica.state is State.SWAPPED and replica.reserved_frames and not replica.load_wanted:
            self._release(replica, 0)

    def _drain(self, replica: Replica, keep_frames: int, *, wait: bool, reason: str) -> None:
        replica.move(State.DRAINING)
        replica.epoch += 1
        replica.keep_frames = keep_frames
        self._actions.append(ev.Drain(replica.name, replica.epoch, wait, reason))

    def _release(self, replica: Replica, keep_frames: int) -> None:
        """Take frames from a model that is SWAPPED already."""
        replica.move(State.SWAPPING_OUT)
        replica.epoch += 1
        replica.keep_frames = keep_frames
        self._actions.append(ev.SwapOut(replica.name, replica.epoch, keep_frames))

    # --- 4. the queue -------------------------------------------------------------------------------------------------

    def _serve_queue(self, now_s: float) -> None:
        """Decide for each waiting replica, in order of arrival.

        1. A starting engine that wants more frames goes first: nothing else can start before it is done.
        2. Withdrawn wishes leave the queue, new ones enter at its end.
        3. A replica that leaves the device keeps its place until it is SWAPPED.
        4. A COLD or FAILED one waits for the running engine start; meanwhile others may pass.
        5. One that too few devices can ever hold is refused.
        6. One that fits, on as many devices as it has ranks, is activated.
        7. Otherwise room is made on its devices, and nobody behind it may take room there.
        """
        blocked: set[str] = set()
        for (name, rank), frames in list(self._growth.items()):  # 1
            self._grow(self.inventory.replicas[name], rank, frames, blocked, now_s)
        for replica in self.inventory.replicas.values():  # 2
            if replica.activation_wanted and replica.state in (State.COLD, State.FAILED, State.SWAPPED, *LEAVING):
                self._queue.setdefault(replica.name, now_s)
            else:
                self._queue.pop(replica.name, None)
        for name, since_s in list(self._queue.items()):
            replica = self.inventory.replicas[name]
            if replica.state in LEAVING or replica.stopping:  # 3
                continue
            if replica.state is State.SWAPPED:
                candidates = list(replica.devices)
            elif any(other.state is State.STARTING for other in self.inventory.replicas.values()):  # 4
                continue
            else:
                candidates = list(self.inventory.devices)
            self._activate(replica, candidates, since_s, blocked, now_s)

    def _activate(
        self, replica: Replica, candidates: list[str], since_s: float, blocked: set[str], now_s: float
    ) -> None:
        need = replica.need_frames
        missing = replica.missing_frames
        able = [device for device in candidates if self.inventory.devices[device].frames >= need]
        if len(able) < replica.ranks:  # 5
            replica.load_wanted = False
            replica.waiting = 0
            self._queue.pop(replica.name)
            self._actions.append(ev.Refuse(replica.name, self._why_never(replica, len(able))))
            return
        fitting = [device for device in able if device not in blocked and self.inventory.free_frames(device) >= missing]
        if len(fitting) >= replica.ranks:  # 6
            fullest_first = need > 0
            fitting.sort(key=self.inventory.free_frames, reverse=not fullest_first)
            self._queue.pop(replica.name)
            self._admit(replica, fitting[: replica.ranks], need)
            return
        able.sort(key=lambda device: self._within_reach(device, now_s - since_s), reverse=True)  # 7
        chosen = able[: replica.ranks]
        if blocked.isdisjoint(chosen):
            self._make_room(chosen, replica, missing, since_s, now_s)
        blocked.update(chosen)

    def _why_never(self, replica: Replica, able: int) -> str:
        """One line for a person: only `able` devices of the node could hold a rank of this replica."""
        devices = self.inventory.devices.values()
        if replica.ranks > len(devices):
            return f"{replica.name} has {replica.ranks} ranks and needs a device for each, this node has {len(devices)}"
        if replica.ranks > 1:
            return (
                f"{replica.name} needs {replica.need_frames} frames on each of {replica.ranks} devices; "
                f"{able} of {len(devices)} devices have as many"
            )
        largest = max(device.frames for device in devices)
        return f"{replica.name} needs {replica.need_frames} frames; the largest device has {largest}"

    def _admit(self, replica: Replica, devices: list[str], need: int) -> None:
        replica.reserved_frames = need
        replica.unload_wanted = False
        if replica.state is State.SWAPPED:
            replica.move(State.SWAPPING_IN)
            replica.epoch += 1
            self._actions.append(ev.SwapIn(replica.name, replica.epoch))
        else:
            replica.move(State.STARTING)
            # In the order of the node: the number of a rank says nothing about how full its device was.
            replica.devices = tuple(device for device in self.inventory.devices if device in devices)
            replica.failure = ""
            self._actions.append(ev.StartEngine(replica.name, replica.devices))

    def _grow(self, replica: Replica, rank: int, frames: int, blocked: set[str], now_s: float) -> None:
        footprint = replica.footprints[rank]
        beyond = max(0, footprint - replica.reserved_frames)
        smallest = min(replica.devices, key=lambda device: self.inventory.devices[device].frames)
        total = self.inventory.devices[smallest].frames
        if footprint > total:
            del self._growth[replica.name, rank]
            message = f"it needs at least {footprint} frames of {smallest}, which has {total}"
            self._actions.append(ev.RefuseFrames(replica.name, message, rank))
        elif all(self.inventory.free_frames(device) >= beyond for device in replica.devices):
            del self._growth[replica.name, rank]
            replica.reserved_frames += beyond
            self._actions.append(ev.GrantFrames(replica.name, frames, rank))
        else:
            self._make_room(replica.devices, replica, beyond, now_s - TURN_S, now_s)
            blocked.update(replica.devices)

    def _make_room(self, devices: Iterable[str], who: Replica, frames: int, since_s: float, now_s: float) -> None:
        """Have others give back what `who` lacks, no more: until `frames` frames of each of `devices` will be free."""
        keeps: dict[str, int] = {}
        """What every victim is to keep on each of its devices."""
        for device in devices:
            on_device = self.inventory.on(device)
            coming = self.inventory.free_frames(device) + eviction.coming_frames(on_device)
            coming += sum(r.reserved_frames - keeps[r.name] for r in on_device if r.name in keeps)
            for victim in eviction.victims(on_device, who, list(self._queue), now_s - since_s, now_s):
                if coming >= frames:
                    break
                left = keeps.get(victim.name, victim.reserved_frames)
                # What is reserved beyond the footprint is no memory that could be kept.
                keeps[victim.name] = min(victim.footprint_frames, max(0, left - (frames - coming)))
                coming += left - keeps[victim.name]
        for name, keep in keeps.items():
            victim = self.inventory.replicas[name]
            if victim.state is State.SWAPPED:
                self._release(victim, keep)
            else:
                self._drain(victim, keep, wait=not victim.idle, reason="eviction" if victim.idle else "turn")

    def _within_reach(self, device: str, waited_s: float) -> tuple[int, int]:
        """Frames that could be free soon, and frames that are: where they are as many, who has more costs less."""
        free = self.inventory.free_frames(device)
        return free + eviction.reclaimable_frames(self.inventory.on(device), waited_s), free

    # --- 5. host memory -----------------------------------------------------------------------------------------------

    def _fit_host_memory(self) -> None:
        for name, message in self._host_memory.refused():
            self._actions.append(ev.RefuseHostMemory(name, message))
        for name in self._host_memory.granted(self.inventory):
            self._actions.append(ev.GrantHostMemory(name))
        for victim in self._host_memory.victims(self.inventory):
            victim.drop_wanted = True
            if isinstance(victim, Mirror):
                continue
            if victim.state is State.RESIDENT:
                self._drain(victim, 0, wait=False, reason="host_memory")
            else:
                self._drop(victim)

    def _drop_mirrors(self) -> None:
        for mirror in self.inventory.mirrors.values():
            if not mirror.users and not mirror.dropping and (mirror.drop_wanted or not mirror.owners):
                reason = ""
                if mirror.drop_wanted:
                    owners = ", ".join(sorted({name for name, _ in mirror.owners}))
                    reason = f"the mirror of {owners} is dropped: --host-memory is short, and it was idle for longest"
                mirror.drop_wanted = mirror.dropping = True
                self._actions.append(ev.DropMirror(mirror.name, reason))


_HANDLERS: dict[type[ev.Event], Callable[..., None]] = {
    ev.Registered: Coordinator._registered,
    ev.LoadWanted: Coordinator._load_wanted,
    ev.UnloadWanted: Coordinator._unload_wanted,
    ev.LoadReported: Coordinator._load_reported,
    ev.FramesWanted: Coordinator._frames_wanted,
    ev.HostMemoryWanted: Coordinator._host_memory_wanted,
    ev.HostMemoryMeasured: Coordinator._host_memory_measured,
    ev.MirrorWanted: Coordinator._mirror_wanted,
    ev.MirrorKept: Coordinator._mirror_kept,
    ev.MirrorVoided: Coordinator._mirror_voided,
    ev.MirrorDropped: Coordinator._mirror_dropped,
    ev.EngineReady: Coordinator._engine_ready,
    ev.Drained: Coordinator._drained,
    ev.DrainRefused: Coordinator._drain_refused,
    ev.SwappedOut: Coordinator._swapped_out,
    ev.SwappedIn: Coordinator._swapped_in,
    ev.SwapInFailed: Coordinator._swap_in_failed,
    ev.EngineExited: Coordinator._engine_exited,
}
