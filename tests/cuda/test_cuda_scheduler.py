"""What the engine does with blocks, prefixes, drafts and held requests, on the CUDA backend: the
same bits as a request alone, with every byte poisoned that nobody may read."""

import threading

import numpy as np
import pytest

import oracle
from gptx import _core
from models import generate, make_config, make_engine, random_ids, random_tensors, run, submit

BLOCK = 64
MODES = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8, int8 cache": dict(dtype="int8", kv_cache_dtype="int8"),
}
SAMPLED = dict(temperature=0.9, top_k=20, top_p=0.9, seed=7)
# Chosen on the host.
REPORTED = SAMPLED | dict(logprobs=3)
# Chosen on the device, but never several tokens at once.
PENALIZED = SAMPLED | dict(repetition_penalty=1.3)


@pytest.fixture(scope="module")
def config():
    """Heads of 20, which end inside a tile."""
    return make_config(vocab_size=97, block_size=192, n_embd=40, n_head=2, n_inner=64)


@pytest.fixture(scope="module")
def tensors(config):
    return random_tensors(config)


@pytest.fixture(scope="module")
def mode():
    """bfloat16, unless a test asks for every mode."""
    return MODES["bfloat16"]


EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES, scope="module")


@pytest.fixture(scope="module")
def make(config, tensors, mode, library):
    """Makes an engine on the device; unless told otherwise, with room for one context only."""

    def engine(**options):
        options = dict(kv_cache_bytes=0, prefix_cache_bytes=1 << 30, poison=True) | mode | options
        return make_engine(config, tensors, device="cuda", cuda_library=library, **options)

    return engine


@pytest.fixture
def small(make):
    engine = make()
    assert engine.stats()["blocks"] == 3
    return engine


@pytest.fixture(scope="module")
def plain(make):
    """Keeps nothing of what was before, and poisons nothing."""
    return make(kv_cache_bytes=1 << 20, prefix_cache_bytes=0, poison=False)


def ready(engine, request):
    """Computes a held request and returns its logits [wanted, V]."""
    assert [event[1:3] for event in engine.advance([request])] == [(-1, "")]
    return engine.held_logits(request)


def joined(*parts):
    return np.concatenate(parts).astype(np.int32)


def run_keeping(engine, request):
    """The rest of its events but for the request, which stays."""
    events = []
    while not events or not events[-1][1]:
        events += [event[1:] for event in engine.advance([request])]
    return events


# Prefixes and preemption


@EVERY_MODE
def test_a_prompt_that_comes_again_is_not_computed_again(small, plain, config):
    ids = random_ids(config, 150)
    first = generate(small, ids, 12, **SAMPLED)
    request = submit(small, ids, 12, **SAMPLED)
    again = [event[0] for event in run_keeping(small, request)]
    assert again == first == generate(plain, ids, 12, **SAMPLED)
    assert small.usage(request)["cached"] == 2 * BLOCK


def test_requests_of_one_step_share_the_blocks_of_their_prefix(make, plain, config):
    engine = make(kv_cache_bytes=1 << 20)
    prefix = random_ids(config, BLOCK)
    prompts = [joined(prefix, random_ids(config, 3 + i, seed=i)) for i in range(5)]
    kinds = [{}, SAMPLED, REPORTED, PENALIZED, dict(lookup=4)]
    requests = [submit(engine, p, 10, **k) for p, k in zip(prompts, kinds, strict=True)]
    expected = [generate(plain, p, 10, **k) for p, k in zip(prompts, kinds, strict=True)]
    assert run(engine, requests) == expected
    assert engine.stats()["rows"] <= BLOCK + sum(len(p) - BLOCK + 10 for p in prompts)


@EVERY_MODE
def test_requests_that_outgrow_the_pool_are_preempted_and_go_on_the_same(small, plain, config):
    prompts = [random_ids(config, 50 + i, seed=i) for i in range(3)]
    kinds = [SAMPLED, {}, REPORTED]
    requests = [submit(small, p, 40, **k) for p, k in zip(prompts, kinds, strict=True)]
    expected = [generate(plain, p, 40, **k) for p, k in zip(prompts, kinds, strict=True)]
    assert run(small, requests) == expected
    assert small.stats()["preemptions"] > 0
    assert small.free_blocks == 3


def test_threads_that_drive_and_release_at_once_change_nothing(small, plain, config):
    prompts = [random_ids(config, 50, seed=i) for i in range(3)]
    expected = [generate(plain, p, 20) for p in prompts]
    results = {}

    def work(i):
        paused = submit(small, random_ids(config, 100, seed=50 + i), 50)
        small.advance([paused])  # never read again
        results[i] = run(small, [submit(small, prompts[i], 20)])[0]
        small.release(paused)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results.get(i) for i in range(3)] == expected
    assert small.free_blocks == 3


# Held requests


@EVERY_MODE
def test_held_logits_are_those_of_the_whole(small, plain, config):
    ids = random_ids(config, 150)
    whole = plain.logits(ids)
    request = submit(small, ids[:80], 1, held=True)
    assert np.array_equal(ready(small, request), whole[79:80])
    small.feed(request, ids[80:100], 7)
    assert np.array_equal(ready(small, request), whole[93:100])
    small.feed(request, ids[100:150], 50)
    assert np.array_equal(ready(small, request), whole[100:150])
    small.feed(request, [3])
    assert np.array_equal(ready(small, request), plain.logits(joined(ids, [3]))[-1:])
    small.release(request)
    assert small.free_blocks == 3


def test_held_logits_are_right_beside_tokens_that_the_device_chooses(make, plain, config):
    """Their decode rows share steps, whose recordings they share too."""
    engine = make(kv_cache_bytes=1 << 20)
    ids = random_ids(config, 20)
    prompts = [random_ids(config, 10 + i, seed=i) for i in range(3)]
    kinds = [{}, REPORTED, PENALIZED]
    others = [submit(engine, p, 12, **k) for p, k in zip(prompts, kinds, strict=True)]
    held = submit(engine, ids, 1, held=True)
    tokens = {request: [] for request in others}
    for token in range(12):
        waiting = {held, *(other for other in others if len(tokens[other]) <= token)}
        while waiting:
            for request, chosen, *_ in engine.advance(sorted(waiting)):
                waiting.discard(request)
                if request != held:
                    tokens[request].append(chosen)
        assert np.array_equal(engine.held_logits(held), plain.logits(ids)[-1:])
        ids = joined(ids, [token])
        engine.feed(held, [token])
    expected = [generate(plain, p, 12, **k) for p, k in zip(prompts, kinds, strict=True)]
    assert list(tokens.values()) == expected


@EVERY_MODE
def test_a_fork_shares_blocks_and_copies_the_one_it_writes_to(make, plain, config):
    engine = make(kv_cache_bytes=1 << 20)
    free = engine.free_blocks
    ids = random_ids(config, 100)
    parent = submit(engine, ids, 1, held=True)
    ready(engine, parent)
    requests = [parent, engine.fork(parent), engine.fork(parent)]
    assert engine.free_blocks == free - 2
    ends = [random_ids(config, 20, seed=i) for i in range(3)]
    for request, end in zip(requests, ends, strict=True):
        engine.feed(request, end)
    waiting = set(requests)
    while waiting:
        waiting -= {event[0] for event in engine.advance(sorted(waiting))}
    for request, end in zip(requests, ends, strict=True):
        expected = plain.logits(joined(ids, end))[-1:]
        assert np.array_equal(engine.held_logits(request), expected)
    for request in requests:
        engine.release(request)
    assert engine.free_blocks == free


@EVERY_MODE
def test_a_truncated_request_goes_on_as_if_it_had_never_been_longer(small, plain, config):
    ids = random_ids(config, 150)
    request = submit(small, ids, 1, held=True)
    ready(small, request)
    for n in (149, 129, 128, 65, 64, 63, 1):
        small.truncate(request, n)
        small.feed(request, [5, 6])
        expected = plain.logits(joined(ids[:n], [5, 6]))[-1:]
        assert np.array_equal(ready(small, request), expected)
    small.release(request)


@EVERY_MODE
def test_a_saved_request_continues_where_it_was(make, small, config):
    ids = random_ids(config, 150)
    request = submit(small, ids, 1, held=True)
    logits = ready(small, request)
    blocks = small.save(request)
    assert len(blocks) == 3 * small.kv_block_bytes
    small.release(request)
    other = make()
    restored = other.restore(ids, blocks)
    assert np.array_equal(ready(other, restored), logits)
    assert other.stats()["rows"] == 1


@pytest.mark.parametrize("mode", [MODES["float32"]], ids=["float32"], scope="module")
def test_hidden_states_are_near_the_float64_values(small, config, tensors):
    ids = random_ids(config, 90)
    request = submit(small, ids[:60], 1, held=True, hidden=True)
    ready(small, request)
    small.feed(request, ids[60:], 30)
    logits = ready(small, request)
    hidden = small.held_hidden(request)
    assert hidden.shape == (30, 40)
    # The head multiplies them, and has as many independent rows as they are long.
    exact = oracle.forward(config, tensors, ids)[60:]
    head = tensors["wte.weight"].astype(np.float64)
    expected = np.linalg.lstsq(head, exact.T, rcond=None)[0].T
    assert np.abs(hidden - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.abs(hidden @ head.T - logits).max() < 1e-5 * np.abs(logits).max()


@EVERY_MODE
def test_hidden_states_without_logits_share_steps_with_everything_else(make, plain, config):
    engine = make(kv_cache_bytes=1 << 20)
    ids = random_ids(config, 150)
    request = submit(plain, ids, 1, held=True, hidden=True, wanted=150)
    ready(plain, request)
    expected = plain.held_hidden(request)
    options = dict(held=True, hidden=True, logits=0)
    states = [submit(engine, ids, 1, wanted=wanted, **options) for wanted in (150, 1, 70)]
    generated = submit(engine, ids[:20], 12, **SAMPLED)
    assert run(engine, [generated])[0] == generate(plain, ids[:20], 12, **SAMPLED)
    for request, wanted in zip(states, (150, 1, 70), strict=True):
        engine.advance([request])
        assert np.array_equal(engine.held_hidden(request), expected[-wanted:])
        assert engine.held_logits(request).shape == (0, config.vocab_size)
        engine.feed(request, [3])
        ready(engine, request)
        assert engine.held_hidden(request).shape == (1, config.n_embd)
        engine.release(request)


@EVERY_MODE
def test_the_states_between_layers_are_those_of_the_cpu(make, config, tensors, mode):
    engine = make(kv_cache_bytes=1 << 20)
    ids = random_ids(config, 150)
    states = engine.states(ids)
    expected = make_engine(config, tensors, **mode).states(ids)
    assert states.shape == (config.n_layer + 1, 150, config.n_embd)
    assert np.array_equal(states[0], expected[0])
    bound = 1e-5 if mode["dtype"] == "float32" else 3e-2
    assert np.abs(states - expected).max() < bound * np.abs(expected).max()
    request = submit(engine, ids, 1, held=True, hidden=True, wanted=150)
    ready(engine, request)
    assert np.array_equal(engine.held_hidden(request), states[-1])
    assert np.array_equal(engine.states(ids[:1])[:, 0], states[:, 0])


# What is chosen on the host

HOST_PARAMETERS = [
    dict(temperature=0.0, logprobs=0),
    dict(logprobs=5),
    dict(logit_bias=[(3, 5.0), (8, -100.0)], logprobs=2),
    dict(presence_penalty=0.7, frequency_penalty=0.4),
    dict(temperature=0.0, frequency_penalty=1.5),
    dict(dry_multiplier=0.8, dry_breakers=[1, 2]),
    dict(no_repeat_ngram_size=2, temperature=0.0),
    dict(bad_words=[[5], [7, 9]]),
    dict(top_n_sigma=1.0, typical_p=0.8),
    dict(repetition_penalty=1.5, top_k=30, top_p=0.8, min_p=0.01, logprobs=1),
]


def choices_of_the_cpu(engine, ids, n, params, **task):
    """Tokens from the logits of the device, one by one: [(token, logprob, top)]."""
    choices, text = [], [int(i) for i in ids]
    for i in range(n):
        logits = engine.logits(np.array(text, np.int32))[-1]
        changes = {name: value[i] for name, value in task.items()}
        choices += _core.testing.sample(
            logits, params, sequence=text, prompt=len(ids), first_position=len(text), **changes
        )
        text.append(choices[-1][0])
    return choices


@pytest.mark.parametrize("params", HOST_PARAMETERS, ids=str)
def test_the_host_chooses_what_the_device_does_not_know(small, plain, config, params):
    params = dict(temperature=0.9, seed=3) | params
    ids = np.tile(random_ids(config, 5), 3)
    request = submit(small, ids, 6, **params)
    chosen = [(token, logprob, top) for token, _, logprob, top in run_keeping(small, request)]
    expected = choices_of_the_cpu(plain, ids, 6, params)
    np.testing.assert_equal(chosen, expected)


def test_drafts_are_checked_with_what_the_host_chooses(small, plain, config):
    params = REPORTED | dict(frequency_penalty=0.3)
    ids = np.tile(random_ids(config, 7), 4)
    request = submit(small, ids, 15, lookup=5, **params)
    chosen = [(token, logprob, top) for token, _, logprob, top in run_keeping(small, request)]
    np.testing.assert_equal(chosen, choices_of_the_cpu(plain, ids, 15, params))


def test_a_held_request_chooses_as_if_it_generated(small, plain, config):
    params = SAMPLED | dict(repetition_penalty=1.3)
    ids = random_ids(config, 30)
    request = submit(small, ids, 12, held=True, **params)
    tokens, finish = [], ""
    while not finish:
        _, token, finish, *_ = small.choose(request, ready(small, request)[0])
        tokens.append(token)
    assert tokens == generate(plain, ids, 12, **params)


def test_a_held_request_chooses_among_what_is_allowed(small, plain, config):
    masks = [[0x0F0F0F0F, 0, 0xFFFF, 0], [0, 1, 0, 0]]
    ids = random_ids(config, 30)
    request = submit(small, ids, 2, held=True, **SAMPLED)
    tokens = [small.choose(request, ready(small, request)[0], mask)[1] for mask in masks]
    expected = choices_of_the_cpu(plain, ids, 2, SAMPLED, allowed=masks)
    assert tokens == [token for token, _, _ in expected]


def test_forced_tokens_begin_and_end_what_is_generated(small, plain, config):
    ids = random_ids(config, 20)
    forced = [3, 4, 5, -1, -1, -1, 6]
    tokens = generate(small, ids, 7, forced_tokens=forced[:3], forced_end=forced[-1])
    expected = choices_of_the_cpu(plain, ids, 7, dict(temperature=0.0), forced=forced)
    assert tokens == [token for token, _, _ in expected]


@EVERY_MODE
def test_scores_are_those_of_the_logits(small, plain, config):
    ids = random_ids(config, 150)
    logits = plain.logits(ids)
    request = small.submit_score(ids, first=70, top=4)
    assert [event[2] for event in small.advance([request])] == ["done"]
    logprobs, ranks, top_ids, top_logprobs = small.scores(request)
    for i in range(80):
        logprob, rank, top = _core.testing.score("", logits[69 + i], int(ids[70 + i]), 4)
        np.testing.assert_equal((logprobs[i], ranks[i]), (logprob, rank))
        found = list(zip(top_ids[i].tolist(), top_logprobs[i].tolist(), strict=True))
        assert found[: len(top)] == top
    small.release(request)


# Drafts and slides


@EVERY_MODE
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_prompt_lookup_changes_no_token(small, plain, config, params):
    ids = np.tile(random_ids(config, 11), 5)
    request = submit(small, ids, 40, lookup=8, **params)
    assert [event[0] for event in run_keeping(small, request)] == generate(plain, ids, 40, **params)
    assert small.usage(request)["drafted"] > 0


@EVERY_MODE
def test_a_right_proposal_brings_its_tokens_in_one_step(small, plain, config):
    ids = random_ids(config, 55)
    expected = generate(plain, ids, 30, **PENALIZED)
    request = submit(small, ids, 30, **PENALIZED)
    tokens = [event[1] for event in small.advance([request])]
    # 12 rows across the end of a block, each with a token of its own.
    small.propose(request, 56, expected[1:12])
    steps = small.stats()["steps"]
    tokens += [event[1] for event in small.advance([request])]
    assert small.stats()["steps"] == steps + 1
    assert tokens == expected[:13]
    wrong = (expected[14] + 1) % config.vocab_size
    small.propose(request, 68, [expected[13], wrong, expected[15]])
    tokens += [event[1] for event in small.advance([request])]
    assert tokens == expected[:15]
    assert tokens + run(small, [request])[0] == expected


def test_a_slid_context_is_the_last_tokens_read_again(small, plain, config):
    tokens = random_ids(config, 189).tolist()
    begin = 0
    for _ in range(8):
        if len(tokens) - begin > config.block_size:
            begin = len(tokens) - 70
        logits = plain.logits(np.array(tokens[begin:], np.int32))[-1]
        tokens.append(int(logits.argmax()))
    assert generate(small, tokens[:189], 8, slide=70) == tokens[189:]
    assert generate(small, tokens[:189], 8, slide=70, lookup=4) == tokens[189:]


# All of it together


def test_mixed_requests_with_cancellation_change_nothing(small, plain, config):
    rng = np.random.default_rng(0)
    prefixes = [random_ids(config, n, seed=n) for n in (5, 64, 90)]
    kinds = [{}, SAMPLED, REPORTED, PENALIZED, dict(lookup=6), dict(forced_tokens=[1, 2])]
    living, tokens, submitted, survivors = {}, {}, 0, 0
    while submitted < 16 or living:
        while len(living) < 6 and submitted < 16:
            ids = joined(prefixes[rng.integers(3)], random_ids(config, 5, seed=submitted % 3))
            work = (ids, int(rng.integers(1, 20)), kinds[rng.integers(len(kinds))])
            request = submit(small, *work[:2], **work[2])
            living[request], tokens[request] = work, []
            submitted += 1
        asked = [r for r in living if rng.random() < 0.9] or list(living)
        for request, token, finish, *_ in small.advance(asked):
            tokens[request] += [token] if token >= 0 else []
            if finish:
                ids, n, params = living.pop(request)
                assert tokens[request] == generate(plain, ids, n, **params)
                small.release(request)
                survivors += 1
        if living and rng.random() < 0.03:
            victim = list(living)[rng.integers(len(living))]
            del living[victim]
            small.release(victim)
    assert survivors > 8
    assert small.stats()["requests"] == 0
    assert small.free_blocks == 3
