"""What engines use outside of frames, measured at intervals.

On a simulated device: the private memory of an engine's processes, as the operating system counts it. On a GPU: what
NVML counts for them, which is advice (docs/memory.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.residue.limits import (
    DeviceExceeded,
    EngineExceeded,
    EngineKey,
    GrowthLimits,
    Measurement,
    Stop,
    Usage,
)
from swap_agent.daemon.residue.proc_memory import private_bytes_by_process
from swap_agent.device.api import DeviceMemory
from swap_agent.device.nvml import used_by_process
from swap_agent.policy import events as ev

log = logging.getLogger(__name__)

_LEAST_ALLOWANCE_BYTES = 1 << 30
_ALLOWANCE_SHARE = 20


def measure(engine: Engine) -> dict[str, Usage | None]:
    """On each of its devices, by name. A process that is no rank counts on the first one. Blocks for milliseconds."""
    if engine.process is None:
        return {}
    processes = private_bytes_by_process(engine.process.pid)
    ranks = dict(engine.connected)
    found: dict[str, Usage | None] = {}
    for number, pool in enumerate(engine.pools):
        device = pool.device
        if device.pci_bus_id is None:
            others = {rank.pid for other, rank in ranks.items() if other != number}
            own = ranks[number].pid if number in ranks else None
            counted = [size for pid, size in processes.items() if (pid == own if number else pid not in others)]
            found[device.name] = Usage(sum(counted))
        else:
            used = used_by_process(device.pci_bus_id)
            counted = [used[pid] for pid in processes if pid in used] if used is not None else []
            frame_bytes = ranks[number].space.device_bytes if number in ranks else 0
            found[device.name] = Usage(sum(counted), frame_bytes) if counted else None
    return found


def residue_bytes(usages: Mapping[str, Usage | None]) -> int | None:
    """Outside of frames, on all devices; None: unknown."""
    known = [usage.outside_bytes for usage in usages.values() if usage is not None]
    return sum(known) if len(known) == len(usages) else None


def key_of(engine: Engine) -> EngineKey | None:
    """By what its limits are kept, once it has a process."""
    return EngineKey(engine.spec.replica, engine.process.pid) if engine.process else None


class ResidueMeter:
    """Measures at intervals; names engines beyond the allowance, and tells the policy of those that stay there."""

    def __init__(
        self,
        config: AgentConfig,
        pools: Mapping[str, FramePool],
        engines: Mapping[str, Engine],
        post: Callable[[ev.Event], None],
    ) -> None:
        self._engines = engines
        self._post = post
        self._budgeted = config.residue_budget_bytes is not None
        self._devices = {name: pool.device for name, pool in pools.items()}
        allowances = {
            name: default_allowance_bytes(device)
            if config.outside_allowance_bytes is None
            else config.outside_allowance_bytes
            for name, device in self._devices.items()
        }
        self.limits = GrowthLimits(allowances, config.outside_grace_s)
        self._look_s = config.timeouts.baseline_s
        self._pause_s = min(config.timeouts.residue_s, max(self._look_s, config.outside_grace_s / 3))

    async def run(self) -> None:
        """For as long as the agent runs: when an engine becomes ready or ends, and at intervals."""
        known: set[EngineKey] = set()
        due_s = 0.0
        while True:
            await asyncio.sleep(self._look_s)
            ready = {
                key: engine
                for engine in self._engines.values()
                if engine.ready and not engine.stopping and not engine.releasing and (key := key_of(engine))
            }
            if known == ready.keys() and time.monotonic() < due_s:
                continue
            known, due_s = set(ready), time.monotonic() + self._pause_s
            unsettled = {
                pool.device.name
                for engine in self._engines.values()
                if key_of(engine) not in ready
                for pool in engine.pools
            }
            try:
                reading = await asyncio.to_thread(self._read, ready, unsettled)
            except OSError as error:
                log.error("what engines take outside of frames cannot be measured: %s", error)
                continue
            for finding in self.limits.note(time.monotonic(), reading):
                match finding:
                    case EngineExceeded() | DeviceExceeded():
                        log.warning("%s", finding.words)
                    case Stop():
                        engine = ready[finding.engine]
                        if self._engines.get(engine.spec.replica) is engine and not engine.stopping:
                            log.error("%s", finding.words)
                            self._post(ev.OutsideExceeded(time.monotonic(), engine.spec.replica, finding.words))
            for key, usages in reading.engines.items() if self._budgeted else ():
                if self._engines.get(key.replica) is ready[key]:
                    known_bytes = {name: usage.outside_bytes for name, usage in usages.items() if usage is not None}
                    self._post(ev.ResidueMeasured(time.monotonic(), key.replica, known_bytes))

    def _read(self, ready: Mapping[EngineKey, Engine], unsettled: set[str]) -> Measurement:
        return Measurement(
            {key: measure(engine) for key, engine in ready.items()},
            {name: None if name in unsettled else device.outside_bytes() for name, device in self._devices.items()},
        )


def default_allowance_bytes(device: DeviceMemory) -> int:
    """What an engine may add outside of frames: 1 GiB or 5 % of the device, whichever is more."""
    return max(_LEAST_ALLOWANCE_BYTES, device.total_frames * device.frame_bytes // _ALLOWANCE_SHARE)
