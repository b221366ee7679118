"""What `GET /v1/models` and `GET /v1/devices` answer, as plain JSON values. Sizes in bytes, times in seconds."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.live_settings import LiveSettings
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.daemon.memory.mirror_store import MirrorStore
from swap_agent.daemon.residue.limits import EngineKey, GrowthLimits
from swap_agent.daemon.residue.meter import key_of, measure, residue_bytes
from swap_agent.daemon.residue.proc_memory import private_bytes
from swap_agent.models.settings import ModelSettings
from swap_agent.models.spec import ModelSpec
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.replica import Replica


@dataclass(frozen=True)
class ProcessUsage:
    """What an engine's processes take outside of frames."""

    private_bytes: int = 0
    """Of the host's memory."""
    residue_bytes: int | None = 0
    """Of its devices; None where that cannot be told."""


Usage = Mapping[EngineKey, ProcessUsage]


def measure_engines(engines: Mapping[str, Engine]) -> Usage:
    """Of every engine that has a process. Blocks: reads /proc, and on a GPU asks NVML."""
    found = {}
    for engine in list(engines.values()):
        if engine.process and (key := key_of(engine)):
            found[key] = ProcessUsage(private_bytes(engine.process.pid), residue_bytes(measure(engine)))
    return found


class Views:
    """Every method belongs to the agent's loop, on which the policy's state does not change meanwhile."""

    def __init__(
        self,
        ledger: Ledger,
        pools: Mapping[str, FramePool],
        engines: Mapping[str, Engine],
        specs: Mapping[str, ModelSpec],
        mirrors: MirrorStore,
        live_settings: LiveSettings,
        limits: GrowthLimits,
        host_limit_bytes: int | None,
    ) -> None:
        """`pools` by device, `engines` and `specs` by replica; `host_limit_bytes` None: no bound."""
        self._ledger = ledger
        self._pools = pools
        self._engines = engines
        self._specs = specs
        self._mirrors = mirrors
        self._live_settings = live_settings
        self._limits = limits
        self._host_limit_bytes = host_limit_bytes

    async def usage(self) -> Usage:
        """Measured now, in a thread."""
        return await asyncio.to_thread(measure_engines, dict(self._engines))

    @property
    def replicas(self) -> list[str]:
        """Names of all replicas that were ever loaded."""
        return sorted(self._ledger.replicas)

    def models(self, usage: Usage) -> list[dict[str, Any]]:
        """One entry per replica, by name. Sizes are sums over its ranks, `request_bytes` is per device."""
        return [self._model(self._ledger.replicas[name], usage) for name in self.replicas]

    def devices(self) -> list[dict[str, Any]]:
        """One entry per device; `models` are the replicas with an engine on it, and what they have of this device.

        `device_bytes` is what an engine holds, `reserved_bytes` what is set aside for it, `need_bytes` what it takes to
        be resident.
        """
        return [self._device(name) for name in self._pools]

    def host(self, usage: Usage) -> dict[str, Any]:
        """What mirrors and engine processes take of the host's memory, and their bound (null: none)."""
        used = self._mirrors.resident_bytes() + sum(engine.mirror_bytes for engine in self._engines.values())
        used += sum(one.private_bytes for one in usage.values())
        return {"used_bytes": used, "limit_bytes": self._host_limit_bytes}

    def _model(self, replica: Replica, usage: Usage) -> dict[str, Any]:
        engine = self._engines.get(replica.name)
        process = engine.process if engine else None
        ranks = engine.ranks if engine else []
        spec = self._specs.get(replica.name)
        key = key_of(engine) if engine else None
        used = usage.get(key, ProcessUsage()) if key else ProcessUsage()
        settings = spec.settings if spec else ModelSettings()
        frame_bytes = next(iter(self._pools.values())).device.frame_bytes
        limits = self._live_settings.queue_limits(settings)
        footprint_bytes = replica.footprint_frames * frame_bytes
        return {
            "name": replica.name,
            "state": replica.state.value,
            "devices": list(replica.devices),
            "device_bytes": engine.device_bytes if engine else 0,
            "mirror_bytes": self._mirror_bytes(replica.name) + (engine.mirror_bytes if engine else 0),
            "private_bytes": used.private_bytes,
            "residue_bytes": used.residue_bytes,
            "residue_at_ready_bytes": self._limits.baseline_bytes(key) if key else None,
            "residue_growth_bytes": self._limits.growth_bytes(key) if key else None,
            "outside_exceeded": self._limits.exceeded(key) if key else False,
            "in_flight": replica.activity.in_flight,
            "waiting": replica.activity.waiting,
            "idle_s": round(time.monotonic() - replica.activity.idle_since_s, 3) if replica.idle and process else 0.0,
            "engine_pid": process.pid if process else None,
            "failure": replica.failure,
            "request_bytes": settings.request_bytes,
            "request_share": self._share(settings.request_bytes),
            "limit_bytes": settings.cap_bytes,
            "limit_share": self._share(settings.cap_bytes),
            "footprint_bytes": footprint_bytes,
            "footprint_share": self._share(footprint_bytes or None, math.ceil),  # as a request it suffices
            "keep_alive_s": settings.keep_alive_s,
            "priority": settings.priority,
            "pinned": self._live_settings.pinned(spec) if spec else False,
            "min_residency_s": settings.min_residency_s,
            "max_queue": limits.max_queue,
            "queue_timeout_s": limits.queue_timeout_s,
            "allowed_devices": list(self._live_settings.allowed(spec)) if spec else [],
            "config_error": self._live_settings.errors.get(spec.model, "") if spec else "",
            "config_note": self._live_settings.note(spec) if spec else "",
            "weights_bytes": sum(rank.startup.weights_bytes for rank in ranks),
            "state_bytes": sum(rank.startup.state_bytes for rank in ranks),
            "kv_bytes": sum(rank.space.region_bytes("kv") for rank in ranks),
            "start": _start(engine) if engine else None,
            "kv": _kv(engine, frame_bytes) if engine else None,
            "preserved_kv_bytes": engine.preserved_kv_bytes if engine else 0,
            "swaps_in": engine.swaps_in if engine else 0,
            "swaps_out": engine.swaps_out if engine else 0,
            "last_swap_in": dataclasses.asdict(engine.last_swap_in) if engine and engine.last_swap_in else None,
        }

    def _share(self, size: int | None, rounded: Callable[[float], int] = round) -> float | None:
        """Of the device that shares in config.pbtxt are of, in thousandths."""
        device = next(iter(self._pools.values())).device
        return None if size is None else rounded(size * 1000 / (device.total_frames * device.frame_bytes)) / 1000

    def _mirror_bytes(self, replica: str) -> int:
        """Of the mirror that its engine runs on, or its next one is restored from. Several replicas may share it."""
        mirrors = list(self._ledger.mirrors.values())
        return sum(mirror.bytes for mirror in mirrors if replica in mirror.names)

    def _device(self, name: str) -> dict[str, Any]:
        pool = self._pools[name]
        device = pool.device
        arrived, left = device.host_to_device, device.device_to_host
        return {
            "name": name,
            "frames_total": device.total_frames,
            "frames_free": pool.free_frames,
            "frame_bytes": device.frame_bytes,
            "models": [
                {
                    "name": replica.name,
                    "state": replica.state.value,
                    "device_bytes": pool.held_by(replica.name) * device.frame_bytes,
                    "reserved_bytes": replica.reservation.frames * device.frame_bytes,
                    "need_bytes": replica.need_frames * device.frame_bytes,
                    "priority": replica.settings.priority,
                    "pinned": replica.settings.pinned,
                }
                for replica in sorted(self._ledger.on(name), key=lambda replica: replica.name)
            ],
            "resident_bytes": device.resident_bytes(),
            "outside_bytes": device.outside_bytes(),
            "outside_allowance_bytes": self._limits.allowance_bytes[name],
            "outside_exceeded": self._limits.device_exceeded(name),
            "copied_bytes": {
                "host_to_device": {"weights": arrived["weights", "swap_in"], "state": arrived["state", "swap_in"]},
                "device_to_host": {
                    "weights_mirrors": left["weights", "mirror"],
                    "weights_swap_outs": left["weights", "swap_out"],
                    "state": left["state", "swap_out"],
                },
            },
        }


def _start(engine: Engine) -> dict[str, Any] | None:
    """How the weights of the first rank came when the engine started, seconds. None: they have not yet."""
    brought = engine.ranks[0].startup.brought if engine.ranks else None
    return msgspec.structs.asdict(brought) if brought else None


def _kv(engine: Engine, frame_bytes: int) -> dict[str, int] | None:
    """Of a KV cache that grows: blocks now and at most, and bytes on each rank. None: it keeps its size."""
    kv = engine.kv
    if kv is None:
        return None
    return {
        "blocks": engine.kv_blocks,
        "most_blocks": kv.most_blocks,
        "least_bytes": kv.frames * frame_bytes,
        "wanted_bytes": engine.kv_wanted_frames * frame_bytes,
        "most_bytes": kv.most_frames * frame_bytes,
        "ranges": kv.ranges,
    }
