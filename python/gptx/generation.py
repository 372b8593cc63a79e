"""What a request gave, and how its text is put together token by token."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gptx.tokenizer import StopMatcher, Tokenizer


class TokenLogprob(NamedTuple):
    """A generated token, its log-probability, and the most likely tokens in its place.

    ``top`` holds (id, log-probability), most likely first. All are of the model's own distribution,
    before penalties, bans and filters.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """What one request gave. ``str()`` of it is the prompt followed by the text.

    Attributes:
        prompt: the prompt as text.
        text: the continuation, without the prompt, without the stop string that ended it.
        token_ids: the generated ids, the end token excluded.
        finish_reason: "stop" (an end token or a stop string), "length" (``max_new_tokens`` or the
            context), "time" (``max_time``), "error", or of a stream "cancelled" or, so far,
            "unfinished".
        prompt_tokens, completion_tokens: how many ids the prompt and the continuation have.
        seed: the seed that gives this text again.
        error: why the request failed, where ``finish_reason`` is "error": a `GptxError`, or what a
            logits processor raised.
        logprobs: one for each of ``token_ids``, where ``logprobs`` was asked for.
        score: of a beam its score, of the best of several its mean log-probability.
        others: the further texts of ``n``, best first where they are ranked.
        cached_tokens: tokens of the prompt whose keys and values were in the cache already.
        drafted_tokens, accepted_tokens: tokens that were proposed, and how many of them were right.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    error: Exception | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    score: float | None = None
    others: tuple[Generation, ...] = ()
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def __str__(self) -> str:
        return self.prompt + self.text

    @property
    def choices(self) -> tuple[Generation, ...]:
        """This one and the ``others``."""
        return (self, *self.others)


class Continuation:
    """A text that grows: whole characters only, up to the first stop string.

    Attributes:
        token_ids: the ids so far.
        logprobs: theirs, one `TokenLogprob` each, where they are pushed.
        finish: why it ended, "" before.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.decoder() if tokenizer else None
        self._stop = StopMatcher(stop)
        self._text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish = ""

    def push(self, token: int, logprob: TokenLogprob | None = None) -> str:
        """Takes a token and returns the text that is certain now."""
        self.token_ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        piece = self._stop.push(self._decoder.push(token)) if self._decoder else ""
        if self._stop.stopped:
            self.finish = "stop"
        self._text.append(piece)
        return piece

    def fork(self) -> Continuation:
        """Another text that begins like this one."""
        twin = copy.copy(self)
        twin._decoder = self._decoder.fork() if self._decoder else None
        twin._stop = copy.copy(self._stop)  # only its text and flags change, and they are replaced
        twin._text = self._text.copy()
        twin.token_ids = self.token_ids.copy()
        twin.logprobs = self.logprobs.copy()
        return twin

    def end(self, finish: str) -> str:
        """Ends the text and returns the rest of it."""
        piece = self._decoder.finish() if self._decoder else ""
        piece = self._stop.push(piece) + self._stop.finish()
        self.finish = "stop" if self._stop.stopped else finish
        self._text.append(piece)
        return piece

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens; 0 where there are none."""
        return sum(t.logprob for t in self.logprobs) / max(1, len(self.logprobs))
