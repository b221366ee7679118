"""The demo's models, prompts and repository."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
from google.protobuf import text_format
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tritonclient.grpc import model_config_pb2

from loadtest.models import MODELS_DIR, RECIPES, SMOLLM2, is_prepared
from loadtest.prompts import Prompts
from loadtest.server import DEVICE, REPOSITORY, write_keep_alive
from swap_agent.units import parse_bytes, parse_device

LARGE = [recipe.name for recipe in RECIPES if recipe is not SMOLLM2]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A folder with a byte-level BPE tokenizer trained on the spot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f" {a}{b}{c}{d}" for a, b, c, d in itertools.product("abcd", "eiou", "lmnr", "stv")]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(words * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("tokens", [1, 16, 128, 2048])
def test_a_prompt_has_exactly_the_tokens_asked_for(model_dir: Path, tokens: int) -> None:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    prompts = Prompts(model_dir, seed=1)
    for _ in range(5):
        assert len(tokenizer.encode(prompts.next(tokens)).ids) == tokens


def test_prompts_are_distinct_and_repeatable(model_dir: Path) -> None:
    first, again, other = Prompts(model_dir, 1), Prompts(model_dir, 1), Prompts(model_dir, 2)
    texts = [first.next(16) for _ in range(200)]
    assert len(set(texts)) == 200
    assert [again.next(16) for _ in range(200)] == texts
    assert not set(texts) & {other.next(16) for _ in range(200)}


def test_a_model_without_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json"):
        Prompts(tmp_path, 1)


def test_a_folder_counts_only_when_complete_and_of_this_recipe(tmp_path: Path) -> None:
    assert not is_prepared(SMOLLM2, tmp_path)
    folder = tmp_path / SMOLLM2.name
    folder.mkdir()
    assert not is_prepared(SMOLLM2, tmp_path)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(SMOLLM2)))
    assert is_prepared(SMOLLM2, tmp_path)
    assert not is_prepared(dataclasses.replace(SMOLLM2, version=SMOLLM2.version + 1), tmp_path)


def parameters(config: Path) -> dict[str, str]:
    parsed = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())
    return {key: value.string_value for key, value in parsed.parameters.items()}


def test_models_compete_for_the_demo_device() -> None:
    (device_bytes,) = parse_device(DEVICE).sizes_bytes
    requests = {
        config.parent.name: parse_bytes(parameters(config)["GPU_MEMORY_REQUEST"])
        for config in REPOSITORY.glob("*/config.pbtxt")
    }
    assert set(requests) == {recipe.name for recipe in RECIPES}
    for large in LARGE:
        assert requests[SMOLLM2.name] + requests[large] <= device_bytes
    assert sum(requests[large] for large in LARGE) > device_bytes


def test_the_repository_points_at_the_prepared_models() -> None:
    for recipe in RECIPES:
        folder = REPOSITORY / recipe.name / "1"
        model = json.loads((folder / "model.json").read_text())["model"]
        assert (folder / model).resolve() == MODELS_DIR / recipe.name


def test_keep_alive_is_the_only_thing_that_changes(tmp_path: Path) -> None:
    for config in REPOSITORY.glob("*/config.pbtxt"):
        copy = tmp_path / config.parent.name
        shutil.copyfile(config, copy)
        write_keep_alive(copy, "7s")
        assert parameters(copy) == parameters(config) | {"KEEP_ALIVE": "7s"}
