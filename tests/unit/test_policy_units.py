from __future__ import annotations

import pytest

from swap_agent.units import (
    GIB,
    MIB,
    DeviceSpec,
    format_bytes,
    parse_bytes,
    parse_device,
    parse_keep_alive,
    parse_seconds,
    parse_share,
)


@pytest.mark.parametrize(("text", "size"), [("12GiB", 12 * GIB), ("1.5 gib", 1.5 * GIB), ("2MiB", 2 * MIB), ("7", 7)])
def test_sizes_are_powers_of_two(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "size"), [("0.35", 350), ("35%", 350), ("1", 1000), ("100%", 1000), ("2KiB", 2048)])
def test_shares_are_of_the_device(text: str, size: int) -> None:
    assert parse_share(text, 1000) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "0", "0%", "101%", "1.2.3", "3 apples", "12GB"])
def test_unreadable_sizes_say_so(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a|ambiguous"):
        parse_share(text, 1000)


def test_durations() -> None:
    assert (parse_seconds("90"), parse_seconds("5m"), parse_seconds("1.5h")) == (90, 300, 5400)
    assert parse_keep_alive("-1") is None
    assert parse_keep_alive("0") == 0
    for text in ("soon", "-2", "5 days"):
        with pytest.raises(ValueError, match="is not a duration"):
            parse_keep_alive(text)


def test_devices() -> None:
    assert parse_device("cpu:2x1GiB") == DeviceSpec("cpu", (GIB, GIB))
    assert parse_device("cpu:512MiB") == DeviceSpec("cpu", (512 * MIB,))
    assert parse_device("cuda") == DeviceSpec("cuda", ())
    assert parse_device("cuda:2x40GiB") == DeviceSpec("cuda", (40 << 30, 40 << 30))
    for text in ("gpu", "cpu", "cpu:", "cpu:0x1GiB", "cpu:lots", "cpu:0"):
        with pytest.raises(ValueError, match=r"is not a|no memory"):
            parse_device(text)


def test_formatting_keeps_one_decimal() -> None:
    sizes = (0, 1023, 1024, 1536 * MIB, 2 * GIB)
    assert [format_bytes(n) for n in sizes] == ["0 B", "1023 B", "1 KiB", "1.5 GiB", "2 GiB"]
