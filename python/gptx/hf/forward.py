"""A batch through the model: its logits, its hidden states, its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ContextLengthError, ParameterError
from gptx.hf.arrays import Array, matrix
from gptx.hf.cache import Cache
from gptx.hf.outputs import CausalLMOutput
from gptx.hf.prompts import Batch
from gptx.model import Model

_IGNORED = -100  # a label that is not scored


class Output(CausalLMOutput):
    """Makes the cache when it is asked for, so that no memory is held for those who do not."""

    def remember(self, cache: Cache | Callable[[], Cache]) -> None:
        object.__setattr__(self, "_source", cache)

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("_source")
        if name in ("past_key_values", "cache") and source is not None:
            if not isinstance(source, Cache):
                self.remember(source())
            return self.__dict__["_source"]
        return super().__getattr__(name)

    def __getitem__(self, key: Any) -> Any:
        return self.past_key_values if key == "past_key_values" else super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        there = key == "past_key_values" and "_source" in self.__dict__
        return there or super().__contains__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[name] for name in self.fields if name in self)


def logits(model: Model, batch: Batch) -> NDArray[np.float32]:
    """Float32 ``[B, T, V]``, zeros at padding; all rows in the same steps."""
    size, engine = model.config.block_size, model._engine
    out = np.zeros((*batch.ids.shape, model.config.vocab_size), np.float32)
    lengths = batch.mask.sum(axis=1)
    if lengths.max() > size:
        raise ContextLengthError(int(lengths.max()), size)
    running: dict[int, int] = {}
    try:
        for i in range(len(batch.ids)):
            row = batch.row(i)
            request = engine.submit(row, sampling={}, max_new_tokens=1, held=True, wanted=len(row))
            running[request] = i
        while running:
            for request in {event[0] for event in engine.advance(list(running))}:
                i = running.pop(request)
                out[i, batch.mask[i]] = engine.held_logits(request)
                engine.release(request)
    finally:
        for request in running:
            engine.release(request)
    return out


def hidden_states(model: Model, batch: Batch) -> NDArray[np.float32]:
    """Float32 ``[n_layer + 1, B, T, C]``, zeros at padding."""
    config = model.config
    out = np.zeros((config.n_layer + 1, *batch.ids.shape, config.n_embd), np.float32)
    for i, mask in enumerate(batch.mask):
        out[:, i, mask] = model.hidden_states(batch.row(i))
    return out


def loss(logits: NDArray[np.float32], batch: Batch, labels: Array) -> NDArray[np.float32]:
    """The mean cross entropy of ``labels[:, 1:]``, float32, of no shape; NaN of no labels."""
    targets = matrix("labels", labels)
    if targets.shape != batch.ids.shape:
        allowed = f"the shape of input_ids, {list(batch.ids.shape)}"
        raise ParameterError("labels", list(targets.shape), allowed)
    scored = targets[:, 1:] != _IGNORED
    if (scored & ~batch.mask[:, :-1]).any():
        row, place = np.argwhere(scored & ~batch.mask[:, :-1])[0].tolist()
        got = f"an id at [{row}, {place + 1}]"
        allowed = f"{_IGNORED} for the token behind padding, where there are no logits"
        raise ParameterError("labels", got, allowed)
    wanted = targets[:, 1:][scored]
    size = logits.shape[-1]
    if ((wanted < 0) | (wanted >= size)).any():
        raise ParameterError("labels", targets.tolist(), f"ids from 0 to {size - 1}, or {_IGNORED}")
    total, count = 0.0, len(wanted)
    for i in np.flatnonzero(scored.any(axis=1)):
        rows = logits[i, :-1][scored[i]].astype(np.float64)
        largest = rows.max(axis=1)
        sums = largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))
        chosen = rows[range(len(rows)), targets[i, 1:][scored[i]]]
        total += float((sums - chosen).sum())
    return np.array(total / count if count else np.nan, np.float32)
