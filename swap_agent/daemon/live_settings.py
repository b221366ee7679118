"""What models declare, kept in force while they run.

A model's config.pbtxt in a repository of the agent's own is the truth; without one, what Triton told the stub is. What
was good last stays in force for as long as a file is half-written, gone, unreadable or wrong.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from swap_agent.daemon.config import AgentConfig
from swap_agent.daemon.engines.engine import Engine
from swap_agent.daemon.memory.frame_pool import FramePool
from swap_agent.errors import InvalidModel
from swap_agent.models.fit import Fit, fit
from swap_agent.models.repository import CONFIG, SETTLE_S, ModelFile, Repository
from swap_agent.models.settings import ModelSettings, read_settings
from swap_agent.models.spec import ModelSpec, registered
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Ledger
from swap_agent.policy.placement import blocked_by_pins
from swap_agent.policy.states import State
from swap_agent.units import format_bytes
from swap_agent.wire import control

log = logging.getLogger(__name__)


class LiveSettings:
    """Reads, checks and applies settings; `specs` holds those in force. Lives on the agent's loop."""

    def __init__(
        self,
        config: AgentConfig,
        pools: Mapping[str, FramePool],
        engines: Mapping[str, Engine],
        specs: dict[str, ModelSpec],
        ledger: Ledger,
        post: Callable[[ev.Event], None],
        in_use: Callable[[str], bool],
    ) -> None:
        """`pools` by device, `engines` and `specs` by replica. `in_use`: whether a stub uses a replica."""
        self._config = config
        self._engines = engines
        self._specs = specs
        self._ledger = ledger
        self._post = post
        self._in_use = in_use
        devices = [pool.device for pool in pools.values()]
        self._frame_bytes = devices[0].frame_bytes
        self._sizes = {device.name: device.total_frames * device.frame_bytes for device in devices}
        self._repository = Repository(config.model_repositories)
        self._looking = asyncio.Lock()
        self._files: Mapping[str, ModelFile] = {}
        """As of the last look, by model."""
        self._followed: dict[str, ModelFile] = {}
        """The file that a model's replicas were last told of; one that could not be put in force is tried again."""
        self._pins: dict[str, bool] = {}
        """Pinned or not by hand, by model."""
        self._registered: dict[str, ev.Registered] = {}
        """What the policy was told last, by replica."""
        self.errors: dict[str, str] = {}
        """Why a model's file is not in force, one line, by model."""

    # --- the repository -----------------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look at the repositories again and again; what is found is in force within one interval."""
        pause_s = max(0.01, self._config.poll_interval_s - SETTLE_S)
        while True:
            try:
                await self.refresh()
            except Exception:  # a bug; what is in force stays so
                log.exception("the model repository could not be followed")
            await asyncio.sleep(pause_s)

    async def refresh(self) -> None:
        """Look at the repositories now, and apply what is found."""
        if not self._config.model_repositories:
            return
        async with self._looking:
            look = await asyncio.to_thread(self._repository.look)
            for model, file in look.files.items():
                known = self._files.get(model)
                if known and file.parameters is not None and file.mark != known.mark:
                    self._pins.pop(model, None)
            self._files = look.files
            for model in {spec.model for spec in self._specs.values()} & look.files.keys():
                if model in self.errors or self._followed.get(model) != look.files[model]:
                    self._follow(model, look.files[model])
            for spec in [spec for spec in self._specs.values() if spec.model in look.gone]:
                await self._end_if_parked(spec)

    def _follow(self, model: str, file: ModelFile) -> None:
        """Put in force what the file says, for every replica of the model."""
        error = f"model {model}: {CONFIG} {file.error}" if file.parameters is None else ""
        for spec in [spec for spec in self._specs.values() if spec.model == model and not error]:
            try:
                self._put_in_force(replace(spec, settings=self._read(model, file.parameters or {})))
            except InvalidModel as caught:
                error = str(caught)
        if error and self.errors.get(model) != error:
            log.error("%s; what it said before stays in force", error)
        if error:
            self.errors[model] = error
        elif self.errors.pop(model, ""):
            log.info("model %s: its %s is in force again", model, CONFIG)
        self._followed[model] = file

    async def _end_if_parked(self, spec: ModelSpec) -> None:
        """A parked engine and a mirror go when their model has left the repository and no stub uses it."""
        if not self._may_leave(spec) or await asyncio.to_thread(Path(spec.version_dir).exists):
            return  # what exists is in another repository, Triton's own
        if self._may_leave(spec):  # still
            log.info("%s has left the model repository: its engine ends, and its mirror goes", spec.replica)
            self._post(ev.ParkRequested(time.monotonic(), spec.replica, purge=True))

    def _may_leave(self, spec: ModelSpec) -> bool:
        replica = self._ledger.replicas[spec.replica]
        ended = replica.state in (State.COLD, State.FAILED)
        mirrored = ended and any(replica.name in mirror.names for mirror in self._ledger.mirrors.values())
        leaves = replica.state is State.SWAPPED or mirrored
        return leaves and not replica.wishes.purge and not self._in_use(spec.replica)

    # --- stubs --------------------------------------------------------------------------------------------------------

    def read(self, replica: str, message: control.Attach) -> ModelSpec:
        """What a stub asks for, with the settings that count. Raises InvalidModel."""
        file, known = self._files.get(message.model), self._specs.get(replica)
        if file and file.parameters is not None:
            settings = self._read(message.model, file.parameters)
        else:
            settings = self._read(message.model, message.parameters)
            if file and known:
                settings = known.settings
        spec = ModelSpec(replica, message.version_dir, message.model_json, settings, message.gpu)
        self._fit(spec)
        if known and not spec.needs_other_engine(known):
            self._check_engine_keeps_to(spec)
        return spec

    def adopt(self, spec: ModelSpec) -> None:
        """Put in force what `read` returned; now or never its engine is another one."""
        self._specs[spec.replica] = spec
        self._register(spec)

    # --- by hand ------------------------------------------------------------------------------------------------------

    def pin(self, model: str, pinned: bool) -> None:
        """Pin or unpin, whatever the file says, until it changes or the agent ends."""
        self._pins[model] = pinned
        for spec in self._specs.values():
            if spec.model == model:
                self._register(spec)

    def pinned(self, spec: ModelSpec) -> bool:
        """By hand, else by its file."""
        return self._pins.get(spec.model, spec.settings.pinned)

    def queue_limits(self, settings: ModelSettings) -> control.QueueLimits:
        """The model's own, else the agent's."""
        return control.QueueLimits(
            self._config.max_queue if settings.max_queue is None else settings.max_queue,
            self._config.queue_timeout_s if settings.queue_timeout_s is None else settings.queue_timeout_s,
        )

    def allowed(self, spec: ModelSpec) -> tuple[str, ...]:
        """Devices on which its ranks may be; empty: any."""
        return self._fit(spec).allowed

    def note(self, spec: ModelSpec) -> str:
        """What of its settings is not in force yet, one line for a person; empty: nothing."""
        replica, allowed = self._ledger.replicas[spec.replica], self.allowed(spec)
        devices = replica.devices
        if allowed and not set(devices) <= set(allowed):
            here, there = " and ".join(devices), " and ".join(allowed)
            return f"{spec.replica}: its engine stays on {here}; its next one will be on {there}, as {CONFIG} says"
        engine, preserved = self._engines.get(spec.replica), spec.settings.preserve_kv_bytes
        if engine and engine.spec.settings.preserve_kv_bytes != preserved:
            now, then = (format_bytes(n) for n in (engine.preserved_kv_bytes, preserved))
            return f"{spec.replica}: its engine has {now} for PRESERVE_KV; its next one gets up to {then} ({CONFIG})"
        if engine and engine.ready and preserved and not engine.preserved_kv_bytes:
            return f"{spec.replica}: PRESERVE_KV has no effect; the log of its engine says why"
        full = blocked_by_pins(replica, self._ledger)
        if full and replica.state is State.RESIDENT and replica.missing_frames:
            has, needs = (
                format_bytes(n * self._frame_bytes) for n in (replica.reservation.frames, replica.need_frames)
            )
            return (
                f"{spec.replica}: {has} of its {needs} are set aside, since pinned models leave no more on "
                f"{' and '.join(full)}; it gets the rest when one of them is unpinned or parked"
            )
        return ""

    # --- checks and effects -------------------------------------------------------------------------------------------

    def _read(self, model: str, parameters: Mapping[str, str]) -> ModelSettings:
        return read_settings(model, parameters, next(iter(self._sizes.values())))

    def _fit(self, spec: ModelSpec) -> Fit:
        return fit(spec.model, spec.settings, spec.gpu, spec.ranks, self._sizes, self._frame_bytes)

    def _check_engine_keeps_to(self, spec: ModelSpec) -> None:
        """Raises InvalidModel for a limit below what the model's engine holds when it is resident."""
        cap = spec.settings.cap_bytes
        holds = self._ledger.replicas[spec.replica].footprint_frames
        if cap is not None and cap // self._frame_bytes < holds:
            raise InvalidModel(
                f"model {spec.model}: {spec.settings.cap_name} in {CONFIG} is {format_bytes(cap)}, but its engine has "
                f"{format_bytes(holds * self._frame_bytes)} and cannot shrink; raise it, or end the engine "
                f"(`triton-swap unload --purge {spec.model}`): the next one keeps to it"
            )

    def _put_in_force(self, spec: ModelSpec) -> None:
        """Apply new settings to a replica that exists. Raises InvalidModel."""
        changed = spec != self._specs[spec.replica]
        if changed:
            self._fit(spec)
            self._check_engine_keeps_to(spec)
            self._specs[spec.replica] = spec
            log.info("%s: what its %s says now is in force", spec.replica, CONFIG)
        self._register(spec)
        if changed and self.note(spec):
            log.warning("%s", self.note(spec))

    def _register(self, spec: ModelSpec) -> None:
        """Tell the policy and the engine host what they do not know yet."""
        event, settings = registered(spec, self._fit(spec), pinned=self.pinned(spec)), spec.settings
        if event != self._registered.get(spec.replica):
            self._registered[spec.replica] = event
            self._post(replace(event, now_s=time.monotonic()))
        engine = self._engines.get(spec.replica)
        if engine and engine.host and engine.queue_limits != self.queue_limits(settings):
            engine.queue_limits = self.queue_limits(settings)
            engine.host.send(engine.queue_limits)
