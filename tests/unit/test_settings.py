"""Parameters of config.pbtxt: what they mean, what is refused and how."""

from __future__ import annotations

import pytest

from swap_agent.errors import InvalidModel
from swap_agent.models.fit import Fit, fit
from swap_agent.models.settings import ModelSettings, read_settings

GIB = 1 << 30
SIZES = {"cpu:0": 100, "cpu:1": 60, "cpu:2": 80}
"""Bytes of three devices whose frames have ten."""


def test_every_parameter_has_its_meaning() -> None:
    given = {
        "GPU_MEMORY_REQUEST": "0.25",
        "GPU_MEMORY_LIMIT": "50%",
        "KEEP_ALIVE": "-1",
        "PRIORITY": "-3",
        "PINNED": "Yes",
        "MIN_RESIDENCY": "500ms",
        "MAX_QUEUE": "7",
        "QUEUE_TIMEOUT": "1m",
        "GPU_DEVICE_IDS": "[2, 0]",
        "PRESERVE_KV": "1.5GiB",
        "REPORT_CUSTOM_METRICS": "true",
        "my_own": "anything",
    }
    assert read_settings("m", given, 4 * GIB) == ModelSettings(
        GIB,
        2 * GIB,
        None,
        -3,
        True,
        0.5,
        max_queue=7,
        queue_timeout_s=60,
        device_ids=(2, 0),
        preserve_kv_bytes=3 * GIB // 2,
    )
    assert read_settings("m", dict.fromkeys(given, ""), GIB) == read_settings("m", {}, GIB) == ModelSettings()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("GPU_MEMORY_REQUEST", "12GB", "'12GB' uses a unit that is ambiguous; write KiB, MiB or GiB"),
        ("GPU_MEMORY_LIMIT", "120%", "'120%' is not a share above 0 and up to 1"),
        ("KEEP_ALIVE", "soon", "'soon' is not a duration such as 30s, 5m or 1h, or -1 for never"),
        ("PRIORITY", "1.5", "'1.5' is not a whole number such as 0, 10 or -1; larger goes first"),
        ("PRIORITY", "9" * 5000, "is not a whole number"),
        ("PINNED", "maybe", "'maybe' is neither true, 1, yes nor false, 0, no"),
        ("MIN_RESIDENCY", "-1", "'-1' is not a duration"),
        ("MAX_QUEUE", "0", "'0' is not a whole number from 1 on"),
        ("MAX_QUEUE", "many", "'many' is not a whole number from 1 on"),
        ("QUEUE_TIMEOUT", "0", "'0' gives no request any time"),
        ("PRESERVE_KV", "0.5", "'0.5' is not a size of host memory such as 512MiB"),
        ("PRESERVE_KV", "4GB", "'4GB' uses a unit that is ambiguous"),
        ("GPU_DEVICE_IDS", "0;1", "'0;1' is not a list of device numbers such as 0 or 0,1"),
        ("GPU_DEVICE_IDS", "[0", "is not a list of device numbers"),
        ("GPU_DEVICE_IDS", "1,1", "'1,1' names a device twice"),
    ],
)
def test_a_bad_value_is_refused_by_name_with_what_is_right(key: str, value: str, words: str) -> None:
    with pytest.raises(InvalidModel) as caught:
        read_settings("m", {key: value}, GIB)
    assert str(caught.value).startswith(f"model m: {key} in config.pbtxt: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("PINED", "did you mean PINNED?"),
        ("GPU_MEMORY_LIMITS", "did you mean GPU_MEMORY_LIMIT?"),
        ("GPU_MEMORY_FRACTION", "known: GPU_MEMORY_REQUEST, GPU_MEMORY_LIMIT, KEEP_ALIVE"),
        ("max_queue", "did you mean MAX_QUEUE?"),
    ],
)
def test_keys_that_look_like_ours_are_refused(key: str, words: str) -> None:
    with pytest.raises(InvalidModel, match=f"model m: .*{key} in config.pbtxt") as caught:
        read_settings("m", {key: "1"}, GIB)
    assert words in str(caught.value)


def test_a_request_above_its_limit_is_refused() -> None:
    with pytest.raises(
        InvalidModel, match=r"REQUEST in config.pbtxt is 3 GiB, more than its GPU_MEMORY_LIMIT of 2 GiB"
    ):
        read_settings("m", {"GPU_MEMORY_REQUEST": "3GiB", "GPU_MEMORY_LIMIT": "2GiB"}, 4 * GIB)


@pytest.mark.parametrize(
    ("settings", "cap", "name"),
    [
        (ModelSettings(), None, "GPU_MEMORY_REQUEST"),
        (ModelSettings(request_bytes=5), 5, "GPU_MEMORY_REQUEST"),
        (ModelSettings(limit_bytes=7), 7, "GPU_MEMORY_LIMIT"),
        (ModelSettings(request_bytes=5, limit_bytes=7), 7, "GPU_MEMORY_LIMIT"),
    ],
)
def test_the_limit_is_the_request_unless_it_is_declared(settings: ModelSettings, cap: int | None, name: str) -> None:
    assert (settings.cap_bytes, settings.cap_name) == (cap, name)


@pytest.mark.parametrize(
    ("settings", "gpu", "ranks", "expected"),
    [
        (ModelSettings(), None, 3, Fit(None, None, ())),
        (ModelSettings(request_bytes=59, limit_bytes=69), None, 1, Fit(5, 6, ())),
        (ModelSettings(request_bytes=80, device_ids=(2, 0)), None, 2, Fit(8, None, ("cpu:0", "cpu:2"))),
        (ModelSettings(), 1, 1, Fit(None, None, ("cpu:1",))),
        (ModelSettings(device_ids=(2,)), 1, 1, Fit(None, None, ("cpu:2",))),
    ],
)
def test_a_node_gives_whole_frames_of_devices_by_number(
    settings: ModelSettings, gpu: int | None, ranks: int, expected: Fit
) -> None:
    assert fit("m", settings, gpu, ranks, SIZES, 10) == expected


@pytest.mark.parametrize(
    ("settings", "gpu", "ranks", "words"),
    [
        (ModelSettings(), None, 4, "tensor_parallel_size 4 needs 4 devices, this node has 3"),
        (ModelSettings(request_bytes=101), None, 1, "GPU_MEMORY_REQUEST in config.pbtxt is 101 bytes, but the largest"),
        (ModelSettings(limit_bytes=61), None, 3, "GPU_MEMORY_LIMIT .* the 3 largest have 60 each; lower it"),
        (ModelSettings(request_bytes=61, device_ids=(1,)), None, 1, "largest device that it may use has 60; lower it"),
        (
            ModelSettings(device_ids=(0, 3)),
            None,
            1,
            "GPU_DEVICE_IDS .* names device 3, but this node's devices are 0 to 2",
        ),
        (ModelSettings(), 7, 1, "instance_group's gpus in config.pbtxt names device 7"),
        (ModelSettings(device_ids=(0,)), None, 2, "GPU_DEVICE_IDS .* allows 1 .* tensor_parallel_size 2 needs 2"),
    ],
)
def test_what_a_node_can_never_give_is_refused(
    settings: ModelSettings, gpu: int | None, ranks: int, words: str
) -> None:
    with pytest.raises(InvalidModel, match=f"model m: .*{words}"):
        fit("m", settings, gpu, ranks, SIZES, 10)
