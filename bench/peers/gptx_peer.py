"""gptx by its public interface, the file mapped where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gptx
from gptx import modelfile
from peers.weights import canonical_weights

_DTYPES = {"int8-fast": "int8"}  # of the file, where it is not the name of the variant


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        # A prompt that comes again must cost what it cost the first time.
        self._model = gptx.load(path, threads=threads, precision=variant, prefix_cache_bytes=0)

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        dtype = _DTYPES.get(variant, variant)
        path = folder / f"{dtype}.gptx"
        if not path.exists():
            config, weights = canonical_weights(model_path)
            modelfile.write(path, config, weights, dtype=dtype, source="the benchmark's weights")
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"gptx": gptx.__version__}

    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        results = self._model.generate(
            list(prompts), max_new_tokens=n, temperature=0, ignore_eos=True
        )
        return [list(result.token_ids) for result in results]

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        return self._model.logits(ids)
