"""The definition of sampling and log-probabilities in numpy and float64: slow, obviously right."""

from __future__ import annotations

import numpy as np

from gptx import _core


def random_logits(n, seed=0, spread=2.0):
    return (np.random.default_rng(seed).standard_normal(n) * spread).astype(np.float32)


def exact_logprobs(logits):
    """log softmax."""
    logits = np.asarray(logits, np.float32).astype(float)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def ranked(logits):
    """Ids, most likely first, ties to the lowest."""
    return np.argsort(-np.asarray(logits, np.float32), kind="stable").tolist()


def words_of(allowed):
    """The bit mask of a list of booleans, as SampleTask wants it."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view("<u4").tolist()


def repetitions(window, breakers):
    """Token -> the longest end of the window that stands earlier in it, followed by the token."""
    longest = {}
    for end in range(1, len(window)):
        for length in range(1, end + 1):
            tail = window[-length:]
            repeated = window[end - length : end] == tail and not set(tail) & set(breakers)
            if repeated and window[end] not in breakers:
                longest[window[end]] = max(longest.get(window[end], 0), length)
    return longest


def changed_logits(
    logits,
    sequence=(),
    prompt=0,
    banned=(),
    allowed=(),
    logit_bias=(),
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    dry_multiplier=0.0,
    dry_base=1.75,
    dry_allowed_length=2,
    dry_range=0,
    dry_breakers=(),
    no_repeat_ngram_size=0,
    bad_words=(),
):
    """What is left to the filters, float32 after each change."""
    logits = np.array(logits, np.float32)
    sequence = list(sequence)
    vocabulary = range(len(logits))
    for token, bias in logit_bias:
        logits[token] = float(logits[token]) + bias
    for token in set(sequence):
        logit = float(logits[token])
        logits[token] = logit / repetition_penalty if logit > 0 else logit * repetition_penalty
    for token in set(sequence[prompt:]):
        count = sequence[prompt:].count(token)
        penalty = presence_penalty + frequency_penalty * count
        logits[token] = float(logits[token]) - penalty
    if dry_multiplier:
        for token, length in repetitions(sequence[-dry_range:], dry_breakers).items():
            if length >= dry_allowed_length:
                penalty = dry_multiplier * dry_base ** (length - dry_allowed_length)
                logits[token] = float(logits[token]) - penalty
    if no_repeat_ngram_size:
        n = no_repeat_ngram_size
        seen = {tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)}
        begin = tuple(sequence[len(sequence) - n + 1 :]) if n > 1 else ()
        logits[[t for t in vocabulary if (*begin, t) in seen]] = -np.inf
    for word in bad_words:
        logits[[t for t in vocabulary if [*sequence, t][-len(word) :] == list(word)]] = -np.inf
    logits[list(banned)] = -np.inf
    if len(allowed):
        bits = np.unpackbits(np.array(allowed, "<u4").view(np.uint8), bitorder="little")
        logits[bits[: len(logits)] == 0] = -np.inf
    return logits


def exact_probabilities(
    logits,
    temperature=1.0,
    top_n_sigma=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    typical_p=1.0,
    **changes,
):
    """Of every token, by sorting."""
    logits = changed_logits(logits, **changes).astype(float)
    if top_n_sigma:
        deviation = logits[logits > -np.inf].std()
        logits[logits < logits.max() - top_n_sigma * deviation] = -np.inf
    if top_k:
        logits[logits < np.sort(logits)[-min(top_k, len(logits))]] = -np.inf
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        p[order[int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1 :]] = 0
    p[p < min_p * p.max()] = 0
    if typical_p < 1:
        p /= p.sum()
        surprise = np.full(len(p), np.inf)
        surprise[p > 0] = -np.log(p[p > 0])
        distance = np.abs(surprise - (p[p > 0] * surprise[p > 0]).sum())
        order = np.argsort(distance, kind="stable")
        last = order[int(np.searchsorted(np.cumsum(p[order]), typical_p))]
        p[distance > distance[last]] = 0
    return p / p.sum()


def uniform(seed, position):
    """In [0, 1): the random number of a request at a position."""
    low = 2**32 - 1
    word = _core.testing.philox([position & low, position >> 32, 0, 0], [seed & low, seed >> 32])
    return ((word[0] << 32 | word[1]) >> 11) * 2.0**-53


def draws(p, seed, positions):
    """The tokens at the positions: the first whose cumulative probability exceeds the number."""
    sums = np.cumsum(p)
    numbers = np.array([uniform(seed, i) for i in positions])
    return np.searchsorted(sums, numbers * sums[-1], side="right").tolist()
