"""Texts whose every token goes through Python: logits processors, and guides of what may come."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptx import requests
from gptx.errors import ParameterError
from gptx.guided import GuideState
from gptx.jobs import Event, SampleJob, Task
from gptx.sampling import LogitsProcessor


def maker(task: Task) -> Callable[..., SteeredJob]:
    """What makes the jobs of a task, from it and the changes to its request.

    Raises:
        MissingExtraError, ParameterError, TokenizeError: the guide cannot be used.
    """
    guide = task.params.guide
    if guide is None:
        return SteeredJob
    ends = requests.end_tokens(task.model, task.params)
    return partial(SteeredJob, guide=guide.start(task.model, ends))


class SteeredJob(SampleJob):
    """The engine chooses every token, from logits that were changed and among those allowed.

    Args:
        guide: where the text begins; it is copied.
    """

    def __init__(self, task: Task, *, guide: GuideState | None = None, **changes: Any) -> None:
        super().__init__(task, held=True, **changes)
        self._guide = None if guide is None else guide.copy()
        self._ids = task.ids
        self._ready = False  # the logits of its next token are there

    def prepare(self) -> None:
        if self._ready and not self.finished:  # Ctrl-C came while a processor ran
            self._choose()
        super().prepare()

    @property
    def _drafts(self) -> bool:
        return self._guide is not None or super()._drafts

    def _draft(self, n: int) -> list[int]:
        forced = [] if self._guide is None else self._guide.forced()
        return forced[:n] or super()._draft(n)

    def take(self, event: Event) -> None:
        if event.finish or self.finished:
            super().take(event)
        else:
            self._ready = True
            self._choose()

    def _choose(self) -> None:
        try:
            event = self._chosen()
        except Exception as error:
            self._fail(error)
            return
        super().take(event)

    def _chosen(self) -> Event:
        guide = self._guide
        if guide is not None and guide.is_finished:
            return self._end("stop")
        words = None if guide is None else guide.mask()
        logits = None
        if processors := self.task.params.logits_processors:
            raw = self.task.engine.held_logits(self.request)[-1]
            if not np.isfinite(raw).all():
                return self._end("non_finite")
            logits = process(processors, self._ids, raw.copy())
            logits, words = _without_banned(logits, words)
        self._ready = False
        chosen = self.task.engine.choose(self.request, logits, () if words is None else words)
        event = Event(*chosen)
        if processors and event.token >= 0:
            self._ids = np.append(self._ids, np.int32(event.token))
            if not math.isnan(event.logprob):
                event = event._replace(**_logprobs(raw, event.token, len(event.top)))
        return event if guide is None else _guided(guide, event)

    def _end(self, finish: str) -> Event:
        self._ready = False
        return Event(self.request, -1, finish, math.nan, [])


def process(
    processors: Sequence[LogitsProcessor], ids: NDArray[np.int32], logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Lets processors change logits ``[V]``, which may be written to, one after the other.

    Returns:
        float32 ``[V]``, finite or -inf.

    Raises:
        ParameterError: a result is not an array of floats ``[V]``, holds NaN or +inf, or nothing
            but -inf; the message names the processor.
    """
    ids = ids.view()
    ids.flags.writeable = False
    for i, processor in enumerate(processors):
        name, shape = f"logits_processors[{i}]", logits.shape
        try:
            result = processor(ids, logits)
        except StopIteration as error:  # it would end a stream as if the text were complete
            raise RuntimeError(f"{name} raised StopIteration") from error
        is_array = isinstance(result, np.ndarray)
        if not is_array or result.dtype.kind != "f" or result.shape != shape:
            got = f"{result.dtype} {list(result.shape)}" if is_array else type(result).__name__
            raise ParameterError(name, got, f"a float32 array {list(shape)} as its result")
        with np.errstate(over="ignore"):
            logits = result.astype(np.float32, copy=False)
        largest = logits.max()
        if not -math.inf < largest < math.inf:
            raise ParameterError(name, float(largest), "a finite number as the largest logit")
    return logits


def _without_banned(
    logits: NDArray[np.float32], words: NDArray[np.uint32] | None
) -> tuple[NDArray[np.float32], NDArray[np.uint32] | None]:
    """Finite logits and a mask without those that were -inf."""
    banned = np.isneginf(logits)
    if not banned.any():
        return logits, words
    bits = np.zeros(-(-len(logits) // 32) * 32, bool)
    bits[: len(logits)] = ~banned
    left = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
    if words is not None:
        left &= words
    if not left.any():
        got = "-inf for every other"
        raise ParameterError("logits_processors", got, "a logit for a token that guide allows")
    return np.where(banned, np.float32(0), logits), left


def _logprobs(raw: NDArray[np.float32], token: int, count: int) -> dict[str, Any]:
    """The log-probabilities of an event by the logits of the model itself."""
    logits = raw.astype(np.float64)
    largest = logits.max()
    logits -= largest + np.log(np.exp(logits - largest).sum())
    top: list[tuple[int, float]] = []
    if count:
        least = np.partition(raw, -count)[-count]
        likely = np.flatnonzero(raw >= least)
        likely = likely[np.argsort(-raw[likely], kind="stable")][:count]
        top = [(int(i), float(logits[i])) for i in likely]
    return {"logprob": float(logits[token]), "top": top}


def _guided(guide: GuideState, event: Event) -> Event:
    """The event, which ends the text where it is complete.

    Raises:
        ParameterError: what the guide allows is banned by another parameter.
    """
    if event.token >= 0:
        guide.accept(event.token)
        return event._replace(finish="stop") if guide.is_finished else event
    if event.finish == "stop" and not guide.is_accepting:
        got = "a text that another parameter ends, or whose every way on it bans"
        raise ParameterError("guide", got, "a text that may end where it does")
    return event
