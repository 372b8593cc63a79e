"""What every reader of a foreign format produces: a config, and tensors under gptx's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from gptx.config import GPTConfig

if TYPE_CHECKING:
    from gptx.tokenizer import TokenizerSpec


class LazyTensors(Mapping[str, np.ndarray]):
    """Canonical name -> float32 array, made anew by each lookup and not kept."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass
class Checkpoint:
    """A foreign checkpoint, understood but not yet read.

    Attributes:
        config: the shape, after trimming of the vocabulary.
        tensors: the names and shapes of `canonical_names`, matrices ``[out, in]``. Each lookup
            reads one tensor from disk, and raises ConvertError for a weight that is not finite,
            ModelFileError for damaged data.
        tokenizer: what was found beside the checkpoint, or None.
        generation: defaults that the checkpoint carries: ``eos_token_id`` (an int, or a list of
            several), ``bos_token_id``, of a classifier ``pad_token_id``, and, where it asks for
            sampling, ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``.
        source: one line for people.
        license: the licence named by a model card, or "".
        notes: decisions that were taken for the user, one line each.
    """

    config: GPTConfig
    tensors: Mapping[str, np.ndarray]
    tokenizer: TokenizerSpec | None
    generation: dict[str, object]
    source: str
    license: str = ""
    notes: list[str] = field(default_factory=list)
