"""Contrastive search: among the most likely tokens, one whose hidden state is unlike all before.

Su et al., "A Contrastive Framework for Neural Text Generation", 2022, as transformers 4 does it
(``_contrastive_search``). The candidates of a token are one step of the engine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptx import requests
from gptx.errors import ParameterError
from gptx.generation import Generation, TokenLogprob
from gptx.jobs import Event, Job, Task
from gptx.steered import process


class ContrastiveJob(Job):
    """Every candidate is a fork of the text so far; the one that is chosen becomes the text."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        params, config = task.params, task.model.config
        self.text = task.continuation()
        self._ends = frozenset(requests.end_tokens(task.model, params))
        self._most = min(params.max_new_tokens, config.block_size - len(task.ids))
        # Of every token so far the hidden state, scaled to length 1: [T, C].
        self._context = np.zeros((len(task.ids) + self._most, config.n_embd), np.float32)
        self._known = 0
        guide = params.guide
        self._guide = None if guide is None else guide.start(task.model, sorted(self._ends))
        self._next = 0  # a request whose candidates are due
        self._candidates: dict[int, TokenLogprob] = {}  # by their requests
        self._weights: dict[int, float] = {}  # their probabilities
        self._prompt = self._own(
            task.submit(held=True, hidden=True, wanted=len(task.ids), logits=1)
        )

    @property
    def finished(self) -> bool:
        return self.text.finish != ""

    def take(self, event: Event) -> None:
        self.waiting.discard(event.request)
        if event.finish:
            self._end(event.finish)
        elif not self.waiting:
            self._next = self._choose() if self._candidates else self._begin()
            self.prepare()

    def prepare(self) -> None:
        if self._next and not self.finished:  # also where Ctrl-C came while a processor ran
            try:
                self._propose(self._next)
            except Exception as error:  # of a processor or the guide
                self._fail(error)
            self._next = 0

    def cancel(self) -> None:
        self.text.finish = self.text.finish or "cancelled"
        self.close()

    def generation(self) -> Generation:
        return self.task.generation(self.text, error=self.error)

    def scores(self, request: int) -> NDArray[np.float32]:
        """The logits [V] from which a request's next token is chosen, before the penalties and bans
        of the parameters."""
        scores = self.task.engine.held_logits(request)[-1]
        processors = self.task.params.logits_processors
        if not processors or not np.isfinite(scores).all():  # which the core reports
            return scores
        ids = np.concatenate([self.task.ids, np.array(self.text.token_ids, np.int32)])
        return process(processors, ids, scores)

    def _begin(self) -> int:
        self._remember(_unit(self.task.engine.held_hidden(self._prompt)))
        return self._prompt

    def _propose(self, request: int) -> None:
        """Forks a request once for each of its most likely tokens."""
        engine, params, guide = self.task.engine, self.task.params, self._guide
        if guide is not None and guide.is_finished:
            self._end("stop")
            return
        allowed = () if guide is None else guide.mask()
        scores = self.scores(request)
        found = engine.candidates(request, params.top_k, scores=scores, allowed=allowed)
        if found is None:
            self._fail(self.task.non_finite(len(self.text.token_ids)))
            return
        ids, scores, logprobs, top, log_sum = found
        if len(ids) == 0:  # nothing may follow: everything is banned
            if guide is not None and not guide.is_accepting:
                allowed = "a text that no other parameter ends before it may end"
                raise ParameterError("guide", self.text.text, allowed)
            self._end("stop")
            return
        requests = [request] + [self._own(engine.fork(request)) for _ in ids[1:]]
        self._candidates = {
            r: TokenLogprob(int(i), float(p), tuple(top))
            for r, i, p in zip(requests, ids, logprobs, strict=True)
        }
        weights = np.exp(scores.astype(np.float64) - log_sum)
        self._weights = dict(zip(requests, weights.tolist(), strict=True))
        for r, candidate in self._candidates.items():
            engine.feed(r, [candidate.token_id])
            self.waiting.add(r)

    def _choose(self) -> int:
        """Makes the best candidate the text and returns its request."""
        alpha, requests = self.task.params.penalty_alpha, list(self._candidates)
        states = np.concatenate([_unit(self.task.engine.held_hidden(r)) for r in requests])
        alike = (self._context[: self._known] @ states.T).max(axis=0)
        weights = np.array([self._weights[r] for r in requests], np.float32)
        best = int(np.argmax((1 - alpha) * weights - alpha * alike))
        chosen = self._candidates[requests[best]]
        self._remember(states[best : best + 1])
        for request in requests[:best] + requests[best + 1 :]:
            self._release(request)
        if chosen.token_id in self._ends:
            self._end("stop")
        else:
            logprob = chosen if self.task.params.logprobs is not None else None
            self._pieces.append(self.text.push(chosen.token_id, logprob))
            if self._guide is not None:
                self._guide.accept(chosen.token_id)
            if self.finished:
                self.close()
            elif len(self.text.token_ids) == self._most:
                self._end("length")
        return requests[best]

    def _remember(self, states: NDArray[np.float32]) -> None:
        self._context[self._known : self._known + len(states)] = states
        self._known += len(states)

    def _fail(self, error: Exception) -> None:
        self.error, self.text.finish = error, "error"
        self.close()

    def _end(self, reason: str) -> None:
        self._pieces.append(self.text.end(reason))
        self.close()


def _unit(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows [n, C] scaled to length 1."""
    return states / np.linalg.norm(states, axis=1, keepdims=True)
