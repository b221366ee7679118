"""The replicas that a model repository asks for, as Triton and the agent would read it. Blocking; starts nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swap_agent.errors import InvalidModel, InvalidUsage
from swap_agent.models.estimate import Size, estimate
from swap_agent.models.fit import fit
from swap_agent.models.instances import InstanceGroup, check_kind, only_group
from swap_agent.models.repository import CONFIG, parse_config, string_parameters
from swap_agent.models.settings import ModelSettings, read_ranks, read_settings
from swap_agent.models.spec import ModelSpec, registered
from swap_agent.policy import events as ev
from swap_agent.policy.ledger import Device
from swap_agent.units import format_bytes


@dataclass(frozen=True)
class WantedReplica:
    """One replica."""

    registered: ev.Registered
    frames: tuple[int, ...]
    """Frames that each rank asks for while its engine starts, in order."""
    settings: ModelSettings
    size: Size | None = None
    """Estimated, of a model that declares no GPU_MEMORY_REQUEST."""
    note: str = ""
    """What a person should know, one line."""

    @property
    def name(self) -> str:
        """`name/version#instance`."""
        return self.registered.name


@dataclass
class RepositoryScan:
    """What was found in a repository."""

    wanted: list[WantedReplica] = field(default_factory=list)
    """In the order in which `serve` loads them."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a model cannot be loaded, one line, by model."""
    unknown: dict[str, str] = field(default_factory=dict)
    """Why the size of a model is not known, one line, by model."""
    others: dict[str, str] = field(default_factory=dict)
    """Backends of models that are not ours, by model."""


def read(repository: Path, devices: Sequence[Device], frame_bytes: int) -> RepositoryScan:
    """Read every model folder; what is wrong with one does not stop the others.

    Raises InvalidUsage when the repository cannot be read.
    """
    try:
        folders = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InvalidUsage(f"--model-repository {repository}: {error.strerror}") from error
    scan = RepositoryScan()
    for folder in folders:
        model = folder.name
        try:
            config = _config(folder)
            if config.backend != "vllm":
                scan.others[model] = config.backend
            else:
                _add(scan, folder, config, devices, frame_bytes)
        except InvalidModel as error:
            scan.errors[model] = str(error)
        except OSError as error:
            scan.errors[model] = f"model {model}: {folder} cannot be read ({error.strerror})"
    return scan


def _config(folder: Path) -> Any:
    model = folder.name
    try:
        return parse_config((folder / CONFIG).read_bytes(), model)
    except FileNotFoundError:
        raise InvalidModel(f"model {model}: {folder} holds no {CONFIG}") from None
    except OSError as error:
        raise InvalidModel(f"model {model}: {CONFIG} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"model {model}: {CONFIG} {' '.join(str(error).split())}") from error


def _add(scan: RepositoryScan, folder: Path, config: Any, devices: Sequence[Device], frame_bytes: int) -> None:
    """All replicas of one model. Raises InvalidModel."""
    model = folder.name
    group = only_group(model, _groups(config))
    sizes = {device.name: device.frames * frame_bytes for device in devices}
    settings = read_settings(model, string_parameters(config), next(iter(sizes.values())))
    found: list[WantedReplica] = []
    for version in _versions(folder, config):
        text, arguments = _model_json(model, version)
        ranks = read_ranks(model, text)
        check_kind(model, group.kind, arguments)
        fitted = fit(model, settings, group.gpu, ranks, sizes, frame_bytes)
        size = estimate(arguments, version, ranks)
        estimated: Size | None = None
        if fitted.request_frames is not None:
            frames: tuple[int, ...] = (max(1, fitted.request_frames),)
            note = _too_small(model, settings, size, frame_bytes)
        elif isinstance(size, Size):
            estimated = size
            frames = _frames(size, frame_bytes)
            note = f"model {model}: its KV cache is not counted: {size.kv_unknown}" if size.kv_unknown else ""
        else:
            scan.unknown[model] = f"model {model}: size unknown: it declares no GPU_MEMORY_REQUEST, and {size}"
            return
        for number in range(max(1, group.count)):
            spec = ModelSpec(f"{model}/{version.name}#{number}", str(version), text, settings, group.gpu)
            found.append(WantedReplica(registered(spec, fitted), frames, settings, estimated, note))
    scan.wanted += found


def _frames(size: Size, frame_bytes: int) -> tuple[int, ...]:
    """Weights, a frame of buffers, KV cache: the regions of an engine begin with a frame of their own."""
    regions = (-(-size.weights_bytes // frame_bytes), 1, -(-size.kv_bytes // frame_bytes))
    return tuple(frames for frames in regions if frames)


def _too_small(model: str, settings: ModelSettings, size: Size | str, frame_bytes: int) -> str:
    """That the engine would refuse its request, if the estimate is right; empty otherwise."""
    request = settings.request_bytes or 0
    if isinstance(size, str):
        return f"model {model}: {size}" if "not on this machine" in size else ""
    needs = sum(_frames(size, frame_bytes)) * frame_bytes
    if needs <= request:
        return ""
    return (
        f"model {model}: its files suggest that it needs about {format_bytes(needs)}, more than its GPU_MEMORY_REQUEST "
        f"of {format_bytes(request)}: its engine may refuse to start"
    )


def _groups(config: Any) -> list[InstanceGroup]:
    return [
        InstanceGroup(str(group.Kind.Name(group.kind)), group.count, tuple(group.gpus))
        for group in config.instance_group
    ]


def _versions(folder: Path, config: Any) -> Iterator[Path]:
    """The version folders that Triton would load. Raises InvalidModel."""
    there = {int(path.name): path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal()}
    policy = config.version_policy
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        chosen = sorted(set(policy.specific.versions))
    else:
        chosen = sorted(there)
        chosen = chosen if kind == "all" else chosen[-max(1, policy.latest.num_versions) :]
    if not chosen:
        raise InvalidModel(f"model {folder.name}: {folder} holds no version, a folder such as 1 with a model.json")
    for version in chosen:
        if version not in there:
            raise InvalidModel(f"model {folder.name}: version_policy in {CONFIG} names version {version}: no folder")
        yield there[version]


def _model_json(model: str, version: Path) -> tuple[str, Mapping[str, Any]]:
    path = version / "model.json"
    try:
        text = path.read_text("utf-8")
        arguments = json.loads(text)
    except FileNotFoundError:
        raise InvalidModel(f"model {model}: there is no {path}, with vLLM's engine arguments") from None
    except OSError as error:
        raise InvalidModel(f"model {model}: {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"model {model}: model.json is not readable as JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise InvalidModel(f"model {model}: model.json must hold one JSON object, vLLM's engine arguments")
    return text, arguments
