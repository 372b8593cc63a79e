"""The sampler against exact probabilities and against transformers."""

import numpy as np
import pytest

from gptx import _core
from sampling_twin import (
    changed_logits,
    draws,
    exact_logprobs,
    exact_probabilities,
    random_logits,
    ranked,
    words_of,
)

TASK = ("sequence", "prompt", "banned", "allowed", "forced", "first_position", "count")
EVEN = words_of([i % 2 == 0 for i in range(40)])
# Ends with a repetition of 3 (4 7 9), which 5 and 8 followed, and one of 1, which 4 followed.
LOOP = [4, 7, 9, 5, 1, 4, 7, 9, 8, 9, 4, 2, 4, 7, 9]


def choices(logits, **changes):
    """(token, logprob, [(token, logprob)]) for each of `count` positions."""
    task = {name: changes.pop(name) for name in TASK if name in changes}
    return _core.testing.sample(np.asarray(logits, np.float32), {"seed": 3} | changes, **task)


def sample(logits, **changes):
    return [token for token, _, _ in choices(logits, **changes)]


CHANGES = [
    dict(logit_bias=[(0, 1.5), (7, -np.inf), (9, -2.0)]),
    dict(repetition_penalty=1.8, sequence=[0, 1, 1, 5]),
    dict(presence_penalty=1.5, sequence=LOOP, prompt=6),
    dict(frequency_penalty=0.7, sequence=LOOP, prompt=6),
    dict(presence_penalty=-0.5, frequency_penalty=0.3, sequence=LOOP),
    dict(presence_penalty=2.0, frequency_penalty=2.0, sequence=LOOP, prompt=len(LOOP)),
    dict(dry_multiplier=0.8, sequence=LOOP),
    dict(dry_multiplier=0.8, dry_base=1.2, dry_allowed_length=1, sequence=LOOP),
    dict(dry_multiplier=0.8, dry_allowed_length=4, sequence=LOOP),
    dict(dry_multiplier=0.8, dry_range=8, sequence=LOOP),
    dict(dry_multiplier=0.8, dry_allowed_length=1, dry_breakers=[7, 30], sequence=LOOP),
    dict(dry_multiplier=0.8, dry_allowed_length=1, dry_breakers=[8], sequence=LOOP),
    dict(dry_multiplier=0.8, dry_allowed_length=1, dry_breakers=[9], sequence=LOOP),
    dict(dry_multiplier=0.1, dry_base=1.1, sequence=[6] * 12),
    dict(no_repeat_ngram_size=1, sequence=LOOP),
    dict(no_repeat_ngram_size=2, sequence=LOOP),
    dict(no_repeat_ngram_size=4, sequence=LOOP),
    dict(no_repeat_ngram_size=5, sequence=[1, 2, 3, 4]),
    dict(bad_words=[[3], [9, 12], [7, 9, 13], [9, 9, 14], [1] * 40], sequence=LOOP),
    dict(banned=[1, 2, 3]),
    dict(allowed=EVEN),
]
FILTERS = [
    {},
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_n_sigma=1.0),
    dict(top_n_sigma=0.3, temperature=2.0),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.7),
    dict(top_p=0.05),
    dict(min_p=0.2),
    dict(min_p=1.0),
    dict(typical_p=0.8),
    dict(typical_p=0.2),
    dict(typical_p=0.2, temperature=0.4),
    dict(temperature=0.8, top_k=12, top_p=0.9),
    dict(top_n_sigma=2.0, top_p=0.8),
    dict(top_n_sigma=1.5, top_k=20, min_p=0.02),
    dict(top_p=0.9, min_p=0.1),
    dict(min_p=0.02, typical_p=0.7),
    dict(top_k=25, typical_p=0.7),
    dict(top_p=0.9, typical_p=0.7),
    dict(temperature=1.3, top_n_sigma=2.0, top_k=20, top_p=0.95, min_p=0.02, typical_p=0.9),
]
COMBINATIONS = [
    dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.1, repetition_penalty=1.3, sequence=[3]),
    dict(top_k=3, logit_bias=[(20, 9.0)], banned=[20], allowed=EVEN),
    dict(typical_p=0.6, allowed=EVEN, banned=[0, 2]),
    dict(top_n_sigma=1.0, allowed=EVEN),
    dict(top_p=0.8, allowed=words_of([True] * 3 + [False] * 37)),
    dict(top_k=10, allowed=words_of([True] * 3 + [False] * 37)),
    dict(
        temperature=1.2,
        top_p=0.97,
        logit_bias=[(4, 2.0), (5, 1.0)],
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        dry_multiplier=0.5,
        no_repeat_ngram_size=5,
        bad_words=[[9, 0]],
        sequence=LOOP,
        prompt=4,
    ),
]


@pytest.mark.parametrize("changes", CHANGES + FILTERS + COMBINATIONS, ids=str)
def test_samples_follow_the_exact_probabilities(changes):
    logits = random_logits(40)
    p = exact_probabilities(logits, **changes)
    n = 40_000
    counts = np.bincount(sample(logits, count=n, **changes), minlength=40)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * n
    chi_square = ((counts[p > 0] - expected) ** 2 / expected).sum()
    degrees = (p > 0).sum() - 1
    assert chi_square < degrees + 5 * np.sqrt(2 * max(degrees, 1)) + 5


@pytest.mark.parametrize("changes", CHANGES + FILTERS + COMBINATIONS, ids=str)
def test_every_draw_is_that_of_the_definition(changes):
    logits = random_logits(40, seed=1)
    expected = draws(exact_probabilities(logits, **changes), 3, range(500))
    assert sample(logits, count=500, **changes) == expected


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_every_draw_from_the_largest_vocabulary_is_that_of_the_definition(filters, spread):
    logits = random_logits(50257, seed=2, spread=spread) - 60
    expected = draws(exact_probabilities(logits, **filters), 2**40 + 5, range(2**33, 2**33 + 60))
    assert sample(logits, count=60, seed=2**40 + 5, first_position=2**33, **filters) == expected


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129])
def test_every_draw_is_that_of_the_definition_at_the_ends_of_blocks(filters, n):
    logits = np.round(random_logits(n, seed=n) * 2) / 2  # many are equal
    if filters.get("typical_p", 1) < 1:
        logits = random_logits(n, seed=n)  # rounding decides which distances are
    expected = draws(exact_probabilities(logits, **filters), 3, range(100))
    assert sample(logits, count=100, **filters) == expected


@pytest.mark.parametrize("seed", range(20))
def test_the_greedy_choice_is_the_largest_changed_logit(seed):
    rng = np.random.default_rng(seed)
    logits = random_logits(12, seed=seed)
    changes = dict(
        sequence=rng.integers(0, 12, 60).tolist(),
        prompt=int(rng.integers(0, 60)),
        banned=rng.integers(0, 12, 2).tolist(),
        allowed=words_of(rng.random(12) < 0.8),
        logit_bias=[(t, float(rng.standard_normal())) for t in (3, 5, 3)],
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        dry_multiplier=0.4,
        dry_allowed_length=1,
        dry_range=int(rng.integers(0, 60)),
        dry_breakers=rng.integers(0, 12, 2).tolist(),
        no_repeat_ngram_size=int(rng.integers(2, 4)),
        bad_words=[rng.integers(0, 12, 2).tolist() for _ in range(5)],
    )
    expected = int(np.argmax(changed_logits(logits, **changes)))
    assert sample(logits, temperature=0.0, **changes) == [expected]


def test_nothing_of_a_choice_is_left_to_the_next():
    logits = random_logits(40)
    everything = {name: value for changes in CHANGES for name, value in changes.items()}
    everything |= dict(sequence=LOOP, prompt=3, allowed=EVEN, logit_bias=[(0, 1.0)], bad_words=[])
    everything |= dict(no_repeat_ngram_size=3)
    first = sample(logits, count=30, **everything)
    assert first == [sample(logits, first_position=i, **everything)[0] for i in range(30)]


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


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(filters):
    filters = filters | dict(temperature=1e-300)
    assert sample([0, 1, 0.999], count=20, **filters) == [1] * 20
    assert sample([-3e38, 3e38, 0], count=20, **filters) == [1] * 20


def test_banned_tokens_are_never_chosen():
    assert set(sample([9, 1, 1], banned=[0], count=200)) == {1, 2}


@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 1000])
def test_only_allowed_tokens_are_chosen(n):
    allowed = np.random.default_rng(n).random(n) < 0.3
    allowed[-1] = True
    tokens = set(sample(np.zeros(n), allowed=words_of(allowed), count=20 * n))
    assert tokens == set(np.flatnonzero(allowed).tolist())
    assert sample(np.zeros(n), allowed=words_of([True] * n), count=9) == sample(
        np.zeros(n), count=9
    )


@pytest.mark.parametrize("filters", [dict(temperature=0.0), *FILTERS], ids=str)
def test_a_ban_of_everything_leaves_the_first_token(filters):
    assert sample([1, 3, 2], banned=[0, 1, 2], **filters) == [0]
    assert sample([1, 3, 2], allowed=[0], **filters) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_forced_token_is_chosen_whatever_the_logits_say(temperature):
    ban = dict(banned=[2], bad_words=[[2]], logit_bias=[(2, -np.inf)], allowed=[0b11])
    assert sample([1, 3, 2], forced=2, temperature=temperature, **ban) == [2]
    assert sample([1, 3, np.nan], forced=2, temperature=temperature) == [-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 1, 63, 64, 98, 99])
def test_logits_that_are_not_finite_are_reported(bad, where):
    logits = random_logits(100)
    logits[where] = bad
    (choice,) = choices(logits, logprobs=3)
    assert choice[0] == -1
    assert np.isnan(choice[1])
    assert choice[2] == []


@pytest.mark.parametrize("filters", [dict(temperature=0.0), *FILTERS], ids=str)
def test_changes_that_overflow_leave_logits_that_can_be_compared(filters):
    biases = [(0, 3e38), (1, -3e38), (2, 3e38)]
    (token,) = sample([3e38, -3e38, 1e38, 5], logit_bias=biases, **filters)
    assert token in (0, 2)
    assert sample([1, 2, -3], repetition_penalty=1e-300, sequence=[0], **filters) == [0]
    loop = dict(dry_multiplier=1e300, dry_base=1e300, sequence=[1] * 9)
    assert sample([-60, 90, -60.5], count=1, dry_allowed_length=1, **loop, **filters)[0] != 1


def test_top_k_keeps_ties_of_the_last_place():
    assert set(sample([2, 1, 1, 0], top_k=2, count=500)) == {0, 1, 2}


def test_top_p_keeps_of_the_ties_of_the_last_place_those_with_the_lowest_ids():
    assert set(sample(np.zeros(40), top_p=0.24, count=2000)) == set(range(10))


def test_typical_p_keeps_ties_of_the_last_place():
    assert set(sample(np.zeros(40), typical_p=0.2, count=2000)) == set(range(40))


def test_a_repetition_is_as_long_as_what_stands_behind_the_last_breaker():
    def penalty(token, **changes):
        logits = np.zeros(40)
        dry = dict(dry_multiplier=1.0, dry_base=2.0, dry_allowed_length=1, sequence=LOOP)
        # The bias that makes up for the penalty is the penalty.
        for exponent in range(8):
            lifted = dry | changes | dict(logit_bias=[(token, 2.0**exponent + 0.5)])
            if sample(logits, temperature=0.0, **lifted) == [token]:
                return 2.0**exponent
        return None

    assert penalty(5) == penalty(8) == 4
    assert penalty(4) == 1
    assert penalty(5, dry_breakers=[4]) == 2
    assert penalty(5, dry_breakers=[7]) == 1


# --- transformers ---


def processed(name, logits, sequence, **options):
    """The logits after a logits processor of transformers."""
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    ids = torch.tensor([list(sequence)])
    processor = getattr(logits_process, name)(**options)
    return processor(ids, torch.tensor(np.asarray(logits, np.float32))[None])[0].numpy()


RNG = np.random.default_rng(5)
WORDS = [RNG.integers(0, 24, n).tolist() for n in (1, 2, 2, 2, 2, 3, 3)]
BIASES = [(3, 1.5), (4, -2.0), (20, -np.inf)]
PROCESSORS = {
    "repetition": (
        dict(repetition_penalty=1.4),
        ("RepetitionPenaltyLogitsProcessor", dict(penalty=1.4)),
    ),
    "ngram of 1": (
        dict(no_repeat_ngram_size=1),
        ("NoRepeatNGramLogitsProcessor", dict(ngram_size=1)),
    ),
    "ngram of 2": (
        dict(no_repeat_ngram_size=2),
        ("NoRepeatNGramLogitsProcessor", dict(ngram_size=2)),
    ),
    "ngram of 3": (
        dict(no_repeat_ngram_size=3),
        ("NoRepeatNGramLogitsProcessor", dict(ngram_size=3)),
    ),
    "bad words": (dict(bad_words=WORDS), ("NoBadWordsLogitsProcessor", dict(bad_words_ids=WORDS))),
    "bias": (
        dict(logit_bias=BIASES),
        ("SequenceBiasLogitsProcessor", dict(sequence_bias={(t,): b for t, b in BIASES})),
    ),
    "top-k": (dict(top_k=7), ("TopKLogitsWarper", dict(top_k=7))),
    "top-p": (dict(top_p=0.8), ("TopPLogitsWarper", dict(top_p=0.8))),
    "min-p": (dict(min_p=0.3), ("MinPLogitsWarper", dict(min_p=0.3))),
    "typical": (dict(typical_p=0.6), ("TypicalLogitsWarper", dict(mass=0.6))),
}


def both(names, logits, sequence):
    """Our parameters of the processors, and the logits that transformers makes."""
    ours = {}
    for name in names:
        parameters, (processor, options) = PROCESSORS[name]
        ours |= parameters
        logits = processed(processor, logits, sequence, **options)
    return ours, logits


ALTERING = ["bias", "repetition", "ngram of 2", "bad words"]
FILTERING = ["top-k", "top-p", "min-p", "typical"]
CHAINS = [*([name] for name in PROCESSORS), ALTERING, FILTERING, ALTERING + FILTERING]


@pytest.mark.parametrize("names", CHAINS, ids=",".join)
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_that_can_be_drawn_are_those_of_transformers(names, seed):
    rng = np.random.default_rng(seed)
    logits = rng.uniform(-1.5, 1.5, 24).astype(np.float32)
    sequence = rng.integers(0, 24, 12).tolist()
    parameters, theirs = both(names, logits, sequence)
    drawn = set(sample(logits, sequence=sequence, count=10_000, **parameters))
    assert drawn == set(np.flatnonzero(theirs > -np.inf).tolist())


# The filters keep the most likely token, but for typical_p, which does not matter at temperature 0.
@pytest.mark.parametrize(
    "names", [chain for chain in CHAINS if "typical" not in chain], ids=",".join
)
@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_choice_is_that_of_transformers(names, seed):
    rng = np.random.default_rng(seed)
    logits = random_logits(1000, seed=seed, spread=0.1)
    sequence = rng.integers(0, 1000, 2000).tolist()
    parameters, theirs = both(names, logits, sequence)
    greedy = dict(temperature=0.0, sequence=sequence)
    assert sample(logits, **greedy, **parameters) == [int(np.argmax(theirs))]


# --- log-probabilities ---


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1000, 50257])
@pytest.mark.parametrize("top", [0, 1, 5])
def test_the_logprob_of_a_choice_is_that_of_the_model(n, top):
    logits = random_logits(n, seed=n, spread=3.0)
    changes = dict(temperature=0.7, top_p=0.9, repetition_penalty=1.5, sequence=[0, n - 1])
    changes |= dict(banned=ranked(logits)[: n // 2], logit_bias=[(n // 3, 2.0)])
    plain = sample(logits, count=20, **changes)
    found = choices(logits, count=20, logprobs=top, **changes)
    assert [token for token, _, _ in found] == plain
    for token, logprob, best in found:
        expected, _, expected_best = _core.testing.score("", logits, token, top)
        assert logprob == expected
        assert best == expected_best
        assert len(best) == min(top, n)


def test_a_choice_without_logprobs_has_none():
    (choice,) = choices([1, 2, 3])
    assert np.isnan(choice[1])
    assert choice[2] == []


def test_a_forced_token_has_the_logprob_of_the_model():
    (choice,) = choices([1, 3, 2], forced=2, banned=[2], logprobs=1)
    assert choice[:2] == (2, pytest.approx(exact_logprobs([1, 3, 2])[2], abs=1e-6))
    assert [token for token, _ in choice[2]] == [1]


def test_the_largest_vocabulary_is_sampled_whole():
    logits = np.zeros(50257)
    tokens = np.array(sample(logits, count=300))
    assert tokens.min() < 2000
    assert tokens.max() > 48000
