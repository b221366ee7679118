"""Prompts of an exact length in tokens, no two alike."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer


class Prompts:
    """Distinct prompts for one model: random words, so that no two share a prefix that a cache could serve.

    Each word is one token of the model's vocabulary, so the number of words is the number of tokens. The same seed
    gives the same prompts in the same order.
    """

    def __init__(self, model_dir: Path, seed: int) -> None:
        """Raises ValueError when `model_dir` has no usable tokenizer.json."""
        try:
            tokenizer: Tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{model_dir}/tokenizer.json cannot be read: {error}") from error
        # "Ġ" is how byte-level BPE writes the space before a word.
        words = sorted(f" {token[1:]}" for token in tokenizer.get_vocab() if _is_word(token))
        encoded = tokenizer.encode_batch(words, add_special_tokens=False)
        self._words = [word for word, one in zip(words, encoded, strict=True) if len(one.ids) == 1]
        # Some tokenizers put tokens of their own before every prompt.
        self._added = len(tokenizer.encode("").ids)
        self._random = random.Random(seed)

    def next(self, tokens: int) -> str:
        """A prompt that the model reads as exactly `tokens` tokens."""
        return "".join(self._random.choices(self._words, k=tokens - self._added))


def _is_word(token: str) -> bool:
    word = token.removeprefix("Ġ")
    return word != token and len(word) > 2 and word.isascii() and word.isalpha() and word.islower()
