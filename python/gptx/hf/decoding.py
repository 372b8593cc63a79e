"""Three ways to continue a batch, with the same tokens where they overlap.

`by_engine` lets the engine choose; `in_step` takes all rows one token further at a time through
Python, for what a script adds or wants to see; `by_search` is beam and contrastive search.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx import jobs
from gptx.beams import log_softmax
from gptx.errors import ParameterError
from gptx.hf.arguments import Arguments
from gptx.hf.arrays import given
from gptx.hf.processors import processed
from gptx.hf.stopping import StopStrings, ended
from gptx.hf.streamers import BaseStreamer
from gptx.jobs import Event, Job, SampleJob, Task
from gptx.model import Model
from gptx.steered import _without_banned

_LARGEST = np.finfo(np.float32).max


class Continued(NamedTuple):
    """What was generated.

    Attributes:
        rows: the new tokens of each row, its end token included.
        totals: the scores of beams ``[B]``.
        scores, logits: of each step ``[B, V]``, where they were asked for.
    """

    rows: list[list[int]]
    totals: list[float] | None = None
    scores: list[NDArray[np.float32]] | None = None
    logits: list[NDArray[np.float32]] | None = None


class _Sample(SampleJob):
    """A sample that ends at the strings of a `StopStrings` too, and tells a streamer its tokens."""

    def __init__(
        self,
        task: Task,
        *,
        end: int,
        stops: StopStrings | None,
        put: Callable[[int], None] | None,
        **changes: Any,
    ) -> None:
        super().__init__(task, **changes)
        self._end_token = end
        self._stops = stops
        self._put = put
        self._context = task.ids.tolist()
        self.tokens: list[int] = []

    def take(self, event: Event) -> None:
        if self.finished:
            return
        super().take(event)
        by_end = event.token < 0 and event.finish == "stop"
        token = self._end_token if by_end else event.token
        if token < 0:
            return
        self.tokens.append(token)
        if self._put is not None:
            self._put(token)
        if self._stops is not None and not self.finished:
            self._context.append(token)
            if self._stops.completed(self._context):
                self.cancel()


def by_engine(
    model: Model, call: Arguments, stops: StopStrings | None, streamer: BaseStreamer | None
) -> Continued:
    """Rows of one end token at most, without functions of the script."""
    batch = call.batch
    put = None
    if streamer is not None:

        def put(token: int) -> None:
            streamer.put(given(np.array([token]), batch.device))

    end = call.possible_ends[0] if call.possible_ends else -1
    started: list[Job] = []
    try:
        for i in range(len(batch.ids)):
            task = model._task(batch.row(i), call.params(row=i * call.count))
            maker = partial(_Sample, end=end, stops=stops, put=put)
            group = call.count > 1
            started.append(jobs.GroupJob(task, call.count, maker) if group else maker(task))
        _run(model, started)
    finally:
        for job in started:
            job.close()
    samples = [s for job in started for s in (job._samples if call.count > 1 else [job])]
    _raise_first(samples)
    return Continued([sample.tokens for sample in samples])


def by_search(model: Model, call: Arguments, stops: StopStrings | None) -> Continued:
    """Beam search, or contrastive search."""
    batch = call.batch
    chained = call.changes or bool(call.config.renormalize_logits)
    params = call.search_params(changes=not chained)
    started: list[Job] = []
    chains = []
    try:
        for i in range(len(batch.ids)):
            chains.append(_RowChain(call, i))
            if chained:
                params = dataclasses.replace(params, logits_processors=(chains[i],))
            started.append(jobs.start(model._task(batch.row(i), params)))
        _run(model, started)
    finally:
        for job in started:
            job.close()
    _raise_first(started)
    rows, totals = [], []
    for i, job in enumerate(started):
        row, choices = batch.row(i), job.generation().choices
        ends = _ends_of(model, call, row, [c.token_ids for c in choices], chains[i])
        for choice, end in zip(choices, ends, strict=True):
            ids = list(choice.token_ids)
            stopped = stops is not None and len(ids) and stops.completed([*row.tolist(), *ids])
            if choice.finish_reason == "stop" and not stopped and end >= 0:
                ids.append(end)
            rows.append(ids)
            totals.append(choice.score)
    return Continued(rows, None if call.contrasts else totals)


def in_step(
    model: Model,
    call: Arguments,
    criteria: Sequence[Callable[..., Any]],
    streamer: BaseStreamer | None,
) -> Continued:
    """As transformers does it: scores ``[B, V]`` through all processors, a token for each row, then
    all criteria, until every row has ended."""
    loop = _Loop(model, call, criteria)
    try:
        while not loop.done:
            tokens = loop.advance()
            if streamer is not None:
                streamer.put(given(tokens, call.batch.device))
    finally:
        loop.close()
    return loop.result()


class _Loop:
    def __init__(
        self, model: Model, call: Arguments, criteria: Sequence[Callable[..., Any]]
    ) -> None:
        batch, count = call.batch, call.count
        self._engine = model._engine
        self._call = call
        self._criteria = criteria
        self._ids = np.repeat(batch.ids, count, axis=0)
        self._shape = (len(self._ids), model.config.vocab_size)
        more = call.filters_more
        self._chain = call.chain(scale=more)
        self._warpers = [] if more else call._warpers()
        self._unfinished = np.ones(len(self._ids), bool)
        self._rows: list[list[int]] = [[] for _ in self._ids]
        config = call.config
        reports = bool(config.return_dict_in_generate)
        self._scores: list[Any] | None = [] if reports and config.output_scores else None
        self._logits: list[Any] | None = [] if reports and config.output_logits else None
        self._deadline = None if config.max_time is None else time.monotonic() + config.max_time
        self._tasks: list[Task] = []
        self._requests: list[int] = []
        self._alive: set[int] = set()
        try:
            for i in range(len(self._ids)):
                params = call.params(filters=not more, changes=False, row=i)
                params = dataclasses.replace(params, max_time=None, stop_token_ids=())
                self._tasks.append(model._task(batch.row(i // count), params))
                self._requests.append(self._tasks[-1].submit(held=True))
                self._alive.add(self._requests[-1])
        except BaseException:
            self.close()
            raise

    @property
    def done(self) -> bool:
        return not self._unfinished.any()

    def advance(self) -> NDArray[np.int64]:
        """Computes and chooses the next token of every row, ``[B]``."""
        logits = self._next_logits()
        scores = processed(self._chain, self._ids, logits.copy(), self._call.batch.device)
        self._report(logits, scores)
        pad = self._call.pad
        tokens = np.full(len(self._ids), 0 if pad is None else pad, np.int64)
        going = self._unfinished.copy()
        # Where no end token is set, transformers goes on with rows that have ended.
        alive = [i for i, r in enumerate(self._requests) if r in self._alive]
        for i in alive if not self._call.ends else [i for i in alive if going[i]]:
            tokens[i], last = self._choose(i, scores[i])
            self._rows[i].append(int(tokens[i]))
            if last:
                self._unfinished[i] = False
                self._release(self._requests[i])
        self._ids = np.concatenate([self._ids, tokens[:, None]], axis=1)
        self._end_rows()
        return tokens

    def result(self) -> Continued:
        return Continued(self._rows, None, self._scores, self._logits)

    def close(self) -> None:
        for request in list(self._alive):
            self._release(request)

    def _next_logits(self) -> NDArray[np.float32]:
        logits = np.zeros(self._shape, np.float32)
        waiting = set(self._alive)
        while waiting:
            for raw in self._engine.advance(sorted(waiting)):
                event = Event(*raw)
                i = self._requests.index(event.request)
                waiting.discard(event.request)
                if event.finish == "non_finite":
                    raise self._tasks[i].non_finite(len(self._rows[i]))
                logits[i] = self._engine.held_logits(event.request)[-1]
        return logits

    def _choose(self, i: int, scores: NDArray[np.float32]) -> tuple[int, bool]:
        """A token, and whether the context has no room for another."""
        if np.isneginf(scores).all():
            if self._call.config.do_sample:
                raise ParameterError("logits_processor", "-inf for all", "a token that may follow")
            scores = np.zeros_like(scores)  # transformers takes the first of equals too
        # As finite numbers, and which of them may be chosen.
        finite, allowed = _without_banned(np.minimum(scores, _LARGEST), None)
        words = () if allowed is None else allowed
        event = Event(*self._engine.choose(self._requests[i], finite, words))
        return event.token, event.finish != ""

    def _end_rows(self) -> None:
        late = self._deadline is not None and time.monotonic() > self._deadline
        device = self._call.batch.device
        scores = None if self._scores is None else tuple(given(s, device) for s in self._scores)
        over = ended(self._criteria, self._ids, scores, device)
        over |= np.isin(self._ids[:, -1], list(self._call.ends))
        over |= late or self._ids.shape[1] >= self._call.max_length
        self._unfinished &= ~over
        for i in np.flatnonzero(~self._unfinished):
            if self._call.ends or self.done:
                self._release(self._requests[i])

    def _release(self, request: int) -> None:
        if request in self._alive:
            self._alive.remove(request)
            self._engine.release(request)

    def _report(self, logits: NDArray[np.float32], scores: NDArray[np.float32]) -> None:
        if self._logits is not None:
            self._logits.append(logits)
        if self._scores is not None:
            self._scores.append(processed(self._warpers, self._ids, scores, None))


def _run(model: Model, started: Sequence[Job]) -> None:
    while running := [job for job in started if not job.finished]:
        jobs.step(model._engine, running)


def _raise_first(started: Sequence[Job]) -> None:
    error = next((job.error for job in started if job.error is not None), None)
    if error is not None:
        raise error


class _RowChain:
    """transformers' processors as one of gptx: ``f(ids [T], scores [V])``, for one prompt."""

    def __init__(self, call: Arguments, row: int) -> None:
        self._chain = call.chain(row, scale=True)
        self._padded = call.batch.ids[row]
        self._prompt = len(call.batch.row(row))
        self._device = call.batch.device

    def __call__(self, ids: NDArray[np.int32], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        ids = np.concatenate([self._padded, ids[self._prompt :].astype(np.int64)])
        return processed(self._chain, ids[None], scores[None], self._device)[0]


def _ends_of(
    model: Model,
    call: Arguments,
    row: NDArray[np.int32],
    texts: Sequence[tuple[int, ...]],
    chain: _RowChain,
) -> list[int]:
    """The end token behind each text of a search. Of equal texts the better one has the likelier
    end token, for their scores differ in that alone."""
    ends = call.possible_ends
    if len(ends) < 2:
        return [ends[0] if ends else -1] * len(texts)
    out = []
    for i, text in enumerate(texts):
        ids = np.concatenate([row, np.array(text, np.int32)])
        if len(ids) >= model.config.block_size:
            out.append(ends[0])
            continue
        scores = chain(ids, log_softmax(model.logits(ids)[-1]))
        order = sorted(ends, key=lambda end: -scores[end])
        out.append(order[min(texts[:i].count(text), len(ends) - 1)])
    return out
