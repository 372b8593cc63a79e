"""The sampler against exact probabilities: each filter, their combinations, ties and bad logits."""

import numpy as np
import pytest

from gptx import _core

TASK = ("sequence", "banned", "first_position", "count")


def sample(logits, **changes):
    task = {name: changes.pop(name) for name in TASK if name in changes}
    choices = _core.testing.sample(np.asarray(logits, np.float32), {"seed": 3} | changes, **task)
    return [token for token, _, _ in choices]


def exact_probabilities(
    logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, sequence=()
):
    """The definition, by sorting and in float64."""
    logits = np.asarray(logits, np.float32).astype(float)
    for token in set(sequence):
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    if top_k:
        logits[logits < np.sort(logits)[-min(top_k, len(logits))]] = -np.inf
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p - 1e-12)) + 1]
    mask = np.zeros(len(p), bool)
    mask[kept] = True
    p = np.where(mask, p, 0)
    p[p < min_p * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(temperature=0.5),
        dict(temperature=3.0),
        dict(top_k=5),
        dict(top_k=1000),
        dict(top_p=0.7),
        dict(top_p=0.05),
        dict(min_p=0.2),
        dict(repetition_penalty=1.8, sequence=[0, 1, 1, 5]),
        dict(temperature=0.8, top_k=12, top_p=0.9),
        dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.1, repetition_penalty=1.3, sequence=[3]),
    ],
    ids=str,
)
def test_samples_follow_the_exact_probabilities(changes):
    logits = np.random.default_rng(0).standard_normal(40) * 2
    p = exact_probabilities(logits, **changes)
    n = 40_000
    counts = np.bincount(sample(logits, count=n, **changes), minlength=40)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * n
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    degrees = (p > 0).sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * max(degrees, 1)) + 5


def test_the_seed_and_the_position_decide():
    logits = np.random.default_rng(1).standard_normal(500)
    first = sample(logits, count=50)
    assert first == sample(logits, count=50)
    assert first[10:] == sample(logits, count=40, first_position=10)
    assert first != sample(logits, count=50, seed=4)


def test_temperature_zero_takes_the_largest_logit_and_ties_go_to_the_lowest_id():
    assert sample([1, 3, 2], temperature=0.0) == [1]
    assert sample([1, 3, 3, 3], temperature=0.0) == [1]
    assert sample([5, 3, 3], temperature=0.0, banned=[0]) == [1]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    assert sample([0, 1, 0.999], temperature=1e-300, count=20) == [1] * 20


def test_banned_tokens_are_never_chosen():
    assert set(sample([9, 1, 1], banned=[0], count=200)) == {1, 2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_everything_leaves_the_first_token(temperature):
    assert sample([1, 3, 2], banned=[0, 1, 2], temperature=temperature, top_p=0.5) == [0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_reported(bad):
    assert sample([0, bad, 1]) == [-1]


def test_top_k_keeps_ties_of_the_last_place():
    assert set(sample([2, 1, 1, 0], top_k=2, count=500)) == {0, 1, 2}


def test_the_largest_vocabulary_is_sampled_whole():
    logits = np.zeros(50257)
    tokens = np.array(sample(logits, count=300))
    assert tokens.min() < 2000
    assert tokens.max() > 48000
