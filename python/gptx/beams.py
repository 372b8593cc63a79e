"""Beam search: the texts of the largest probability, several of them kept at every step.

One group of beams is searched as transformers 5 does (``_beam_search``), several as its version 4
did (``_group_beam_search``; Vijayakumar et al., "Diverse Beam Search", 2018). A step of the search
is one step of the engine for all beams of all prompts; beams share the blocks of what they have in
common.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx import requests
from gptx.errors import ParameterError
from gptx.generation import Continuation, Generation, TokenLogprob
from gptx.guided import GuideState
from gptx.jobs import Event, Job, Task, step
from gptx.sampling import SamplingParams
from gptx.steered import process


class Beam(NamedTuple):
    """A text that is being searched.

    ``score`` is what it would have if it ended here, ``parent`` the index in the step before of the
    beam that it continues.
    """

    text: str
    score: float
    parent: int


class BeamStep(NamedTuple):
    """What a step of the search made.

    Attributes:
        step: its number, from 1.
        beams: those that go on, best first in each group; none after the last step.
        finished: texts that ended and may be the result, with their scores, best first.
    """

    step: int
    beams: tuple[Beam, ...]
    finished: tuple[tuple[str, float], ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Path:
    """A beam: its text, its summed scores, the request that holds its keys and values."""

    text: Continuation
    request: int
    guide: GuideState | None  # where the text stands in what it must match
    total: float = 0.0
    index: int = 0  # among the beams of its step
    parent: int = 0  # the index of the beam that it continues
    score: float = 0.0  # once it is finished: the total with the length penalty

    @property
    def tokens(self) -> list[int]:
        return self.text.token_ids


class _Candidate(NamedTuple):
    total: float
    path: _Path
    token: int
    logprob: TokenLogprob | None

    def extended(self) -> _Path:
        """The beam that may go on by this token; the token is not appended."""
        path = self.path
        guide = None if path.guide is None else path.guide.copy()
        return _Path(path.text.fork(), path.request, guide, self.total, parent=path.index)


class _Search:
    """The beams of a group, and what of them has finished.

    Attributes:
        running: beams that go on, best first.
        finished: at most ``width`` that ended, best first.
        length: tokens of the running beams.
        chosen: their last tokens, also where the search ends with them.
        done: nothing better is to be expected, by ``early_stopping``.
    """

    def __init__(self, root: _Path, params: SamplingParams, ends: frozenset[int], most: int):
        self.running = [root]
        self.finished: list[_Path] = []
        self.length = 0
        self.chosen: list[int] = []
        self.done = False
        self.width = params.num_beams // params.num_beam_groups
        # So many that enough remain where each beam's best tokens all end the text.
        self.candidates = max(2, 1 + len(ends)) * self.width
        self._ends = ends
        self._most = most  # tokens that a text may have
        self._penalty = params.length_penalty
        self._early = params.early_stopping
        # Version 4 looks at the best candidate, not at the best beam that goes on, and at the
        # largest length ends all of these, not the best candidates.
        self._grouped = params.num_beam_groups > 1

    def advance(self, length: int, candidates: list[_Candidate]) -> None:
        """Takes the best candidates, best first, for the ``length``-th token."""
        parents = self.running
        self.running = []
        for rank, candidate in enumerate(candidates):
            if rank >= self.width and len(self.running) == self.width:
                break
            path = candidate.extended()
            if not self._ends_at(path, candidate, length):
                if len(self.running) < self.width:
                    self.running.append(path)
            elif rank < self.width:
                self._finish(path, length)
        self.chosen = [path.tokens[-1] for path in self.running]
        if not self.running and not self.finished:  # nothing may follow: everything is banned
            self.running, guide = parents, parents[0].guide
            if guide is not None and not guide.is_accepting:
                allowed = "a text that no other parameter ends before it may end"
                raise ParameterError("guide", parents[0].text.text, allowed)
            self.end(length - 1, "stop")
        best = (candidates if self._grouped else self.running)[:1]
        self.done = not self.running or not self._may_improve(length, best)
        if self.done:
            self.running = []
        elif length == self._most:
            self.end(length, "length")
        self.length = length

    def end(self, length: int, reason: str) -> None:
        """Ends all beams where they are."""
        for path in self.running:
            path.text.end(reason)
            self._finish(path, length)
        self.running, self.done = [], True

    def score(self, path: _Path, length: int) -> float:
        return path.total / max(1, length) ** self._penalty

    def _ends_at(self, path: _Path, candidate: _Candidate, length: int) -> bool:
        """Appends the token and says whether the text ends."""
        text = path.text
        if candidate.token in self._ends:
            text.end("stop")
            return True
        text.push(candidate.token, candidate.logprob)
        if path.guide is not None:
            path.guide.accept(candidate.token)
        if not text.finish and path.guide is not None and path.guide.is_finished:
            text.end("stop")
        if not text.finish and length == self._most and not self._grouped:
            text.end("length")
        return text.finish != ""

    def _finish(self, path: _Path, length: int) -> None:
        path.score = self.score(path, length)
        self.finished = sorted([*self.finished, path], key=lambda p: -p.score)[: self.width]

    def _may_improve(self, length: int, best: Sequence[_Path | _Candidate]) -> bool:
        if len(self.finished) < self.width:
            return True
        if self._early is True:
            return False
        # With a positive penalty a longer text has the better score, so the longest is the bound.
        reached = self._most if self._early == "never" and self._penalty > 0 else length
        return best[0].total / reached**self._penalty > self.finished[-1].score


class BeamJob(Job):
    """All beams of a prompt; a text may end in a stop string as in an end token, once the string is
    complete, and then has the score of the tokens up to there."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        params = task.params
        self._length = 0
        self._told = 0  # characters that are certain
        self._finish = ""
        self._cached = 0
        self._ready = False  # the logits of all beams are there
        self._steps: deque[BeamStep] = deque()
        self._watched = False
        ends = frozenset(requests.end_tokens(task.model, params))
        room = task.model.config.block_size - len(task.ids)
        most = min(params.max_new_tokens, room)
        guide = None if params.guide is None else params.guide.start(task.model, sorted(ends))
        self._root = self._own(task.submit(held=True))
        self._groups = [
            _Search(_Path(task.continuation(), self._root, guide), params, ends, most)
            for _ in range(params.num_beam_groups)
        ]

    @property
    def finished(self) -> bool:
        return self._finish != ""

    def take(self, event: Event) -> None:
        self.waiting.discard(event.request)
        if event.finish == "time":
            for group in self._groups:
                group.end(self._length, "time")
            self._end("time")
        elif not self.waiting:
            if self._length == 0:
                self._cached = self.task.engine.usage(self._root)["cached"]
            self._ready = True
            self._advance()

    def prepare(self) -> None:
        if self._ready and not self.finished:  # Ctrl-C came while a processor ran
            self._advance()

    def cancel(self) -> None:
        self._end("cancelled")

    def generation(self) -> Generation:
        found = []
        for path in self._ranked()[: self.task.params.n]:
            found.append(
                self.task.generation(
                    path.text, score=path.score, error=self.error, cached_tokens=self._cached
                )
            )
            if self.error is not None or (self.finished and not path.text.finish):
                found[-1] = dataclasses.replace(found[-1], finish_reason=self._finish)
        return dataclasses.replace(found[0], others=tuple(found[1:]))

    def scores(self, path: _Path) -> NDArray[np.float32] | None:
        """The log-probabilities [V] of a beam's next token, where processors change them; None
        leaves them to the core. Processors see log softmax(logits), as in transformers; the
        penalties and bans of the parameters follow, then the mask of the guide.
        """
        processors = self.task.params.logits_processors
        logits = self.task.engine.held_logits(path.request)[-1] if processors else None
        if logits is None or not np.isfinite(logits).all():  # which the core reports
            return None
        ids = np.concatenate([self.task.ids, np.array(path.tokens, np.int32)])
        return process(processors, ids, log_softmax(logits))

    def _tell(self) -> None:
        """Adds to the pieces what all texts have in common that may still become the result."""
        if self.finished:
            certain = self._ranked()[0].text.text
        else:
            texts = [path.text.text for path in self._running()]
            ended = [group.finished[0] for group in self._groups if group.finished]
            if ended:
                texts.append(max(ended, key=lambda path: path.score).text.text)
            first, last = min(texts), max(texts)  # all others sort between them
            end = self._told
            while end < len(first) and last.startswith(first[end], end):
                end += 1
            certain = first[:end]
        self._pieces.append(certain[self._told :])
        self._told = len(certain)

    def _running(self) -> list[_Path]:
        return [path for group in self._groups for path in group.running]

    def _ranked(self) -> list[_Path]:
        """Everything that may be the result, best first."""
        paths = [path for group in self._groups for path in group.finished]
        for group in self._groups:
            for path in group.running:
                path.score = group.score(path, self._length)
                paths.append(path)
        return sorted(paths, key=lambda path: -path.score)

    def _advance(self) -> None:
        length = self._length + 1
        try:
            self._advance_groups(length)
        except Exception as error:  # of a processor, the guide, or the model
            self._fail(error)
            return
        self._ready, self._length = False, length
        for index, path in enumerate(self._running()):
            path.index = index
        if self._watched:
            self._steps.append(self._step())
        if all(group.done for group in self._groups):
            self._end("done")
        else:
            self._tell()
            self._feed()

    def _advance_groups(self, length: int) -> None:
        penalty = self.task.params.diversity_penalty
        chosen: Counter[int] = Counter()  # by the groups before
        for group in self._groups:
            if not group.done and group.length < length:
                candidates = self._candidates(group, [(t, -penalty * n) for t, n in chosen.items()])
                group.advance(length, candidates)
            if group.length == length:
                chosen.update(group.chosen)

    def _candidates(self, group: _Search, bias: list[tuple[int, float]]) -> list[_Candidate]:
        """The best tokens of all beams of a group, best first."""
        found = []
        for path in group.running:
            best = self.task.engine.candidates(
                path.request,
                group.candidates,
                scores=self.scores(path),
                bias=bias,
                allowed=() if path.guide is None else path.guide.mask(),
            )
            if best is None:
                raise self.task.non_finite(self._length)
            found.append(best)
        rows = np.repeat(np.arange(len(found)), [len(best[0]) for best in found])
        ids, scores, logprobs = (np.concatenate([best[i] for best in found]) for i in range(3))
        totals = scores + np.array([path.total for path in group.running])[rows]
        order = np.argsort(-totals, kind="stable")[: group.candidates]
        columns = [column[order].tolist() for column in (totals, rows, ids, logprobs)]
        wanted = self.task.params.logprobs is not None
        return [
            _Candidate(
                total,
                group.running[row],
                token,
                TokenLogprob(token, logprob, tuple(found[row][3])) if wanted else None,
            )
            for total, row, token, logprob in zip(*columns, strict=True)
        ]

    def _feed(self) -> None:
        """Gives every beam a request with its keys and values, and the request its last token."""
        engine = self.task.engine
        taken: set[int] = set()
        running = self._running()
        for path in running:
            if path.request in taken:
                path.request = self._own(engine.fork(path.request))
            taken.add(path.request)
        for request in self._requests - taken:
            self._release(request)
        for path in running:
            engine.feed(path.request, [path.tokens[-1]])
            self.waiting.add(path.request)

    def _step(self) -> BeamStep:
        finished = [path for group in self._groups for path in group.finished]
        return BeamStep(
            self._length,
            tuple(
                Beam(path.text.text, group.score(path, self._length), path.parent)
                for group in self._groups
                for path in group.running
            ),
            tuple((p.text.text, p.score) for p in sorted(finished, key=lambda p: -p.score)),
        )

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._end("error")

    def _end(self, reason: str) -> None:
        if not self.finished:
            self._finish = reason
            self._tell()
        self.close()


class BeamStream(Iterator[BeamStep]):
    """The steps of a search; leaving the loop cancels the rest. Made by `Model.beams`."""

    def __init__(self, job: BeamJob) -> None:
        self._job = job
        job._watched = True

    def __next__(self) -> BeamStep:
        job = self._job
        while not job._steps:
            if job.finished:
                job.close()
                if job.error is not None:
                    raise job.error
                raise StopIteration
            step(job.task.engine, [job])
        return job._steps.popleft()

    def __del__(self) -> None:
        self._job.close()

    def close(self) -> None:
        """Cancels what has not been searched yet."""
        self._job.cancel()

    @property
    def result(self) -> Generation:
        """The best text so far and the ``others``; complete once the loop has ended."""
        return self._job.generation()


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Summed in float64, rounded once."""
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)
