"""When sequences end: ``f(input_ids [B, T], scores) -> bool [B]``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptx.hf.arrays import Array, given, loaded_torch, to_numpy
from gptx.tokenizer import Tokenizer

Ended = NDArray[np.bool_]


class StoppingCriteria:
    """For classes that end sequences. They get torch tensors where `generate` got them, else numpy
    arrays, and return bools ``[B]`` or one for all."""

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class MaxLengthCriteria(StoppingCriteria):
    """All end at ``max_length`` tokens, the prompt included."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> bool:
        return input_ids.shape[1] >= self.max_length


class MaxTimeCriteria(StoppingCriteria):
    """All end after ``max_time`` seconds."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> bool:
        return time.time() - self.initial_timestamp > self.max_time


class EosTokenCriteria(StoppingCriteria):
    """A sequence ends with one of some tokens."""

    def __init__(self, eos_token_id: int | Sequence[int]) -> None:
        self.eos_token_id = np.atleast_1d(np.asarray(eos_token_id)).tolist()

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> Ended:
        return np.isin(to_numpy(input_ids)[:, -1], self.eos_token_id)


class StopStrings(StoppingCriteria):
    """A sequence ends with the token that completes one of some strings, in prompt and text."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: str | Sequence[str]) -> None:
        texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        self._tokenizer = tokenizer
        self._stops = [text.encode() for text in texts]
        self._longest = max(map(len, self._stops), default=0)

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> Ended:
        return np.array([self.completed(row) for row in to_numpy(input_ids)])

    def completed(self, ids: Sequence[int] | NDArray[np.integer]) -> bool:
        """Whether the last of the ids completes a stop string."""
        last = self._bytes(ids[-1])
        before = b""
        for i in reversed(ids[:-1]):
            if len(before) >= self._longest - 1:
                break
            before = self._bytes(i) + before
        for stop in self._stops:
            # It must end inside the last token.
            start = max(0, len(before) - len(stop) + 1)
            if last and (before[start:] + last).find(stop) >= 0:
                return True
        return False

    def _bytes(self, token: Any) -> bytes:
        return self._tokenizer.token_bytes(token) if 0 <= token < self._tokenizer.n_vocab else b""


class StoppingCriteriaList(list[Callable[..., Any]]):
    """A sequence ends where one of them says so."""

    def __call__(self, input_ids: Array, scores: Any, **kwargs: Any) -> Array:
        ended = False
        for criterion in self:
            ended = criterion(input_ids, scores, **kwargs) | ended
        return ended

    @property
    def max_length(self) -> int | None:
        lengths = [c.max_length for c in self if isinstance(c, MaxLengthCriteria)]
        return lengths[0] if lengths else None


def ended(
    criteria: Sequence[Callable[..., Any]], ids: NDArray[np.int64], scores: Any, device: Any
) -> Ended:
    """Of each row whether one of the criteria ends it.

    Args:
        scores: of the steps so far, arrays of the script's kind, or None.
        device: that of the torch tensors to call those of the script with, None for numpy.
    """
    found = np.zeros(len(ids), bool)
    for criterion in criteria:
        foreign = type(criterion).__module__.partition(".")[0] == "transformers"
        where = "cpu" if device is None and foreign and loaded_torch() else device
        found |= to_numpy(criterion(given(ids, where), scores)).astype(bool)
    return found
