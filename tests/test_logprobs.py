"""Log-probabilities and ranks against float64."""

import numpy as np
import pytest

from gptx import _core
from sampling_twin import exact_logprobs, random_logits, ranked

ISAS = _core.usable_isas()
SIZES = [1, 2, 15, 16, 17, 1000, 50257]


def assert_top_is_exact(top, logits, n):
    exact = exact_logprobs(logits)
    ids = ranked(logits)[:n]
    assert [token for token, _ in top] == ids
    np.testing.assert_allclose([p for _, p in top], exact[ids], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("equal", [False, True], ids=["different", "ties"])
def test_scores_are_those_of_float64(isa, n, equal):
    logits = random_logits(n, seed=n, spread=5.0) - 50
    if equal:
        logits = np.round(logits)
    exact, ids = exact_logprobs(logits), ranked(logits)
    rng = np.random.default_rng(n)
    for token in {0, n - 1, *ids[:3], *rng.integers(0, n, 9).tolist()}:
        for top in (0, 1, 5, 100):
            logprob, rank, best = _core.testing.score(isa, logits, token, top)
            assert logprob == pytest.approx(exact[token], rel=1e-6, abs=1e-6)
            assert rank == ids.index(token)
            assert_top_is_exact(best, logits, min(top, n))
            assert (logprob, rank, best) == _core.testing.score("scalar", logits, token, top)


def test_the_top_may_be_the_whole_vocabulary():
    logits = np.round(random_logits(300, spread=5.0))
    for n in (299, 300, 301):
        _, _, top = _core.testing.score("", logits, 0, n)
        assert_top_is_exact(top, logits, min(n, 300))


def test_logits_far_apart_have_finite_logprobs():
    logprob, rank, top = _core.testing.score("", np.array([0, 1000, -3e38], np.float32), 0, 3)
    assert (logprob, rank) == (-1000, 1)
    assert [token for token, _ in top] == [1, 0, 2]
    assert top[0][1] == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 16, 64, 99])
def test_a_row_that_is_not_finite_has_no_logprobs(isa, bad, where):
    logits = random_logits(100)
    logits[where] = bad
    logprob, _, top = _core.testing.score(isa, logits, 3, 5)
    assert np.isnan(logprob)
    assert top == []
