"""`triton-swap plan`: a repository on disk, read and packed as `serve` would, without starting anything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

from swap_agent.cli import terminal
from swap_agent.cli.main import main
from swap_agent.models.estimate import Size, estimate

MIB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
}


class Models:
    """A model repository."""

    def __init__(self, path: Path) -> None:
        self.path = path / "models"
        self.path.mkdir()
        self.weights = path / "weights"

    def add(
        self, model: str, request: str = "", extra: str = "", arguments: dict[str, object] | None = None, **more: str
    ) -> Path:
        """One model of version 1; without weights on this machine unless `arguments` name some."""
        parameters = {"GPU_MEMORY_REQUEST": request, **more}
        lines = [f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in parameters.items()]
        folder = self.path / model
        (folder / "1").mkdir(parents=True)
        (folder / "config.pbtxt").write_text("\n".join(['backend: "vllm"', *lines, extra]))
        (folder / "1" / "model.json").write_text(json.dumps({"model": "some/hub-name", **(arguments or {})}))
        return folder

    def add_weights(self, config: dict[str, object], mebibytes: int = 5) -> str:
        """A real file of weights with a config.json; its path as model.json names it."""
        self.weights.mkdir(exist_ok=True)
        save_file({"w": np.zeros(mebibytes * MIB // 2, np.float16)}, self.weights / "model.safetensors")
        (self.weights / "training_args.bin").write_bytes(bytes(MIB))
        (self.weights / "config.json").write_text(json.dumps(config))
        return "../../../weights"


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path)


@pytest.fixture
def plan(models: Models, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the verb: its exit code and its JSON, in which a list of names stands for a device."""

    def run(device: str) -> tuple[int, dict[str, Any]]:
        code = main(["plan", "--model-repository", str(models.path), "--device", device, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


def on(answer: dict[str, Any]) -> list[list[str]]:
    """Models by device, without version and instance where these are the first."""
    return [[name.removesuffix("/1#0") for name in device["models"]] for device in answer["devices"]]


def test_what_fits_is_packed_and_resident_together(models: Models, plan: Any) -> None:
    for name, size in {"a": "60MiB", "b": "40MiB", "c": "50%"}.items():
        models.add(name, size)
    code, answer = plan("cpu:2x100MiB")
    assert code == 0
    assert on(answer) == [["a", "b"], ["c"]]  # the fullest device that still fits it, in order of name
    assert answer["together"] == ["a/1#0", "b/1#0", "c/1#0"]
    assert [device["turns"] for device in answer["devices"]] == [None, None]
    assert [device["need_bytes"] for device in answer["devices"]] == [100 * MIB, 50 * MIB]
    assert [model["need_bytes"] for model in answer["models"]] == [60 * MIB, 40 * MIB, 50 * MIB]


def test_what_does_not_fit_together_takes_turns(models: Models, plan: Any) -> None:
    for name, size in {"a": "60MiB", "b": "40MiB", "c": "30MiB"}.items():
        models.add(name, size)
    models.add("pin", "10MiB", PINNED="true")
    code, answer = plan("cpu:100MiB")
    assert code == 0
    (device,) = answer["devices"]
    assert device["subscription"] == 1.4
    assert device["turns"] == {
        "models": ["a/1#0", "b/1#0", "c/1#0"],
        "most_together": 2,
        "never_together": [["a/1#0", "b/1#0"]],  # 100 of the 90 MiB that the pinned model leaves; a and c fit exactly
    }
    assert answer["together"] == ["pin/1#0"]


def test_the_policy_s_refusals_are_the_plan_s(models: Models, plan: Any) -> None:
    models.add("early", "60MiB")
    models.add("large", "120MiB")
    models.add("limited", GPU_MEMORY_LIMIT="4MiB", arguments={"model": models.add_weights(CONFIG)})
    models.add("measured", arguments={"model": models.add_weights(CONFIG), "kv_cache_memory_bytes": 200 * MIB})
    models.add("pin-a", "70MiB", PINNED="true")
    models.add("pin-b", "70MiB", PINNED="true")
    models.add("where", "10MiB", GPU_DEVICE_IDS="1")
    code, answer = plan("cpu:100MiB")
    assert code == 1
    assert on(answer) == [["pin-a"]]
    refused = answer["refused"]
    assert refused.keys() == {"early/1#0", "limited/1#0", "measured/1#0", "pin-b/1#0"}
    assert refused["pin-b/1#0"] == "pin-b/1#0 needs 70 MiB, and pinned models leave it less: unpin one of pin-a/1#0"
    assert "unpin one of pin-a/1#0" in refused["early/1#0"], "it was there first, and can never come back"
    assert refused["limited/1#0"] == "model limited/1#0: 2 MiB more than GPU_MEMORY_LIMIT allows"
    assert "it needs at least 208 MiB of cpu:0, which has 100 MiB" in refused["measured/1#0"]
    assert answer["errors"].keys() == {"large", "where"}
    assert "GPU_MEMORY_REQUEST in config.pbtxt is 125829120 bytes, but the largest" in answer["errors"]["large"]
    assert "GPU_DEVICE_IDS in config.pbtxt names device 1" in answer["errors"]["where"]


def test_every_rank_takes_a_device_and_every_instance_an_engine(models: Models, plan: Any) -> None:
    models.add("pair", "60MiB", arguments={"tensor_parallel_size": 2})
    models.add("twins", "30MiB", "instance_group { count: 2 kind: KIND_MODEL }")
    code, answer = plan("cpu:2x100MiB")
    assert code == 0
    assert on(answer) == [["pair", "twins"], ["pair", "twins/1#1"]]
    assert answer["models"][0]["devices"] == ["cpu:0", "cpu:1"] and answer["models"][0]["ranks"] == 2
    code, answer = plan("cpu:100MiB")
    assert code == 1
    assert answer["errors"] == {"pair": "model pair: tensor_parallel_size 2 needs 2 devices, this node has 1"}
    assert on(answer) == [["twins", "twins/1#1"]], "the others are planned all the same"


def test_what_declares_nothing_is_estimated_from_its_files(models: Models, plan: Any) -> None:
    arguments = {"model": models.add_weights(CONFIG), "max_model_len": 1024}
    models.add("free", arguments=arguments)
    models.add("pair", arguments={**arguments, "tensor_parallel_size": 2, "kv_cache_memory_bytes": 10 * MIB})
    models.add("small", "6MiB", arguments=arguments)
    code, answer = plan("cpu:2x100MiB")
    assert code == 0
    free, pair, small = answer["models"]
    # Keys and values of 4 layers, 2 heads of 64 numbers of 2 bytes, 1,024 tokens and a block of 128.
    kv_bytes = 2 * 4 * 2 * 64 * 2 * (1024 + 128)
    file_bytes = (models.weights / "model.safetensors").stat().st_size
    assert free["estimate"] == {"weights_bytes": file_bytes, "kv_bytes": kv_bytes, "kv": "one sequence of 1,024 tokens"}
    assert free["need_bytes"] == (3 + 1 + 2) * 2 * MIB, "whole frames: weights, buffers, KV cache"
    half = {"weights_bytes": -(-file_bytes // 2), "kv_bytes": 10 * MIB, "kv": "kv_cache_memory_bytes"}
    assert pair["estimate"] == half and pair["devices"] == ["cpu:0", "cpu:1"]
    assert small["estimate"] is None and small["need_bytes"] == 6 * MIB
    assert answer["notes"] == [
        "model small: its files suggest that it needs about 12 MiB, more than its GPU_MEMORY_REQUEST of 6 MiB: "
        "its engine may refuse to start"
    ]


@pytest.mark.parametrize(
    ("config", "arguments", "wanted"),
    [
        ({"dtype": "float32"}, {}, Size(2, 1024, "one sequence of 128 tokens")),
        ({"dtype": "float32"}, {"dtype": "float32"}, Size(4, 2048, "one sequence of 128 tokens")),
        ({"quantization_config": {"bits": 4}}, {"dtype": "float32"}, Size(4, 2048, "one sequence of 128 tokens")),
        ({}, {"kv_cache_dtype": "fp8"}, Size(4, 512, "one sequence of 128 tokens")),
        ({}, {"tensor_parallel_size": 4}, Size(1, 1024, "one sequence of 128 tokens")),
        ({"max_position_embeddings": None}, {}, Size(4, 0, "", "model.json gives no max_model_len, and its config")),
        (
            {"layer_types": ["full_attention", "mamba"]},
            {},
            Size(4, 0, "", "tiny has layers other than plain attention"),
        ),
        ({"num_hidden_layers": "two"}, {}, Size(4, 0, "", "its config.json gives no num_hidden_layers")),
    ],
)
def test_dtype_and_architecture_count(
    tmp_path: Path, config: dict[str, object], arguments: dict[str, object], wanted: Size
) -> None:
    """One layer, one head of one number: 4 bytes for a token, in two blocks of 128."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 1, "max_position_embeddings": 128}
    tiny = {"model_type": "tiny", "dtype": "bfloat16", **shape, **config}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    (tmp_path / "a.safetensors").write_bytes(b"four")
    ranks = arguments.get("tensor_parallel_size", 1)
    found = estimate({"model": str(tmp_path), **arguments}, tmp_path, ranks)  # type: ignore[arg-type]
    assert isinstance(found, Size)
    assert found.kv_unknown.startswith(wanted.kv_unknown) and bool(found.kv_unknown) == bool(wanted.kv_unknown)
    assert (found.weights_bytes, found.kv_bytes, found.kv_text) == (
        wanted.weights_bytes,
        wanted.kv_bytes,
        wanted.kv_text,
    )


def test_only_files_that_are_loaded_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def weights_bytes() -> int:
        found = estimate({"model": str(tmp_path)}, tmp_path, 1)
        assert isinstance(found, Size), found
        return found.weights_bytes

    assert estimate({"model": str(tmp_path)}, tmp_path, 1) == f"there are no weight files in {tmp_path}"
    for name, size in {"training_args.bin": 100, "pytorch_model.bin": 7}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_bytes() == 7
    for name, size in {"model-1.safetensors": 3, "model-2.safetensors": 2, "consolidated.safetensors": 5}.items():
        (tmp_path / name).write_bytes(bytes(size))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_bytes() == 5, "what the index names, each file once"
    (tmp_path / "model-2.safetensors").unlink()
    assert "cannot be read" in str(estimate({"model": str(tmp_path)}, tmp_path, 1))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json holds no weight_map" in str(estimate({"model": str(tmp_path)}, tmp_path, 1))


def test_a_size_that_nobody_can_tell_is_said_in_words(models: Models, plan: Any) -> None:
    models.add("declared", "10MiB")
    models.add("far")
    models.add("hybrid", arguments={"model": models.add_weights({**CONFIG, "layer_types": ["mamba"]})})
    code, answer = plan("cpu:100MiB")
    assert code == 1 and on(answer) == [["declared", "hybrid"]]
    why = "its weights are not on this machine (some/hub-name)"
    assert answer["unknown"] == {
        "far": f"model far: size unknown: it declares no GPU_MEMORY_REQUEST, and {why}",
    }
    assert answer["notes"] == [
        f"model declared: {why}",
        "model hybrid: its KV cache is not counted: llama has layers other than plain attention",
    ]


def test_what_cannot_be_read_is_named_and_stops_nobody(models: Models, plan: Any) -> None:
    models.add("good", "10MiB")
    for name in ("half", "misspelt", "no-json", "not-json", "no-version", "ranks", "groups", "specific"):
        models.add(name, "10MiB")
    (models.path / "empty").mkdir()
    (models.path / ".git").mkdir()
    add = {
        "half": "parameters {",
        "misspelt": 'parameters { key: "KEEPALIVE" value { string_value: "1m" } }',
        "groups": "instance_group [{ count: 1 }, { count: 1 }]",
        "specific": "version_policy { specific { versions: [2] } }",
    }
    for name, text in add.items():
        with (models.path / name / "config.pbtxt").open("a") as file:
            file.write(text)
    (models.path / "no-json/1/model.json").unlink()
    (models.path / "not-json/1/model.json").write_text("{")
    (models.path / "no-version/1").rename(models.path / "no-version/first")
    (models.path / "ranks/1/model.json").write_text('{"tensor_parallel_size": "2"}')
    models.add("other", "10MiB")
    (models.path / "other/config.pbtxt").write_text('backend: "python"')
    code, answer = plan("cpu:100MiB")
    assert code == 1 and on(answer) == [["good"]] and answer["other_backends"] == {"other": "python"}
    words = {
        "empty": "holds no config.pbtxt",
        "half": "config.pbtxt is no model configuration (3:",
        "misspelt": "unknown parameter KEEPALIVE in config.pbtxt; did you mean KEEP_ALIVE?",
        "groups": "several instance groups in config.pbtxt",
        "specific": "version_policy in config.pbtxt names version 2",
        "no-json": "there is no ",
        "not-json": "model.json is not readable as JSON",
        "no-version": "holds no version, a folder such as 1 with a model.json",
        "ranks": '"tensor_parallel_size": "2" in model.json has to be a whole number',
    }
    assert answer["errors"].keys() == words.keys()
    for name, error in answer["errors"].items():
        assert error.startswith(f"model {name}: ") and words[name] in error and "\n" not in error


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", "--device cuda: only a GPU that is opened says how much is free on it; write the sizes"),
        ("cpu:1MiB", "--device: cpu:0 has no room for one frame of 2 MiB"),
        ("gpu", "--device 'gpu' is not a device such as"),
    ],
)
def test_a_device_that_cannot_be_planned_for_gets_one_line(
    models: Models, capsys: pytest.CaptureFixture[str], device: str, words: str
) -> None:
    assert main(["plan", "--model-repository", str(models.path), "--device", device]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"triton-swap: {words}")


def test_gpus_of_stated_sizes_need_no_driver(models: Models, plan: Any) -> None:
    models.add("a", "0.5")
    code, answer = plan("cuda:2x40GiB")
    assert code == 0 and answer["frame_bytes"] == 32 * MIB and answer["devices"][0]["name"] == "cuda:0"
    assert on(answer) == [["a"], []]


@pytest.mark.parametrize("width", [80, 120])
def test_a_person_reads_it(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(terminal, "console", lambda: Console(width=width, highlight=False))
    for name, size in {"model-a": "60MiB", "model-b": "50MiB", "model-c": "30MiB"}.items():
        models.add(name, size, PRIORITY="3")
    models.add("z", arguments={"model": models.add_weights(CONFIG), "max_model_len": 1024}, GPU_DEVICE_IDS="1")
    models.add("zz")
    assert main(["plan", "--model-repository", str(models.path), "--device", "cpu:2x70MiB"]) == 1
    lines = capsys.readouterr().out.splitlines()
    shown = "\n".join(lines)
    (row,) = [line for line in lines if line.split()[1:2] == ["model-a/1#0"]]
    assert row.split()[2:8] == ["60", "MiB", "60", "MiB", "60", "MiB"] and "priority 3" in row
    (row,) = [line for line in lines if line.split()[1:2] == ["z/1#0"]]
    assert "12 MiB*" in row and row.split()[2] == "-"
    assert "  take turns, at most 2 of 3 at a time: model-b/1#0, model-c/1#0, z/1#0" in lines
    assert "  never together: model-b/1#0 and model-c/1#0" in lines
    assert "resident together at all times: model-a/1#0" in lines
    assert "model zz: size unknown" in shown
    assert "* declares no GPU_MEMORY_REQUEST: estimated from the sizes of its weight files" in shown
    assert all(len(line) <= width for line in lines if "MiB" in line and "█" in line)


def test_a_plan_loads_neither_torch_nor_vllm(models: Models) -> None:
    models.add("a", "1MiB")
    script = (
        f"import sys; from swap_agent.cli.main import main; main(['plan', '--model-repository', {str(models.path)!r}]);"
        "print(*{m.split('.')[0] for m in sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm"} & set(shown.split())
