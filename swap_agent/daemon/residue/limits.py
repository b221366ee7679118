"""Whether engines keep within what they may take outside of frames. Pure: what was measured, and when, comes in.

Every reading of an engine is compared with the first one, taken when it became ready (docs/memory.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from swap_agent.units import format_bytes


@dataclass(frozen=True)
class Usage:
    """What an engine's processes use on one device, by the count of the operating system or of NVML."""

    bytes: int
    frame_bytes: int = 0
    """Frames that they map, which `bytes` may contain or not; 0 where it is known not to."""

    @property
    def outside_bytes(self) -> int:
        """Outside of frames: exact where no frames are mapped, else taking for granted that `bytes` contains them."""
        return self.bytes - self.frame_bytes if self.bytes >= self.frame_bytes else self.bytes

    def growth_bytes(self, since: Usage) -> int:
        """Least growth outside of frames since then, whether `bytes` contains the frames or not."""
        return self.bytes - since.bytes - max(0, self.frame_bytes - since.frame_bytes)


@dataclass(frozen=True)
class EngineKey:
    """One engine of a replica; the next one has another process."""

    replica: str
    pid: int


@dataclass(frozen=True)
class Measurement:
    """All devices and all engines that are ready, measured together."""

    engines: Mapping[EngineKey, Mapping[str, Usage | None]]
    """Usage on each of an engine's devices, by name; None: unknown."""
    devices: Mapping[str, int | None]
    """Bytes in use outside of frames on each device; None: unknown, or an engine starts or ends there."""


@dataclass(frozen=True)
class EngineExceeded:
    """An engine has grown beyond its allowance. Said once, until it is back within."""

    engine: EngineKey
    words: str


@dataclass(frozen=True)
class Stop:
    """An engine has stayed beyond its allowance for the grace period, by the count of its own processes: stop it."""

    engine: EngineKey
    words: str


@dataclass(frozen=True)
class DeviceExceeded:
    """More is in use on a device than its engines may have added, and none of them is proven to have. Said once."""

    device: str
    words: str


Finding = EngineExceeded | Stop | DeviceExceeded


@dataclass
class _Account:
    """What an engine may add on one device to what it had when it became ready."""

    baseline: Usage
    now: Usage
    since_s: float | None = None
    """Since when every reading has been beyond the allowance."""
    stopped: bool = False

    @property
    def growth_bytes(self) -> int:
        return self.now.growth_bytes(self.baseline)


@dataclass
class _DeviceAccount:
    engines: frozenset[EngineKey]
    baseline_bytes: int
    """In use outside of frames since exactly these engines are there."""
    exceeded: bool = False


@dataclass
class GrowthLimits:
    """The growth of all engines against their allowances. `note` belongs to one thread; any thread may ask the rest."""

    allowance_bytes: Mapping[str, int]
    """By device."""
    grace_s: float
    _accounts: dict[tuple[EngineKey, str], _Account] = field(default_factory=dict)
    _devices: dict[str, _DeviceAccount] = field(default_factory=dict)

    def note(self, now_s: float, reading: Measurement) -> list[Finding]:
        """What a new reading shows.

        1. Engines that are gone are forgotten; the first reading of an engine is its baseline.
        2. One without a reading is proven of nothing: its grace period starts anew.
        3. Beyond the allowance: reported. Still so after the grace period: to be stopped, once. Back within: forgiven.
        4. A device is compared with what was in use when its engines last changed. Beyond one allowance for each of
           them, while none of them is beyond its own: reported. No engine is stopped for that.
        """
        self._accounts = {key: one for key, one in self._accounts.items() if key[0] in reading.engines}  # 1
        findings: list[Finding] = []
        for engine, usages in reading.engines.items():
            for device, usage in usages.items():
                findings += self._note_engine(now_s, engine, device, usage)
        for device, outside_bytes in reading.devices.items():
            there = frozenset(engine for engine, usages in reading.engines.items() if device in usages)
            findings += self._note_device(device, outside_bytes, there)
        return findings

    def _note_engine(self, now_s: float, engine: EngineKey, device: str, usage: Usage | None) -> list[Finding]:
        account = self._accounts.get((engine, device))
        if usage is None:  # 2
            if account:
                account.since_s = None
            return []
        if account is None:
            self._accounts[engine, device] = _Account(usage, usage)
            return []
        account.now = usage
        if account.growth_bytes <= self.allowance_bytes[device]:  # 3
            account.since_s = None
            return []
        words = (
            f"{engine.replica}: outside of frames its engine takes {format_bytes(account.growth_bytes)} more on "
            f"{device} than when it became ready; --outside-allowance is {format_bytes(self.allowance_bytes[device])}"
        )
        findings: list[Finding] = []
        if account.since_s is None:
            account.since_s = now_s
            findings.append(EngineExceeded(engine, words))
        if now_s - account.since_s >= self.grace_s and not account.stopped:
            account.stopped = True
            findings.append(Stop(engine, f"{words}, for {now_s - account.since_s:.0f} s: it was stopped"))
        return findings

    def _note_device(self, device: str, outside_bytes: int | None, there: frozenset[EngineKey]) -> list[Finding]:
        if outside_bytes is None:
            return []
        account = self._devices.get(device)
        if account is None or account.engines != there:  # 4
            self._devices[device] = _DeviceAccount(there, outside_bytes)
            return []
        growth_bytes = outside_bytes - account.baseline_bytes
        was, allowed_bytes = account.exceeded, self.allowance_bytes[device] * max(1, len(there))
        named = any(one.since_s is not None for (_, where), one in self._accounts.items() if where == device)
        account.exceeded = growth_bytes > allowed_bytes and not named
        if was or not account.exceeded:
            return []
        words = (
            f"{device}: outside of frames {format_bytes(growth_bytes)} more are in use than when its engines last "
            f"changed; none of its {len(there)} engines is proven to be the one: no engine is stopped"
        )
        return [DeviceExceeded(device, words)]

    # --- for reports --------------------------------------------------------------------------------------------------

    def baseline_bytes(self, engine: EngineKey) -> int | None:
        """Outside of frames when it became ready, on all its devices; None: unknown."""
        accounts = self._of(engine)
        return sum(one.baseline.outside_bytes for one in accounts) if accounts else None

    def growth_bytes(self, engine: EngineKey) -> int | None:
        """Proven growth since then, on all its devices; None: unknown."""
        accounts = self._of(engine)
        return sum(max(0, one.growth_bytes) for one in accounts) if accounts else None

    def exceeded(self, engine: EngineKey) -> bool:
        """Whether it was beyond its allowance at the last reading."""
        return any(one.since_s is not None for one in self._of(engine))

    def device_exceeded(self, device: str) -> bool:
        """Whether more was in use than its engines may have added, none of them proven to have, at the last reading."""
        return device in self._devices and self._devices[device].exceeded

    def _of(self, engine: EngineKey) -> list[_Account]:
        return [one for (key, _), one in list(self._accounts.items()) if key == engine]
