"""What is measured: model shapes, random weights of those shapes, prompts, and what they cost.

Letters as in docs/architecture.md: L layers, C channels, F MLP width, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptx import modelfile
from gptx.config import GPTConfig
from gptx.loading import demo_path

_SHAPES = {
    "gpt2": (50257, 1024, 12, 12, 768),
    "gpt2-medium": (50257, 1024, 24, 16, 1024),
    "gpt2-large": (50257, 1024, 36, 20, 1280),
    "tiny": (211, 64, 2, 2, 32),
}
SHAPES = (*_SHAPES, "demo")
"""Names for ``--shape``. "demo" is the shape of the built-in model, "tiny" is for the tests."""


def config_named(shape: str) -> GPTConfig:
    """Raises FileNotFoundError for "demo" where the installation has no demo model."""
    if shape == "demo":
        return modelfile.read(demo_path(), verify=False).config
    vocab_size, block_size, n_layer, n_head, n_embd = _SHAPES[shape]
    return GPTConfig(
        vocab_size=vocab_size,
        block_size=block_size,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_inner=4 * n_embd,
    )


class RandomTensors(Mapping[str, NDArray[np.float32]]):
    """Canonical tensors with the spread of GPT-2's initialisation, made when asked for.

    Biases and gains are away from 0 and 1, so that a peer that forgets one fails the check.
    """

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        self._shapes = modelfile.canonical_shapes(config)
        self._residual_std = 0.02 / (2 * config.n_layer) ** 0.5
        self._seed = seed

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        index = list(self._shapes).index(name)
        rng = np.random.default_rng([self._seed, index])
        values = rng.standard_normal(self._shapes[name], dtype=np.float32)
        values *= np.float32(self._residual_std if name.endswith("c_proj.weight") else 0.02)
        if ".ln_" in name or name.startswith("ln_f"):
            values += np.float32(name.endswith("weight"))
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class Storage:
    """How a peer keeps what a decode step reads, in bytes.

    Attributes:
        weight: of each weight of a matrix, the scale of its block included.
        row: of each output channel of a matrix besides: its scale, its sum.
        cache: of each cached key or value.
    """

    weight: float
    row: float = 0
    cache: float = 4


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and how many tokens are decoded after the first one.

    Attributes:
        prefill: one prompt; its first new token is timed.
        decode: one short prompt; ``n_decode`` tokens after the first are timed.
        batch: ragged short prompts; likewise, all together.
    """

    prefill: list[int]
    decode: list[int]
    batch: list[list[int]]
    n_decode: int


def make_workload(config: GPTConfig, *, quick: bool) -> Workload:
    """Prefill of 512 tokens, decode of 64 after 32, and 8 sequences of 8 to 64, if they fit."""
    rng = np.random.default_rng(1)

    def ids(n: int) -> list[int]:
        return rng.integers(0, config.vocab_size, max(n, 1)).tolist()

    quarter = config.block_size // 4
    return Workload(
        prefill=ids(min(512, 2 * quarter)),
        decode=ids(min(32, quarter)),
        batch=[ids(min(64, quarter) * (i + 1) // 8) for i in range(8)],
        n_decode=min(8 if quick else 64, 2 * quarter),
    )


def block_weights(config: GPTConfig) -> int:
    """W: the weights of the layers' matrices; 12 L C^2 where F = 4 C."""
    c, f = config.n_embd, config.n_inner
    return config.n_layer * (4 * c * c + 2 * c * f)


def head_weights(config: GPTConfig) -> int:
    """The weights of lm_head, V C."""
    return config.vocab_size * config.n_embd


def prefill_flops(config: GPTConfig, tokens: int) -> float:
    """2 W T, the causal half of attention 2 L C T^2, and lm_head for the last position 2 V C."""
    attention = 2 * config.n_layer * config.n_embd * tokens**2
    return 2.0 * block_weights(config) * tokens + attention + 2 * head_weights(config)


def rows(config: GPTConfig) -> int:
    """Output channels of all matrices, lm_head's included."""
    return config.n_layer * (5 * config.n_embd + config.n_inner) + config.vocab_size


def step_bytes(config: GPTConfig, storage: Storage, contexts: list[float]) -> float:
    """What one decode step reads: every weight once, and K and V of each sequence's context."""
    weights = block_weights(config) + head_weights(config)
    cached = sum(2 * config.n_layer * config.n_embd * context for context in contexts)
    return storage.weight * weights + storage.row * rows(config) + storage.cache * cached


def step_flops(config: GPTConfig, contexts: list[float]) -> float:
    """2 (W + V C) and 4 L C t of attention for each sequence of context t."""
    weights = 2 * len(contexts) * (block_weights(config) + head_weights(config))
    return weights + sum(4 * config.n_layer * config.n_embd * context for context in contexts)


def mean_context(prompt_tokens: int, n_decode: int) -> float:
    """Positions that a timed step attends to, on average; the first new token is not timed."""
    return prompt_tokens + (n_decode + 1) / 2
