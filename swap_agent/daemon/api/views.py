"""What `GET /v1/models` and `GET /v1/devices` answer, as plain JSON values. Sizes in bytes, times in seconds."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from swap_agent.daemon.agent import Agent
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.residue.meter import key_of, measure, residue_bytes
from swap_agent.daemon.residue.proc_memory import private_bytes
from swap_agent.models.settings import ModelSettings
from swap_agent.policy.replica import Replica


def models(agent: Agent) -> list[dict[str, Any]]:
    """One entry per replica, by name. Sizes are sums over its ranks, `request_bytes` is per device."""
    replicas = agent.coordinator.ledger.replicas
    return [_model(agent, replicas[name]) for name in sorted(replicas)]


def devices(agent: Agent) -> list[dict[str, Any]]:
    """One entry per device; `models` are the replicas whose engines are on it, with what they have of this device.

    `device_bytes` is what an engine holds, `reserved_bytes` what is set aside for it, `need_bytes` what it takes to be
    resident.
    """
    return [_device(agent, name) for name in agent.pools]


def host(agent: Agent) -> dict[str, Any]:
    """What mirrors and engine processes take of the host's memory, and their bound (null: none)."""
    used = agent.mirrors.resident_bytes()
    for engine in list(agent.engines.values()):
        used += engine.mirror_bytes
        used += private_bytes(engine.process.pid) if engine.process else 0
    return {"used_bytes": used, "limit_bytes": agent.config.host_memory_bytes}


def _model(agent: Agent, replica: Replica) -> dict[str, Any]:
    engine = agent.engines.get(replica.name)
    process = engine.process if engine else None
    ranks = engine.ranks if engine else []
    spec = agent.specs.get(replica.name)
    growth, key = agent.residue_meter.limits, key_of(engine) if engine else None
    settings = spec.settings if spec else ModelSettings()
    frame_bytes = next(iter(agent.pools.values())).device.frame_bytes
    limits = agent.live_settings.queue_limits(settings)
    footprint_bytes = replica.footprint_frames * frame_bytes
    return {
        "name": replica.name,
        "state": replica.state.value,
        "devices": list(replica.devices),
        "device_bytes": engine.device_bytes if engine else 0,
        "mirror_bytes": _mirror_bytes(agent, replica.name) + (engine.mirror_bytes if engine else 0),
        "private_bytes": private_bytes(process.pid) if process else 0,
        "residue_bytes": residue_bytes(measure(engine)) if engine else 0,
        "residue_at_ready_bytes": growth.baseline_bytes(key) if key else None,
        "residue_growth_bytes": growth.growth_bytes(key) if key else None,
        "outside_exceeded": growth.exceeded(key) if key else False,
        "in_flight": replica.activity.in_flight,
        "waiting": replica.activity.waiting,
        "idle_s": round(time.monotonic() - replica.activity.idle_since_s, 3) if replica.idle and process else 0.0,
        "engine_pid": process.pid if process else None,
        "failure": replica.failure,
        "request_bytes": settings.request_bytes,
        "request_share": _share(agent, settings.request_bytes),
        "limit_bytes": settings.cap_bytes,
        "limit_share": _share(agent, settings.cap_bytes),
        "footprint_bytes": footprint_bytes,
        "footprint_share": _share(agent, footprint_bytes or None, math.ceil),  # as a request it suffices
        "keep_alive_s": settings.keep_alive_s,
        "priority": settings.priority,
        "pinned": agent.live_settings.pinned(spec) if spec else False,
        "min_residency_s": settings.min_residency_s,
        "max_queue": limits.max_queue,
        "queue_timeout_s": limits.queue_timeout_s,
        "allowed_devices": list(agent.live_settings.allowed(spec)) if spec else [],
        "config_error": agent.live_settings.errors.get(spec.model, "") if spec else "",
        "config_note": agent.live_settings.note(spec) if spec else "",
        "weights_bytes": sum(rank.startup.weights_bytes for rank in ranks),
        "state_bytes": sum(rank.startup.state_bytes for rank in ranks),
        "kv_bytes": sum(rank.space.region_bytes("kv") for rank in ranks),
        "kv": _kv(engine, frame_bytes) if engine else None,
        "preserved_kv_bytes": engine.preserved_kv_bytes if engine else 0,
        "swaps_in": engine.swaps_in if engine else 0,
        "swaps_out": engine.swaps_out if engine else 0,
        "last_swap_in": dataclasses.asdict(engine.last_swap_in) if engine and engine.last_swap_in else None,
    }


def _share(agent: Agent, size: int | None, rounded: Callable[[float], int] = round) -> float | None:
    """Of the device that shares in config.pbtxt are of, in thousandths."""
    device = next(iter(agent.pools.values())).device
    return None if size is None else rounded(size * 1000 / (device.total_frames * device.frame_bytes)) / 1000


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


def _mirror_bytes(agent: Agent, replica: str) -> int:
    """Of the mirror that its engine runs on or its next one would be restored from. Several replicas may share it."""
    mirrors = list(agent.coordinator.ledger.mirrors.values())
    return sum(mirror.bytes for mirror in mirrors if replica in mirror.names)


def _device(agent: Agent, name: str) -> dict[str, Any]:
    pool = agent.pools[name]
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
            for replica in sorted(agent.coordinator.ledger.on(name), key=lambda replica: replica.name)
        ],
        "resident_bytes": device.resident_bytes(),
        "outside_bytes": device.outside_bytes(),
        "outside_allowance_bytes": agent.residue_meter.limits.allowance_bytes[name],
        "outside_exceeded": agent.residue_meter.limits.device_exceeded(name),
        "copied_bytes": {
            "host_to_device": {"weights": arrived["weights", "swap_in"], "state": arrived["state", "swap_in"]},
            "device_to_host": {
                "weights_mirrors": left["weights", "mirror"],
                "weights_swap_outs": left["weights", "swap_out"],
                "state": left["state", "swap_out"],
            },
        },
    }
