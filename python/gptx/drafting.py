"""A smaller model drafts, the larger one checks: speculative decoding that changes no token.

The draft model chooses with the seed and the parameters of the request. What the larger model
chooses itself at the same place is kept (csrc/engine/drafts.h), so drafts decide nothing but speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gptx.errors import ParameterError
from gptx.jobs import SampleJob, Task
from gptx.sampling import MAX_DRAFT

_FIRST_LENGTH = 4
_LONGEST_PAUSE = 16


class DraftedJob(SampleJob):
    """A `SampleJob` with proposals of ``params.draft``, whose length follows their success."""

    def __init__(self, task: Task, **changes: Any) -> None:
        draft = task.params.draft
        if draft is None or not hasattr(draft, "_engine"):
            raise ParameterError("draft", draft, "a Model")
        if draft.config.vocab_size != task.model.config.vocab_size:
            allowed = f"a model with vocab_size = {task.model.config.vocab_size}"
            raise ParameterError("draft", draft.config.vocab_size, allowed)
        if draft._source.tokenizer != task.model._source.tokenizer:
            raise ParameterError("draft", draft, "a model with the same tokenizer")
        if task.params.context == "slide":
            raise ParameterError("draft", draft, 'None with context="slide"')
        self._draft = draft
        self._room = draft.config.block_size  # tokens that the draft model can read
        self._drafter = 0  # its held request
        self._drafted: list[int] = []  # the tokens of that
        self._length = _FIRST_LENGTH
        self._pause = 0  # rounds without a draft
        self._next_pause = 1
        self._proposed = 0
        self._seen = 0  # generated tokens at the last round
        super().__init__(task, **changes)

    def prepare(self) -> None:
        text = self.text.token_ids
        if self.finished or len(text) == self._seen:
            return  # the last proposal is still to be checked
        self._learn(len(text) - self._seen - 1)
        self._seen = len(text)
        self._proposed = 0
        most = min(
            self._length,
            MAX_DRAFT,
            self.task.params.max_new_tokens - len(text) - 1,
            self._room - len(self.task.ids) - len(text) - 1,
        )
        if self._pause > 0 or most < 1:
            self._pause = max(0, self._pause - 1)
            return
        proposal = self._propose([*self.task.ids.tolist(), *text], most)
        self._proposed = len(proposal)
        position = len(self.task.ids) + len(text)
        self.task.engine.propose(self.request, position, np.array(proposal, np.int32))

    def close(self) -> None:
        super().close()
        if self._drafter:
            self._draft._engine.release(self._drafter)
            self._drafter = 0

    def _learn(self, accepted: int) -> None:
        if self._proposed == 0:
            return
        if accepted >= self._proposed:
            self._length = min(MAX_DRAFT, 2 * self._proposed)
            self._next_pause = 1
        elif accepted > 0:
            self._length = accepted + 1
            self._next_pause = 1
        else:
            self._length = 1
            self._pause = self._next_pause
            self._next_pause = min(_LONGEST_PAUSE, 2 * self._next_pause)

    def _propose(self, text: list[int], n: int) -> list[int]:
        """The n tokens that the draft model puts behind the text."""
        engine = self._draft._engine
        if not self._drafter:
            fields = self._draft._request_fields(self.task.params, self.task.seed)
            held = {"held": True, "end_tokens": [], "max_new_tokens": self._room}
            self._drafter = engine.submit(np.array(text, np.int32), **(fields | held))
        else:
            # At least the last token is read again, for its logits.
            same = _common(self._drafted, text[:-1])
            engine.truncate(self._drafter, same)
            engine.feed(self._drafter, np.array(text[same:], np.int32))
        proposal = []
        for _ in range(n):
            engine.advance([self._drafter])
            _, token, *_ = engine.choose(self._drafter, engine.held_logits(self._drafter)[-1])
            if token < 0:
                break
            proposal.append(token)
        self._drafted = text + proposal
        return proposal


def _common(a: list[int], b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
