"""Static against dynamic fractions: what is asked of the server, and what becomes of its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from loadtest import fractions, next_turn, timeline
from loadtest.fractions import LEVELS, MODES, ModeFigures, Run, medians, ratios, same_answers
from loadtest.models import KV_HEAVY, MODELS_DIR
from loadtest.workload import Answer


def _parameters(config: Path) -> dict[str, str]:
    parsed = text_format.Parse(config.read_text("utf-8"), model_config_pb2.ModelConfig())
    return {key: value.string_value for key, value in parsed.parameters.items()}


def _run(mode: str, concurrency: int, speed: float, text: str = "a") -> Run:
    figures = ModeFigures(mode, concurrency, 2, speed, 4.0 / speed, 8.0 / speed, 1.0, int(speed))
    return Run(figures, (Answer(text, 1.0, 2.0, 1, 1), Answer("b", 1.0, 2.0, 1, 1)), timeline.Span(mode, concurrency))


def test_the_two_models_differ_in_their_limit_alone(tmp_path: Path) -> None:
    fractions.write_repository(tmp_path)
    static, dynamic = (_parameters(tmp_path / mode / "config.pbtxt") for mode in MODES)
    assert (
        static["GPU_MEMORY_LIMIT"] == static["GPU_MEMORY_REQUEST"] == dynamic["GPU_MEMORY_REQUEST"] == fractions.REQUEST
    )
    assert dynamic == static | {"GPU_MEMORY_LIMIT": fractions.LIMIT}
    engines = [json.loads((tmp_path / mode / "1" / "model.json").read_text()) for mode in MODES]
    assert engines[0] == engines[1] and "kv_cache_memory_bytes" not in engines[0]
    assert engines[0]["max_num_seqs"] >= max(LEVELS)
    # As the server sees it: two folders above the model's lies a link to the models.
    assert Path(engines[0]["model"]).parts[-2:] == (MODELS_DIR.name, KV_HEAVY.name)


def test_the_two_models_of_a_next_turn_differ_in_what_is_preserved_alone(tmp_path: Path) -> None:
    next_turn.write_repository(tmp_path)
    discards, preserves = (_parameters(tmp_path / mode / "config.pbtxt") for mode in next_turn.MODES)
    assert preserves == discards | {"PRESERVE_KV": next_turn.PRESERVE_KV} != discards
    engines = [json.loads((tmp_path / mode / "1" / "model.json").read_text()) for mode in next_turn.MODES]
    assert engines[0] == engines[1] and engines[0]["max_model_len"] > max(next_turn.TURNS) + 64


def test_above_one_is_better_in_every_ratio() -> None:
    speeds = {"static": (1.0, 2.0, 9.0), "dynamic": (4.0, 3.0, 4.0)}
    runs = [_run(mode, n, speed) for mode in MODES for speed in speeds[mode] for n in LEVELS]
    found = medians(runs)
    assert [(one.mode, one.concurrency) for one in found] == [(mode, n) for mode in MODES for n in LEVELS]
    assert {one.output_tokens_per_s for one in found if one.mode == "static"} == {2.0}
    assert {one.most_bytes for one in found if one.mode == "static"} == {9}
    for row in ratios(found):
        assert (row["throughput"], row["latency_p50"], row["latency_p95"]) == pytest.approx((2.0, 2.0, 2.0))
        assert row["ttft_p50"] == 1.0


def test_answers_are_compared_request_by_request() -> None:
    assert same_answers([_run("static", 1, 1.0), _run("dynamic", 1, 1.0)]) == 1.0
    assert same_answers([_run("static", 1, 1.0), _run("dynamic", 1, 1.0, "other")]) == 0.5


def test_tokens_are_spread_over_the_time_in_which_they_came(tmp_path: Path) -> None:
    span = timeline.Span("dynamic", 4)
    span.answered(1.0, 2.0, 50)
    span.begin(10.0)
    span.device_bytes = [(10.0, 1 << 20), (11.0, 3 << 20)]
    span.answered(10.5, 11.5, 8)
    span.answered(10.0, 10.5, 2)
    edges_s, rate = span.tokens_per_s()
    assert list(edges_s[:4]) == [0.0, 0.5, 1.0, 1.5]
    assert rate[:3] == pytest.approx([4.0, 8.0, 8.0])
    assert span.granted() == ([0.0, 1.0], [1.0, 3.0])
    timeline.draw(tmp_path / "out" / "plot.png", [span])
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")
