"""transformers' logits processors in numpy: ``f(input_ids [B, T], scores [B, V]) -> scores``.

The engine applies most of these itself (`gptx.SamplingParams`). They run here where a script adds
its own between them, asks for the scores, or wants one that the engine does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ParameterError
from gptx.hf.arrays import Array, given, is_torch, loaded_torch, to_numpy

_NEVER = np.float32(-np.inf)

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]


class LogitsProcessor:
    """For classes that change scores. They get torch tensors where `generate` got them, else numpy
    arrays; rows of the batch that have ended hold zeros."""

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        raise NotImplementedError


class LogitsProcessorList(list[Callable[..., Array]]):
    """Processors that act one after the other."""

    def __call__(self, input_ids: Array, scores: Array, **kwargs: Any) -> Array:
        for processor in self:
            scores = processor(input_ids, scores, **kwargs)
        return scores


class NumpyProcessor(LogitsProcessor):
    """A processor of this module: numpy in, numpy out; it leaves its arguments as they are."""

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        raise NotImplementedError


class SequenceBiasLogitsProcessor(NumpyProcessor):
    """Adds numbers to the scores of tokens that complete sequences.

    Args:
        sequence_bias: ids -> bias, or a list of ``[ids, bias]``.
    """

    def __init__(self, sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any]) -> None:
        self.sequence_bias = biases(sequence_bias)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        added = np.zeros_like(scores)
        for sequence, bias in self.sequence_bias.items():
            n = len(sequence) - 1
            if sequence[-1] >= scores.shape[1]:
                allowed = f"ids below {scores.shape[1]}"
                raise ParameterError("sequence_bias", sequence[-1], allowed)
            if n <= input_ids.shape[1]:
                tail = input_ids[:, input_ids.shape[1] - n :]
                added[(tail == sequence[:n]).all(axis=1), sequence[-1]] += np.float32(bias)
        return scores + added


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Bans the last token of each of some sequences behind the others of it; end tokens stay."""

    def __init__(
        self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: Sequence[int] = ()
    ) -> None:
        words = [tuple(word) for word in bad_words_ids]
        super().__init__({w: -np.inf for w in words if w not in [(e,) for e in eos_token_id]})


class RepetitionPenaltyLogitsProcessor(NumpyProcessor):
    """Divides positive scores of tokens in the sequence by ``penalty`` and multiplies others.

    Args:
        padding: tokens in front of each row that do not count, ``[B]``.
    """

    def __init__(self, penalty: float, padding: NDArray[np.int64] | None = None) -> None:
        self.penalty = np.float32(penalty)
        self._padding = padding

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        out = scores.copy()
        for i, ids in enumerate(input_ids):
            seen = np.unique(ids if self._padding is None else ids[self._padding[i] :])
            seen = seen[seen < scores.shape[1]]
            s = scores[i, seen]
            out[i, seen] = np.where(s < 0, s * self.penalty, s / self.penalty)
        return out


class NoRepeatNGramLogitsProcessor(NumpyProcessor):
    """Bans tokens that would complete an n-gram of the sequence again."""

    def __init__(self, ngram_size: int) -> None:
        self.ngram_size = ngram_size

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        n, length = self.ngram_size, input_ids.shape[1]
        if length < n:
            return scores
        out = scores.copy()
        for i, ids in enumerate(input_ids):
            windows = np.lib.stride_tricks.sliding_window_view(ids, n)
            matches = (windows[:, : n - 1] == ids[length - n + 1 :]).all(axis=1)
            banned = windows[matches, -1]
            out[i, banned[banned < scores.shape[1]]] = _NEVER
        return out


class MinLengthLogitsProcessor(NumpyProcessor):
    """Bans the end tokens while the sequence is shorter than ``min_length``."""

    def __init__(self, min_length: int, eos_token_id: Sequence[int]) -> None:
        self.min_length = min_length
        self.eos_token_id = list(eos_token_id)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        if input_ids.shape[1] >= self.min_length:
            return scores
        return _banned(scores, self.eos_token_id)


class PrefixConstrainedLogitsProcessor(NumpyProcessor):
    """Bans all but what ``f(batch_id, ids [T])`` returns.

    Args:
        rows: rows of the batch for each prompt.
        device: that of the torch tensors to call it with, None for numpy.
        first: the prompt of the first row.
    """

    def __init__(
        self,
        function: Callable[[int, Array], Iterable[int]],
        rows: int,
        device: Any = None,
        first: int = 0,
    ) -> None:
        self._function = function
        self._rows = rows
        self._device = device
        self._first = first

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        out = np.full_like(scores, _NEVER)
        for i, ids in enumerate(input_ids):
            allowed = self._function(self._first + i // self._rows, given(ids, self._device))
            tokens = [int(token) for token in allowed]
            if not tokens:
                text = "a token at least"
                raise ParameterError("prefix_allowed_tokens_fn", tokens, text)
            left = scores[i, tokens]
            out[i, tokens] = left if np.isfinite(left).any() else 0
        return out


class ForcedBOSTokenLogitsProcessor(NumpyProcessor):
    """Leaves one token behind a sequence of one."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        return _only(scores, [self.bos_token_id]) if input_ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(NumpyProcessor):
    """Leaves some tokens for the last place before ``max_length``."""

    def __init__(self, max_length: int, eos_token_id: Sequence[int]) -> None:
        self.max_length = max_length
        self.eos_token_id = list(eos_token_id)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        last = input_ids.shape[1] == self.max_length - 1
        return _only(scores, self.eos_token_id) if last else scores


class ExponentialDecayLengthPenalty(NumpyProcessor):
    """Raises the scores of the end tokens exponentially, ``start`` tokens behind the prompt.

    Args:
        exponential_decay_length_penalty: (start, factor).
        input_ids_seq_length: tokens of the prompt.
    """

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: Sequence[int],
        input_ids_seq_length: int,
    ) -> None:
        start, self._factor = exponential_decay_length_penalty
        self._start = start + input_ids_seq_length
        self.eos_token_id = list(eos_token_id)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        past = input_ids.shape[1] - self._start
        if past <= 0:
            return scores
        out = scores.copy()
        for i in {i for i in self.eos_token_id if 0 <= i < scores.shape[1]}:
            finite = np.isfinite(scores[:, i])
            raised = np.abs(scores[:, i]) * np.float32(self._factor**past - 1)
            out[:, i] += np.where(finite, raised, np.float32(0))
        return out


class SuppressTokensLogitsProcessor(NumpyProcessor):
    """Bans tokens."""

    def __init__(self, suppress_tokens: Sequence[int]) -> None:
        self.suppress_tokens = list(suppress_tokens)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        return _banned(scores, self.suppress_tokens)


class SuppressTokensAtBeginLogitsProcessor(NumpyProcessor):
    """Bans tokens behind a sequence of ``begin_index``."""

    def __init__(self, begin_suppress_tokens: Sequence[int], begin_index: int) -> None:
        self.begin_suppress_tokens = list(begin_suppress_tokens)
        self.begin_index = begin_index

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        at_begin = input_ids.shape[1] == self.begin_index
        return _banned(scores, self.begin_suppress_tokens) if at_begin else scores


class TemperatureLogitsWarper(NumpyProcessor):
    """Divides the scores."""

    def __init__(self, temperature: float) -> None:
        self.temperature = np.float32(temperature)

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        return scores / self.temperature


class TopKLogitsWarper(NumpyProcessor):
    """Bans all but the k largest scores and those equal to the least of them."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        k = min(self.top_k, scores.shape[1])
        least = np.partition(scores, -k, axis=1)[:, -k]
        return np.where(scores < least[:, None], _NEVER, scores)


class TopPLogitsWarper(NumpyProcessor):
    """Bans the least likely tokens whose probabilities sum to at most ``1 - top_p``."""

    def __init__(self, top_p: float) -> None:
        self.top_p = top_p

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        order = np.argsort(scores, axis=1, kind="stable")
        sums = np.cumsum(np.take_along_axis(softmax(scores), order, axis=1), axis=1)
        removed = sums <= 1 - self.top_p
        removed[:, -1] = False
        return _without(scores, order, removed)


class MinPLogitsWarper(NumpyProcessor):
    """Bans tokens less likely than ``min_p`` times the most likely one."""

    def __init__(self, min_p: float) -> None:
        self.min_p = min_p

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        p = softmax(scores)
        return np.where(p < self.min_p * p.max(axis=1, keepdims=True), _NEVER, scores)


class TypicalLogitsWarper(NumpyProcessor):
    """Keeps the tokens whose surprise is nearest to the expected one, up to ``mass``."""

    def __init__(self, mass: float) -> None:
        self.mass = mass

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        p = softmax(scores)
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(p)
            expected = np.nansum(p * surprise, axis=1, keepdims=True)
            away = np.abs(surprise - expected)
        order = np.argsort(away, axis=1, kind="stable")
        sums = np.cumsum(np.take_along_axis(p, order, axis=1), axis=1)
        last = np.minimum((sums < self.mass).sum(axis=1), scores.shape[1] - 1)
        away = np.take_along_axis(away, order, axis=1)
        removed = away > np.take_along_axis(away, last[:, None], axis=1)
        removed[:, 0] = False
        return _without(scores, order, removed)


class EpsilonLogitsWarper(NumpyProcessor):
    """Bans tokens less likely than ``epsilon``, but for the most likely one."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        return _unlikely_banned(scores, softmax(scores), self.epsilon)


class EtaLogitsWarper(NumpyProcessor):
    """Bans tokens less likely than epsilon and than ``sqrt(epsilon) * exp(-entropy)``."""

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        p = softmax(scores)
        entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1, keepdims=True)
        eta = np.minimum(self.epsilon, np.sqrt(self.epsilon) * np.exp(-entropy))
        return _unlikely_banned(scores, p, eta)


class LogitNormalization(NumpyProcessor):
    """Makes scores log-probabilities."""

    def __call__(self, input_ids: Ids, scores: Scores) -> Scores:
        with np.errstate(divide="ignore"):
            return np.log(softmax(scores)).astype(np.float32)


def processed(
    processors: Sequence[Callable[..., Array]], ids: Ids, scores: Scores, device: Any
) -> Scores:
    """The scores ``[B, V]`` after all processors, in their order.

    Args:
        device: that of the torch tensors to call those of the script with, None for numpy.

    Raises:
        ParameterError: one of them returned something else than scores, or NaN.
    """
    shape = scores.shape
    for processor in processors:
        if isinstance(processor, NumpyProcessor):
            scores = processor(ids, scores)
            continue
        where = _device_for(processor, device)
        result = processor(given(ids, where), given(scores.copy(), where))
        name = f"logits_processor {type(processor).__name__}"
        if not is_torch(result) and not isinstance(result, np.ndarray):
            raise ParameterError(name, type(result).__name__, f"scores {list(shape)} as its result")
        scores = to_numpy(result).astype(np.float32)
        if scores.shape != shape or np.isnan(scores).any():
            got = "NaN" if scores.shape == shape else list(scores.shape)
            raise ParameterError(name, got, f"scores {list(shape)} without NaN as its result")
    return scores


def _device_for(processor: object, device: Any) -> Any:
    """Those of transformers itself take torch tensors alone."""
    foreign = type(processor).__module__.partition(".")[0] == "transformers"
    return "cpu" if device is None and foreign and loaded_torch() else device


def biases(value: Any) -> dict[tuple[int, ...], float]:
    """``sequence_bias`` as a mapping.

    Raises:
        ParameterError: it is none, or has another form.
    """
    try:
        pairs = list(value.items()) if isinstance(value, Mapping) else [(i, b) for i, b in value]
        found = {tuple(int(i) for i in ids): float(bias) for ids, bias in pairs}
    except (TypeError, ValueError):
        found = {}
    if not found or any(not ids or min(ids) < 0 for ids in found):
        raise ParameterError("sequence_bias", value, "a mapping of ids to numbers")
    return found


def softmax(scores: Scores) -> NDArray[np.float64]:
    """Of each row, in float64; rows of nothing but -inf are NaN."""
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)


def _banned(scores: Scores, tokens: Sequence[int]) -> Scores:
    out = scores.copy()
    out[:, [i for i in tokens if 0 <= i < scores.shape[1]]] = _NEVER
    return out


def _only(scores: Scores, tokens: Sequence[int]) -> Scores:
    out = np.full_like(scores, _NEVER)
    out[:, tokens] = 0
    return out


def _without(scores: Scores, order: NDArray[Any], removed: NDArray[np.bool_]) -> Scores:
    """Scores without those that are removed, which is said in another order of them."""
    mask = np.zeros_like(removed)
    np.put_along_axis(mask, order, removed, axis=1)
    return np.where(mask, _NEVER, scores)


def _unlikely_banned(scores: Scores, p: NDArray[np.float64], least: Any) -> Scores:
    banned = (p < least) & (scores < scores.max(axis=1, keepdims=True))
    return np.where(banned, _NEVER, scores)
