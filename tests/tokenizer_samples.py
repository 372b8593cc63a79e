"""Vocabularies made on the spot, and random texts and ids of every awkward kind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from gptx.tokenizer import GPT2_PATTERN, TokenizerSpec

ALPHABETS = (
    "abcdefgh ILOVE'stdm llre ve",
    "床前明月光，疑是地上霜。举头",
    "  \t\n\r\u00a0\u2003\u3000\x85\x1c",
    "0123½²٣Ⅷ",
    "😀👨\u200d👩🇨🇳é",
    "e\u0301\u0300\u0903",
    "\x00\x01\x7f\u200b\ufeff",
    ".,;!?^^^---",
)


def random_text(rng: random.Random, length: int) -> str:
    """Runs of one character, of one alphabet, and single code points from all of Unicode."""
    text = ""
    while len(text) < length:
        kind = rng.random()
        if kind < 0.2:
            code = rng.randrange(0x110000 - 0x800)
            text += chr(code if code < 0xD800 else code + 0x800)
        elif kind < 0.3:
            text += rng.choice("  \n\t.^aA1床'") * rng.randrange(1, 12)
        else:
            text += "".join(rng.choices(rng.choice(ALPHABETS), k=rng.randrange(1, 6)))
    return text


def random_texts(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    return [random_text(rng, rng.choice((1, 3, 10, 40))) for _ in range(count)]


def byte_spec(
    *tokens: bytes, special: dict[str, int] | None = None, pattern: str = GPT2_PATTERN
) -> TokenizerSpec:
    """All single bytes, then ``tokens`` in order of their merges."""
    single = tuple(bytes([b]) for b in range(256))
    return TokenizerSpec("bpe", single + tokens, pattern, special or {})


def trained(folder: Path, texts: Sequence[str], pre_tokenizer: object, **options: object) -> object:
    """A tokenizer of the tokenizers library, trained and saved as tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    settings = {
        "vocab_size": 600,
        "special_tokens": ["<|endoftext|>"],
        "initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    } | options
    tokenizer.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(**settings))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
