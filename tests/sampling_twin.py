"""The definition of log-probabilities in numpy and float64: slow, obviously right."""

from __future__ import annotations

import numpy as np


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
