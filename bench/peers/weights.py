"""The weights that every peer is given, and how prompts of different length become one array."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptx import modelfile
from gptx.config import GPTConfig


class CanonicalWeights(Mapping[str, NDArray[np.float32]]):
    """Canonical tensors of a model file, matrices ``[out, in]``, unpacked when asked for."""

    def __init__(self, model: modelfile.ModelFile) -> None:
        self._model = model
        self._names = list(modelfile.canonical_shapes(model.config))

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        return self._model.weight(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def canonical_weights(model_path: str) -> tuple[GPTConfig, CanonicalWeights]:
    model = modelfile.read(model_path)
    return model.config, CanonicalWeights(model)


def attention_scale(config: GPTConfig, layer: int) -> float:
    """What the scores of a layer are multiplied by."""
    scale = config.head_size**-0.5 if config.scale_attn_weights else 1.0
    return scale / (layer + 1) if config.scale_attn_by_inverse_layer_idx else scale


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [B, T]; 1 in the mask where an id is real."""
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask
