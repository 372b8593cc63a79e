"""How likely texts are: log-probabilities, perplexity, choices, embeddings.

All of it is requests of the engine, batched and prefix-cached like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx import requests
from gptx.errors import ContextLengthError, NonFiniteLogitsError, ParameterError
from gptx.sampling import MAX_LOGPROBS

if TYPE_CHECKING:
    from gptx.model import Model, Prompt

_GROUPS = 64  # prompts that are held at a time


@dataclass(frozen=True)
class TokenScores:
    """What the model says of each token of a text; its own distribution, natural logarithms.

    Attributes:
        token_ids: int32 ``[T]``.
        logprobs: float32 ``[T]``, log P(token | those before it); of the first token, which has
            nothing before it, NaN.
        ranks: int32 ``[T]``, how many tokens are more likely in its place; -1 of the first.
        top_ids, top_logprobs: ``[T, k]``, the most likely tokens in each place, most likely first;
            -1 and NaN in the first row.
    """

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    ranks: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    @property
    def surprisal(self) -> NDArray[np.float32]:
        """``-logprobs``, in nats."""
        return -self.logprobs

    @property
    def total(self) -> float:
        """The log-probability of all tokens but the first."""
        return float(np.sum(self.logprobs[1:], dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp of the mean surprisal; NaN of a single token."""
        n = len(self.logprobs) - 1
        return math.exp(-self.total / n) if n > 0 else math.nan


class Choice(NamedTuple):
    """The likeliest of several options. ``str()`` of it is that option.

    ``scores`` are the log-probabilities of all options, ``[n]``, as they were compared.
    """

    index: int
    text: str
    scores: NDArray[np.float64]

    def __str__(self) -> str:
        return self.text


def logprobs(model: Model, prompts: Sequence[Prompt], *, top: int, bos: bool) -> list[TokenScores]:
    if type(top) is not int or not 0 <= top <= min(MAX_LOGPROBS, model.config.vocab_size):
        limit = min(MAX_LOGPROBS, model.config.vocab_size)
        raise ParameterError("top", top, f"an integer from 0 to {limit}")
    texts = [_with_bos(model, prompt, bos) for prompt in prompts]
    lone = [i for i, ids in enumerate(texts) if len(ids) == 1]
    found = _scored(model, [(ids, 1, 0) for ids in texts if len(ids) > 1], top=top)
    for i in lone:
        found.insert(i, Scored.empty(top))
    return [_aligned(ids, scored) for ids, scored in zip(texts, found, strict=True)]


def score(
    model: Model, texts: Sequence[Prompt], *, prompt: Prompt | None, bos: bool
) -> list[float]:
    if prompt is None:
        return [scores.total for scores in logprobs(model, texts, top=0, bos=bos)]
    return [float(s.sum()) for s in given(model, [(prompt, texts)], bos=bos)[0]]


def choose(
    model: Model, prompt: Prompt, options: Sequence[Prompt], *, normalize: str, bos: bool
) -> Choice:
    if len(options) == 0 or isinstance(options, str):
        raise ParameterError("options", options, "a sequence of at least one text")
    if normalize not in ("sum", "mean", "bytes"):
        raise ParameterError("normalize", normalize, "one of 'sum', 'mean', 'bytes'")
    return chosen(model, options, given(model, [(prompt, options)], bos=bos)[0], normalize)


def chosen(
    model: Model,
    options: Sequence[Prompt],
    logprobs: Sequence[NDArray[np.float32]],
    normalize: str,
) -> Choice:
    """The best of several options, given the log-probabilities of the tokens of each."""
    scores = np.array([float(s.sum()) for s in logprobs])
    if normalize == "mean":
        scores /= [len(model._ids(option)) for option in options]
    if normalize == "bytes":
        scores /= [len(_text(model, option).encode()) for option in options]
    best = int(np.argmax(scores))
    return Choice(best, _text(model, options[best]), scores)


def perplexity(model: Model, text: Prompt, *, stride: int | None, bos: bool) -> float:
    ids = _ids_of_any_length(model, text, bos)
    size = model.config.block_size
    stride = max(1, size // 2) if stride is None else stride
    if type(stride) is not int or not 1 <= stride <= size:
        raise ParameterError("stride", stride, f"an integer from 1 to block_size = {size}")
    if len(ids) < 2:
        raise ParameterError("text", text, "at least two tokens, or bos=True")
    windows = []
    done = 0  # tokens that were scored, or could not be
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        # The first token of a window has nothing before it.
        if end - begin > 1:
            windows.append((ids[begin:end], max(1, done - begin), 0))
        done = end
        if end == len(ids):
            break
    parts = [scored.logprobs for scored in _scored(model, windows)]
    return math.exp(-float(np.mean(np.concatenate(parts), dtype=np.float64)))


def embed(
    model: Model, texts: Sequence[Prompt], *, pooling: str, normalize: bool
) -> NDArray[np.float32]:
    if pooling not in ("mean", "last"):
        raise ParameterError("pooling", pooling, "one of 'mean', 'last'")
    inputs = [_fitting(model, text, model.config.block_size) for text in texts]
    out = np.empty((len(inputs), model.config.n_embd), np.float32)

    def submit(ids: NDArray[np.int32]) -> int:
        wanted = len(ids) if pooling == "mean" else 1
        return model._engine.submit(
            ids, sampling={}, max_new_tokens=1, held=True, hidden=True, wanted=wanted, logits=0
        )

    def collect(i: int, request: int) -> None:
        out[i] = model._engine.held_hidden(request).mean(axis=0, dtype=np.float64)

    _run(model, [lambda ids=ids: submit(ids) for ids in inputs], collect)
    if normalize:
        out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)
    return out


class Scored(NamedTuple):
    """Scores of the tokens behind a given place, as in `TokenScores`."""

    logprobs: NDArray[np.float32]  # [n], and so on
    ranks: NDArray[np.int32]
    top_ids: NDArray[np.int32]
    top_logprobs: NDArray[np.float32]

    @classmethod
    def empty(cls, top: int) -> Scored:
        rows = np.zeros((0, top))
        return cls(
            np.zeros(0, np.float32),
            np.zeros(0, np.int32),
            rows.astype(np.int32),
            rows.astype(np.float32),
        )


def given(
    model: Model, groups: Sequence[tuple[Prompt, Sequence[Prompt]]], *, bos: bool
) -> list[list[NDArray[np.float32]]]:
    """Of each (prompt, options) the log-probabilities of the tokens of each option behind it.

    A token may reach from the prompt into an option. All options are compared from the last place
    where none has done so yet.
    """
    shares = []
    for prompt, options in groups:
        for i, option in enumerate(options):
            if len(option) == 0:
                name = f"text[{i}] behind the prompt"
                raise ParameterError(name, option, "a text or ids of at least one token")
        wholes = [_behind(model, prompt, option, bos) for option in options]
        ids = _with_bos(model, prompt, bos)
        shared = min([len(ids), *(_common(ids, whole) for whole in wholes)])
        if shared == 0:
            raise ParameterError(
                "prompt", prompt, "one that shares a token with its options, or bos=True"
            )
        shares.append((wholes, min([shared, *(len(whole) - 1 for whole in wholes)])))
    return [[scored.logprobs for scored in found] for found in behind(model, shares)]


def behind(
    model: Model, groups: Sequence[tuple[Sequence[NDArray[np.int32]], int]]
) -> list[list[Scored]]:
    """Of each (texts, shared) the scores of ``ids[shared:]`` of each text.

    Args:
        groups: texts of 2 to ``block_size + 1`` ids whose first ``shared`` ids, at least one, are
            the same. Those are computed once.
    """
    found: list[list[Scored]] = []
    for begin in range(0, len(groups), _GROUPS):
        found += _behind_held(model, groups[begin : begin + _GROUPS])
    return found


def _behind_held(
    model: Model, groups: Sequence[tuple[Sequence[NDArray[np.int32]], int]]
) -> list[list[Scored]]:
    engine = model._engine
    parents: list[int] = []
    try:
        for texts, shared in groups:
            start = texts[0][:shared]
            several = len(texts) > 1
            parents.append(
                engine.submit(start, sampling={}, max_new_tokens=1, held=True) if several else 0
            )
        waiting = {parent for parent in parents if parent}
        while waiting:
            waiting -= {event[0] for event in engine.advance(list(waiting))}
        requests = [
            (ids, shared, parent)
            for (texts, shared), parent in zip(groups, parents, strict=True)
            for ids in texts
        ]
        found = iter(_scored(model, requests))
    finally:
        for parent in parents:
            if parent:
                engine.release(parent)
    return [[next(found) for _ in texts] for texts, _ in groups]


def _behind(model: Model, prompt: Prompt, option: Prompt, bos: bool) -> NDArray[np.int32]:
    """The ids of the prompt and an option behind it: of the joined text, where both are texts."""
    if isinstance(prompt, str) and isinstance(option, str):
        return _with_bos(model, prompt + option, bos)
    ids = np.concatenate([_with_bos(model, prompt, bos), model._ids(option)])
    return _checked_length(ids, model.config.block_size + 1)


def _scored(
    model: Model, requests: Sequence[tuple[NDArray[np.int32], int, int]], *, top: int = 0
) -> list[Scored]:
    """Of each (ids, first, parent) the scores of ids[first:]; the parent is held, or 0."""
    found: dict[int, Scored] = {}

    def collect(i: int, request: int) -> None:
        found[i] = Scored(*model._engine.scores(request))

    submits = [
        lambda ids=ids, first=first, parent=parent: model._engine.submit_score(
            ids, first=first, top=top, parent=parent
        )
        for ids, first, parent in requests
    ]
    _run(model, submits, collect)
    for i, (_, first, _) in enumerate(requests):
        scored = found[i]
        if not np.isfinite(scored.logprobs).all():
            position = first + int(np.argmin(np.isfinite(scored.logprobs)))
            raise NonFiniteLogitsError(
                f"logits at position {position}: expected finite numbers, got NaN or infinity; "
                "the weights are damaged or overflow"
            )
    return [found[i] for i in range(len(requests))]


def _run(
    model: Model, submits: Sequence[Callable[[], int]], collect: Callable[[int, int], None]
) -> None:
    """Submits requests, calls ``collect(index, request)`` as each is done, releases them all."""
    engine = model._engine
    running: dict[int, int] = {}
    try:
        for i, submit in enumerate(submits):
            running[submit()] = i
        while running:
            for request in {event[0] for event in engine.advance(list(running))}:
                collect(running[request], request)
                engine.release(request)
                del running[request]
    finally:
        for request in running:
            engine.release(request)


def _aligned(ids: NDArray[np.int32], scored: Scored) -> TokenScores:
    """Scores of ids[1:], one row in front of them for the first token."""

    def below(row: float, values: NDArray) -> NDArray:
        return np.concatenate([np.full((1, *values.shape[1:]), row, values.dtype), values])

    return TokenScores(
        token_ids=ids,
        logprobs=below(math.nan, scored.logprobs),
        ranks=below(-1, scored.ranks),
        top_ids=below(-1, scored.top_ids),
        top_logprobs=below(math.nan, scored.top_logprobs),
    )


def _with_bos(model: Model, prompt: Prompt, bos: bool) -> NDArray[np.int32]:
    return _checked_length(_ids_of_any_length(model, prompt, bos), model.config.block_size + 1)


def _ids_of_any_length(model: Model, prompt: Prompt, bos: bool) -> NDArray[np.int32]:
    if not bos:
        return model._ids(prompt)
    end = requests.eos_token_ids(model)
    if not end:
        raise ParameterError("bos", bos, "False for a model without an end-of-text token")
    ids = [] if isinstance(prompt, str) and not prompt else model._ids(prompt)
    return np.concatenate([np.array(end[:1], np.int32), np.asarray(ids, np.int32)])


def _fitting(model: Model, prompt: Prompt, limit: int) -> NDArray[np.int32]:
    return _checked_length(model._ids(prompt), limit)


def _checked_length(ids: NDArray[np.int32], limit: int) -> NDArray[np.int32]:
    if len(ids) > limit:
        raise ContextLengthError(len(ids), limit, "shorten the text; perplexity takes any length")
    return ids


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    different = np.nonzero(a[:n] != b[:n])[0]
    return int(different[0]) if len(different) else n


def _text(model: Model, prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else model._decode(prompt)
