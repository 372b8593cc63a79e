"""A smaller model drafts, the larger one checks: speculative decoding that changes no token.

The draft model chooses with the seed and the parameters of the request. What the larger model
chooses itself at the same place is kept (csrc/engine/drafts.h), so drafts decide nothing but speed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gptx import requests
from gptx.errors import ParameterError

if TYPE_CHECKING:
    from gptx.jobs import Task


class ModelDrafter:
    """Guesses how a text goes on, by ``params.draft`` of its task.

    Raises:
        ParameterError: that is no model, or none that can draft for the model of the task.
    """

    def __init__(self, task: Task) -> None:
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
        self._task = task
        self._model = draft
        self._request = 0  # held
        self._text: list[int] = []  # the tokens of that

    def draft(self, text: list[int], n: int) -> list[int]:
        """At most n tokens that the draft model puts behind a text; none where it has no room."""
        n = min(n, self._model.config.block_size - len(text) - 1)
        if n < 1:
            return []
        engine = self._model._engine
        if not self._request:
            self._request = self._submit(text)
        else:
            # At least the last token is read again, for its logits.
            same = _common(self._text, text[:-1])
            engine.truncate(self._request, same)
            engine.feed(self._request, np.array(text[same:], np.int32))
        found: list[int] = []
        while len(found) < n:
            engine.advance([self._request])
            _, token, *_ = engine.choose(self._request)
            if token < 0:
                break
            found.append(token)
        self._text = text + found
        return found

    def close(self) -> None:
        """Gives everything back; may be called again."""
        if self._request:
            self._model._engine.release(self._request)
            self._request = 0

    def _submit(self, text: list[int]) -> int:
        fields = requests.fields(self._model, self._task.params, self._task.seed)
        room = self._model.config.block_size
        changes = {"held": True, "end_tokens": [], "max_new_tokens": room, "lookup": 0}
        return self._model._engine.submit(np.array(text, np.int32), **(fields | changes))


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with together."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
