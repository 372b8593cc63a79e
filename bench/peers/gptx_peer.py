"""gptx by its public interface, the file mapped where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gptx


class Peer:
    def __init__(self, path: str, threads: int) -> None:
        self._model = gptx.load(path, threads=threads)

    @staticmethod
    def prepare(model_path: str, folder: Path) -> str:
        del folder  # the file is its own format
        return model_path

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
