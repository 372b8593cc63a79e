"""Prompts on their way: a job drives one or several requests of the engine to a `Generation`.

Everything that generates is a job, so that everything can be batched, streamed and cancelled. A job
names the requests whose events it waits for; `step` lets the engine run for all jobs together.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx import requests
from gptx.errors import NonFiniteLogitsError
from gptx.generation import Continuation, Generation, TokenLogprob
from gptx.sampling import MAX_SEED, SamplingParams

if TYPE_CHECKING:
    from gptx import _core
    from gptx.drafting import ModelDrafter
    from gptx.model import Model

_SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so that the seeds of samples differ


class Event(NamedTuple):
    """What a step brought: a token (-1: none), and why the request ended ("": not yet)."""

    request: int
    token: int
    finish: str
    logprob: float
    top: list[tuple[int, float]]


class Task(NamedTuple):
    """A prompt of a model: what every kind of job is made of."""

    model: Model
    ids: NDArray[np.int32]  # [T]
    prompt: str
    params: SamplingParams
    seed: int

    @property
    def engine(self) -> _core.Engine:
        return self.model._engine

    def continuation(self) -> Continuation:
        return Continuation(self.model._tokenizer, self.params.stop)

    def submit(self, **changes: Any) -> int:
        """A request with the parameters of the task, but for ``changes``."""
        return self.engine.submit(
            self.ids, **(requests.fields(self.model, self.params, self.seed) | changes)
        )

    def generation(self, text: Continuation, **more: Any) -> Generation:
        return Generation(
            prompt=self.prompt,
            text=text.text,
            token_ids=tuple(text.token_ids),
            finish_reason=text.finish or "unfinished",
            prompt_tokens=len(self.ids),
            completion_tokens=len(text.token_ids),
            logprobs=tuple(text.logprobs) if self.params.logprobs is not None else None,
            **({"seed": self.seed} | more),
        )

    def non_finite(self, generated: int) -> NonFiniteLogitsError:
        position = len(self.ids) + generated
        return NonFiniteLogitsError(
            f"logits at position {position}: expected finite numbers, got NaN or infinity; "
            "the weights are damaged or overflow"
        )


class Job(ABC):
    """One prompt on its way.

    Attributes:
        waiting: the requests whose events it waits for; empty once it is finished.
        error: why it failed, or None.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.waiting: set[int] = set()
        self.error: Exception | None = None
        self._requests: set[int] = set()
        self._pieces: deque[str] = deque()

    @property
    @abstractmethod
    def finished(self) -> bool: ...

    @abstractmethod
    def take(self, event: Event) -> None:
        """Takes an event of one of the requests it waits for."""

    @abstractmethod
    def generation(self) -> Generation:
        """The result so far; complete once it is finished."""

    def prepare(self) -> None:  # noqa: B027
        """Called before the engine runs; does nothing unless a job has something to propose."""

    def pieces(self) -> str:
        """The text that has become certain since the last call."""
        taken = []
        while self._pieces:  # another thread may be adding to them
            taken.append(self._pieces.popleft())
        return "".join(taken)

    def cancel(self) -> None:
        """Ends it where it is."""
        self.close()

    def close(self) -> None:
        """Gives everything back; may be called at any time, and again."""
        for request in list(self._requests):
            self._release(request)

    def _own(self, request: int) -> int:
        self._requests.add(request)
        self.waiting.add(request)
        return request

    def _release(self, request: int) -> None:
        self.waiting.discard(request)
        if request in self._requests:
            self._requests.remove(request)
            self.task.engine.release(request)


class SampleJob(Job):
    """The engine chooses every token."""

    def __init__(self, task: Task, **changes: Any) -> None:
        super().__init__(task)
        self.text = task.continuation()
        self._drafter: ModelDrafter | None = None
        if task.params.draft is not None:
            from gptx.drafting import ModelDrafter

            self._drafter = ModelDrafter(task)
        self._drafted_at = len(task.ids)  # tokens that stood there when it proposed more
        self._usage = {"cached": 0, "drafted": 0, "accepted": 0}
        self.request = self._own(task.submit(**changes))

    @property
    def finished(self) -> bool:
        return self.text.finish != ""

    def prepare(self) -> None:
        position = len(self.task.ids) + len(self.text.token_ids)
        if self.finished or not self._drafts or position == self._drafted_at:
            return
        n = self.task.engine.draft_length(self.request)
        if n == 0:
            return
        self._drafted_at = position
        draft = np.array(self._draft(n), np.int32)
        self.task.engine.propose(self.request, position, draft)

    @property
    def _drafts(self) -> bool:
        """Whether it guesses what comes next."""
        return self._drafter is not None

    def _draft(self, n: int) -> list[int]:
        """Up to n tokens that may come next; none is as good as wrong ones."""
        if self._drafter is None:
            return []
        return self._drafter.draft([*self.task.ids.tolist(), *self.text.token_ids], n)

    def take(self, event: Event) -> None:
        # A step may bring tokens behind a stop string; they are not part of the text.
        if self.finished:
            return
        if event.token >= 0:
            self._pieces.append(self.text.push(event.token, _logprob(event)))
        if event.finish == "non_finite":
            self._fail(self.task.non_finite(len(self.text.token_ids)))
        elif event.finish and not self.finished:
            self._pieces.append(self.text.end(event.finish))
        if self.finished:
            self.close()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self.text.finish = "error"
        self.close()

    def cancel(self) -> None:
        self.text.finish = self.text.finish or "cancelled"
        self.close()

    def close(self) -> None:
        if self.request in self._requests:
            self._usage = self.task.engine.usage(self.request)
        if self._drafter is not None:
            self._drafter.close()
        super().close()

    def generation(self) -> Generation:
        usage = {f"{name}_tokens": n for name, n in self._usage.items()}
        return self.task.generation(self.text, error=self.error, **usage)


class GroupJob(Job):
    """Several samples of one prompt, which is computed once.

    Args:
        make: makes the job of a sample from its task and the changes to its request.
    """

    def __init__(self, task: Task, count: int, make: Callable[..., SampleJob]) -> None:
        super().__init__(task)
        self._count = count
        self._make = make
        self._samples: list[SampleJob] = []
        self._by_request: dict[int, SampleJob] = {}
        self._prompt = self._own(task.submit(held=True, max_new_tokens=1))

    @property
    def finished(self) -> bool:
        return len(self._samples) == self._count and all(s.finished for s in self._samples)

    def take(self, event: Event) -> None:
        if event.request == self._prompt:
            self._begin()
        else:
            self._by_request[event.request].take(event)
        self._wait()

    def prepare(self) -> None:
        for job in self._samples:
            job.prepare()
        if self._samples:
            self._wait()

    def _wait(self) -> None:
        self.waiting = {r for job in self._samples for r in job.waiting}

    def _begin(self) -> None:
        params = self.task.params
        for i in range(self._count):
            seed = (self.task.seed + i * _SEED_STRIDE) % (MAX_SEED + 1)
            changes: dict[str, Any] = {"parent": self._prompt}
            if params.best_of:  # ranked by their log-probabilities, asked for or not
                fields = requests.fields(self.task.model, params, seed)["sampling"]
                changes["sampling"] = fields | {"logprobs": params.logprobs or 0}
            job = self._make(self.task._replace(seed=seed), **changes)
            self._samples.append(job)
            self._by_request[job.request] = job
        self._release(self._prompt)

    def cancel(self) -> None:
        for job in self._samples:
            job.cancel()
        super().cancel()

    def close(self) -> None:
        for job in self._samples:
            job.close()
        super().close()
        self.waiting.clear()

    def generation(self) -> Generation:
        samples = self._samples
        self.error = next((s.error for s in samples if s.error is not None), None)
        found = [s.generation() for s in samples]
        if self.task.params.best_of:
            scores = [s.text.mean_logprob for s in samples]
            order = sorted(range(len(found)), key=lambda i: -scores[i])[: self.task.params.n]
            found = [dataclasses.replace(found[i], score=scores[i]) for i in order]
        if not found:
            return self.task.generation(self.task.continuation())
        return dataclasses.replace(found[0], others=tuple(found[1:]), error=self.error)


def start(task: Task) -> Job:
    """The job for what the parameters ask."""
    params = task.params
    # A search is imported where it is used, so that `import gptx` stays cheap.
    if params.num_beams > 1:
        from gptx.beams import BeamJob

        return BeamJob(task)
    if params.penalty_alpha > 0:
        from gptx.contrastive import ContrastiveJob

        return ContrastiveJob(task)
    count = params.best_of or params.n
    make = _maker(task)
    return GroupJob(task, count, make) if count > 1 else make(task)


def _maker(task: Task) -> Callable[..., SampleJob]:
    """What makes the job of one continuation, from its task and the changes to its request."""
    if task.params.guide is not None or task.params.logits_processors:
        from gptx import steered

        return steered.maker(task)
    return SampleJob


def step(engine: _core.Engine, jobs: Sequence[Job]) -> None:
    """Lets the engine run until it has something for one of the jobs, and hands it out.

    Raises:
        KeyboardInterrupt: Ctrl-C; the jobs stand as they were.
    """
    for job in jobs:
        job.prepare()
    owners = {request: job for job in jobs for request in job.waiting}
    for raw in engine.advance(list(owners)):
        event = Event(*raw)
        job = owners[event.request]
        if event.request in job.waiting:
            job.take(event)


def random_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


def _logprob(event: Event) -> TokenLogprob | None:
    if event.logprob != event.logprob:  # NaN: none was asked for
        return None
    return TokenLogprob(event.token, event.logprob, tuple(event.top))
