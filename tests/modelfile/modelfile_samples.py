"""Small models for the tests of the file format, and files built from changed parts."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from gptx import modelfile
from gptx.config import GPTConfig
from gptx.modelfile import header

TINY = GPTConfig(vocab_size=20, block_size=4, n_layer=1, n_head=1, n_embd=16, n_inner=16)
"""About the smallest file: each tensor one or two panels."""

AWKWARD = GPTConfig(
    vocab_size=37,
    block_size=5,
    n_layer=2,
    n_head=3,
    n_embd=60,
    n_inner=50,
    activation="gelu",
    tie_word_embeddings=False,
)
"""Heads of 20 (padded to 32) and no size a multiple of 16."""

MANY_HEADS = GPTConfig(vocab_size=33, block_size=3, n_layer=1, n_head=25, n_embd=50, n_inner=7)


def weights(config: GPTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random canonical tensors."""
    rng = np.random.default_rng(seed)
    shapes = modelfile.canonical_shapes(config)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def rebuild(
    data: bytes,
    metadata: Mapping[str, str] | None = None,
    tensors: Mapping[str, bytes] | None = None,
) -> bytes:
    """A file with some values or tensors changed, and every checksum made to fit."""
    model = modelfile.read_buffer(data)
    parts = {name: array.tobytes() for name, array in model.tensors.items()} | dict(tensors or {})
    digests = dict(zip(parts, header.tensor_digests(parts.values(), 1), strict=True))
    values = {**model.metadata, **(metadata or {})}
    stored = modelfile.stored_tensors(model.config, model.dtype)
    _, head = header.seal(values, stored, digests)
    return head + b"".join(parts.values())


def header_of(data: bytes) -> dict[str, dict]:
    """The header as any safetensors reader sees it."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
