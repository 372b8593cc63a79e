"""Blocks, prefixes, preemption, drafts and held requests: none of them may change a bit."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from gptx.errors import ParameterError
from models import generate, make_config, make_engine, random_ids, random_tensors, run, submit

SAMPLED = dict(temperature=0.9, top_k=20, top_p=0.9, seed=7)
MODES = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8, int8 cache": dict(dtype="int8", kv_cache_dtype="int8"),
}
BLOCK = 64


@pytest.fixture(scope="module")
def config():
    return make_config(block_size=320, n_embd=48, n_head=3)


@pytest.fixture(scope="module")
def tensors(config):
    return random_tensors(config)


@pytest.fixture(params=MODES.values(), ids=MODES, scope="module")
def mode(request):
    return request.param


@pytest.fixture
def small(config, tensors, mode):
    """An engine with room for one context only, freed memory poisoned, and every prefix kept."""
    engine = make_engine(
        config, tensors, kv_cache_bytes=0, prefix_cache_bytes=1 << 30, poison=True, **mode
    )
    assert engine.stats()["blocks"] == 5
    return engine


@pytest.fixture(scope="module")
def solo(config, tensors, mode):
    """Generates alone, with nothing cached: what every other way must equal."""

    def alone(ids, n, **params):
        return generate(make_engine(config, tensors, **mode), ids, n, **params)

    return alone


def ready(engine, request):
    """Computes a held request and returns its logits [wanted, V]."""
    assert [event[1:3] for event in engine.advance([request])] == [(-1, "")]
    return engine.held_logits(request)


# Prefixes


def test_a_prompt_that_comes_again_is_not_computed_again(small, solo, config):
    ids = random_ids(config, 200)
    first = generate(small, ids, 20, **SAMPLED)
    rows = small.stats()["rows"]
    request = submit(small, ids, 20, **SAMPLED)
    again = run(small, [request])[0]
    assert first == again == solo(ids, 20, **SAMPLED)
    assert small.stats()["rows"] - rows == 200 - 3 * BLOCK + 19


def test_a_prefix_is_shared_by_texts_that_go_on_differently(small, solo, config):
    ids = random_ids(config, 150)
    generate(small, ids, 5)
    for n in (64, 65, 100, 128, 129, 149):
        other = np.concatenate([ids[:n], random_ids(config, 30, seed=n)])
        rows = small.stats()["rows"]
        request = submit(small, other, 10)
        small.advance([request])
        assert small.usage(request)["cached"] == n // BLOCK * BLOCK
        assert small.stats()["rows"] - rows == len(other) - n // BLOCK * BLOCK
        small.release(request)
        assert generate(small, other, 10) == solo(other, 10)


def test_what_was_generated_is_a_prefix_too(small, solo, config):
    ids = random_ids(config, 60)
    text = generate(small, ids, 80)
    longer = np.concatenate([ids, text, random_ids(config, 5, seed=1)])
    request = submit(small, longer, 10)
    assert run(small, [request])[0] == solo(longer, 10)
    again = submit(small, longer, 1)
    small.advance([again])
    assert small.usage(again)["cached"] == 128
    small.release(again)


def test_requests_with_one_prefix_compute_it_once(config, tensors, mode, solo):
    engine = make_engine(
        config, tensors, kv_cache_bytes=1 << 30, prefix_cache_bytes=1 << 30, poison=True, **mode
    )
    prefix = random_ids(config, 128)
    prompts = [np.concatenate([prefix, random_ids(config, 3 + i, seed=i)]) for i in range(12)]
    requests = [submit(engine, p, 8, **SAMPLED) for p in prompts]
    assert run(engine, requests) == [solo(p, 8, **SAMPLED) for p in prompts]
    assert engine.stats()["rows"] == 128 + sum(len(p) - 128 + 7 for p in prompts)


def test_the_least_recently_used_prefix_goes_first(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=0, prefix_cache_bytes=1 << 30)
    texts = [random_ids(config, 70, seed=i) for i in range(4)]
    for ids in texts:
        generate(engine, ids, 1)
    assert engine.stats()["cached_blocks"] == 4

    def cached(ids):
        request = submit(engine, ids, 1)
        engine.advance([request])
        n = engine.usage(request)["cached"]
        engine.release(request)
        return n

    assert cached(texts[0]) == BLOCK  # used again: now the youngest
    generate(engine, random_ids(config, 250, seed=9), 1)  # needs 4 of 5 blocks
    assert cached(texts[0]) == BLOCK
    assert cached(texts[1]) == 0


def test_without_a_prefix_cache_nothing_is_kept(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=0)
    generate(engine, random_ids(config, 200), 5)
    assert engine.stats()["cached_blocks"] == 0
    assert engine.stats()["free_blocks"] == 5


def test_the_prefix_cache_is_bounded(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24)
    bytes_of_block = engine.kv_block_bytes
    engine = make_engine(
        config, tensors, kv_cache_bytes=1 << 24, prefix_cache_bytes=3 * bytes_of_block
    )
    for seed in range(6):
        generate(engine, random_ids(config, 200, seed=seed), 2)
    assert engine.stats()["cached_blocks"] == 3


# Preemption


def test_requests_that_outgrow_the_pool_are_preempted_and_go_on_the_same(small, solo, config):
    prompts = [random_ids(config, 20 + i, seed=i) for i in range(8)]
    requests = [submit(small, p, 120, **SAMPLED) for p in prompts]
    assert run(small, requests) == [solo(p, 120, **SAMPLED) for p in prompts]
    assert small.stats()["preemptions"] > 0
    assert small.free_blocks == 5


def test_an_unread_stream_gives_its_blocks_to_others_and_goes_on_the_same(small, solo, config):
    ids = random_ids(config, 200)
    paused = submit(small, ids, 100)
    first = [event[1] for event in small.advance([paused])]
    others = [random_ids(config, 150, seed=i) for i in range(3)]
    assert [run(small, [submit(small, p, 100)])[0] for p in others] == [
        solo(p, 100) for p in others
    ]
    assert small.stats()["preemptions"] > 0
    assert first + run(small, [paused])[0] == solo(ids, 100)


def test_two_threads_with_unread_streams_do_not_block_each_other(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=0, poison=True)
    prompts = [random_ids(config, 190, seed=i) for i in range(4)]
    expected = [generate(make_engine(config, tensors), p, 60) for p in prompts]
    results = {}

    def work(i):
        paused = submit(engine, random_ids(config, 200, seed=50 + i), 50)
        engine.advance([paused])  # never read again
        results[i] = run(engine, [submit(engine, prompts[i], 60)])[0]
        engine.release(paused)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [results.get(i) for i in range(4)] == expected
    assert engine.free_blocks == 5


# Held requests


def test_held_logits_are_those_of_the_whole(small, config, tensors, mode):
    ids = random_ids(config, 200)
    whole = make_engine(config, tensors, **mode).logits(ids)
    request = submit(small, ids[:100], 1, held=True)
    assert np.array_equal(ready(small, request), whole[99:100])
    small.feed(request, ids[100:130], 7)
    assert np.array_equal(ready(small, request), whole[123:130])
    small.feed(request, ids[130:200], 70)
    assert np.array_equal(ready(small, request), whole[130:200])
    small.release(request)
    assert small.free_blocks == 5


def test_a_fork_shares_blocks_and_copies_the_one_it_writes_to(config, tensors, mode):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 30, poison=True, **mode)
    plain = make_engine(config, tensors, **mode)
    free = engine.free_blocks
    ids = random_ids(config, 100)
    parent = submit(engine, ids, 1, held=True)
    ready(engine, parent)
    assert engine.free_blocks == free - 2
    children = [engine.fork(parent) for _ in range(3)]
    assert engine.free_blocks == free - 2
    ends = [random_ids(config, 40, seed=i) for i in range(4)]
    for request, end in zip([parent, *children], ends, strict=True):
        engine.feed(request, end)
    requests = [parent, *children]
    waiting = set(requests)
    while waiting:
        waiting -= {event[0] for event in engine.advance(sorted(waiting))}
    for request, end in zip(requests, ends, strict=True):
        whole = plain.logits(np.concatenate([ids, end]))
        assert np.array_equal(engine.held_logits(request), whole[-1:])
    # The first block is shared by 4; each has a second one and a third.
    assert engine.free_blocks == free - 1 - 4 * 2
    for request in requests:
        engine.release(request)
    assert engine.free_blocks == free


def test_a_truncated_request_goes_on_as_if_it_had_never_been_longer(small, config, tensors, mode):
    plain = make_engine(config, tensors, **mode)
    ids = random_ids(config, 250)
    request = submit(small, ids, 1, held=True)
    ready(small, request)
    for n in (249, 200, 192, 191, 130, 128, 64, 63, 1):
        small.truncate(request, n)
        small.feed(request, [5, 6])
        expected = plain.logits(np.concatenate([ids[:n], [5, 6]]).astype(np.int32))[-1:]
        assert np.array_equal(ready(small, request), expected)
    small.release(request)


def test_a_held_request_that_was_preempted_is_computed_again(small, config, tensors, mode):
    plain = make_engine(config, tensors, **mode)
    ids = random_ids(config, 200)
    request = submit(small, ids, 1, held=True)
    ready(small, request)
    generate(small, random_ids(config, 200, seed=1), 50)
    assert small.stats()["preemptions"] == 1
    small.feed(request, [3])
    expected = plain.logits(np.concatenate([ids, [3]]).astype(np.int32))[-1:]
    assert np.array_equal(ready(small, request), expected)
    small.release(request)


def test_tokens_chosen_by_the_caller_are_those_the_engine_chooses(small, solo, config):
    ids = random_ids(config, 30)
    request = submit(small, ids, 20, held=True, repetition_penalty=1.3, **SAMPLED)
    tokens = []
    while True:
        logits = ready(small, request)[0]
        _, token, finish, *_ = small.choose(request, logits)
        tokens.append(token)
        if finish:
            break
    small.release(request)
    assert tokens == solo(ids, 20, repetition_penalty=1.3, **SAMPLED)
    assert finish == "length"


@pytest.mark.parametrize("right", ["all", "some", "none", "looked up"])
def test_drafts_of_a_caller_that_chooses_change_nothing(small, solo, config, right):
    ids = np.tile(random_ids(config, 25), 3)
    params = SAMPLED | dict(temperature=0.3, repetition_penalty=1.1)
    expected = solo(ids, 100, **params)
    lookup = 8 if right == "looked up" else 0
    request = submit(small, ids, 100, held=True, lookup=lookup, **params)
    wrong = {"all": 1000, "some": 3, "none": 1, "looked up": 1}[right]
    tokens = []
    small.advance([request])
    while True:
        _, token, finish, *_ = small.choose(request)
        tokens.append(token)
        if finish:
            break
        n = small.draft_length(request)
        if n and not lookup:
            draft = np.array(expected[len(tokens) : len(tokens) + n])
            draft[wrong - 1 :: wrong] += 1
            small.propose(request, len(ids) + len(tokens), draft % config.vocab_size)
        if len(tokens) == 60:  # everything is taken away in the middle of a draft
            generate(small, random_ids(config, 250), 50)
            assert small.stats()["preemptions"] >= 1
        assert [event[1:3] for event in small.advance([request])] == [(-1, "")]
    usage = small.usage(request)
    small.release(request)
    assert (tokens, finish) == (expected, "length")
    if not lookup:
        assert usage["drafted"] > 10
        least, most = {"all": (80, 100), "some": (40, 80), "none": (0, 0)}[right]
        assert least <= usage["accepted"] <= most
    assert small.stats()["free_blocks"] + small.stats()["cached_blocks"] == 5


def test_what_was_drafted_is_void_where_the_text_goes_on_otherwise(small, config, tensors, mode):
    plain = make_engine(config, tensors, **mode)
    ids = random_ids(config, 70)
    request = submit(small, ids, 100, held=True, **SAMPLED)
    small.advance([request])
    token = small.choose(request)[1]
    for change in ("feed", "truncate", "fork"):
        small.propose(request, len(small.tokens(request)), random_ids(config, 5))
        ready(small, request)
        other = small.fork(request) if change == "fork" else request
        if change == "truncate":
            small.truncate(request, 66)
        small.feed(other, [token, 3])
        text = np.array(small.tokens(other), np.int32)
        assert np.array_equal(ready(small, other), plain.logits(text)[-1:])
        token = small.choose(request)[1]
    small.release(request)
    small.release(other)


def test_a_text_that_waits_for_a_step_does_not_hold_up_python(config, tensors, mode):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24, threads=1, **mode)
    ids = random_ids(config, 50)
    held = submit(engine, ids, 5, held=True)
    logits = ready(engine, held)
    saved = engine.save(held)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            engine.logits(random_ids(config, 300))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            restored = engine.restore(ids, saved)
            assert np.array_equal(ready(engine, restored), logits)
            engine.feed(restored, random_ids(config, 200))
            time.sleep(0.005)
            assert len(engine.tokens(restored)) == 250
            engine.truncate(restored, 40)
            engine.save(restored)
            engine.release(restored)
    finally:
        stop.set()
        thread.join()


def test_a_full_block_is_written_into_where_there_is_none_for_a_copy(config, tensors, mode):
    plain = make_engine(config, tensors, **mode)
    for cached in (0, 1 << 30):
        engine = make_engine(config, tensors, prefix_cache_bytes=cached, poison=True, **mode)
        ids = random_ids(config, config.block_size)
        held = submit(engine, ids, 5, held=True)
        ready(engine, held)
        engine.truncate(held, config.block_size - 1)
        engine.feed(held, [3])
        changed = np.append(ids[:-1], 3).astype(np.int32)
        assert np.array_equal(ready(engine, held), plain.logits(changed)[-1:])
        # Shares a part of the last block with a text that rests.
        score = engine.submit_score(np.append(ids[:-8], [5, 6]).astype(np.int32), parent=held)
        assert engine.advance([score])[-1][2] == "done"
        engine.release(score)
        engine.release(held)


def test_a_copy_of_a_text_that_is_half_computed_is_computed_whole(config, tensors, mode):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24, poison=True, **mode)
    ids = random_ids(config, 100)
    other = submit(engine, random_ids(config, 5), 5)
    held = submit(engine, ids, 5, held=True, wanted=100)
    engine.advance([other])  # brings 63 of the rows
    copy = engine.fork(held)
    saved = engine.save(held)
    expected = engine.logits(ids)
    assert np.array_equal(ready(engine, copy), expected)
    assert np.array_equal(ready(engine, held), expected)
    restored = engine.restore(ids, saved)
    assert np.array_equal(ready(engine, restored), expected[-1:])


def test_what_was_fed_and_not_computed_is_not_saved_as_if_it_were(config, tensors, mode):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24, poison=True, **mode)
    ids = random_ids(config, 60)
    held = submit(engine, ids[:40], 5, held=True)
    ready(engine, held)
    engine.feed(held, ids[40:])  # and something interrupts its step
    restored = engine.restore(ids, engine.save(held))
    assert np.array_equal(ready(engine, restored), engine.logits(ids)[-1:])


def test_hidden_states_are_never_drafted(small, config):
    ids = random_ids(config, 20)
    request = submit(small, ids, 40, held=True, hidden=True, lookup=8)
    small.advance([request])
    for n in range(20):
        small.choose(request)
        small.propose(request, len(ids) + n + 1, np.tile(ids, 2)[:12])
        small.advance([request])
        assert small.held_hidden(request).shape == (1, config.n_embd)
    assert small.usage(request)["drafted"] == 0
    small.release(request)


def test_a_text_that_waits_for_blocks_gets_those_that_rest(config, tensors, mode):
    block = make_engine(config, tensors, **mode).kv_block_bytes
    engine = make_engine(config, tensors, kv_cache_bytes=8 * block, **mode)
    resting = submit(engine, random_ids(config, 250), 5, held=True)
    ready(engine, resting)
    endless = submit(engine, random_ids(config, 20), 10**6, slide=20)
    waiting = submit(engine, random_ids(config, 310, seed=9), 3)
    for _ in range(1000):
        if any(event[0] == waiting for event in engine.advance([endless, waiting])):
            break
    else:
        pytest.fail("it never began")
    assert engine.stats()["preemptions"] > 0


def test_a_context_that_is_full_ends_what_the_caller_chooses(small, config):
    request = submit(small, random_ids(config, config.block_size), 5, held=True)
    ready(small, request)
    assert small.choose(request)[2] == "length"
    small.release(request)
    request = submit(small, random_ids(config, 300), 400, held=True, slide=20)
    ready(small, request)
    for _ in range(40):
        small.choose(request)
        small.advance([request])
    small.truncate(request, 30)  # behind where the window begins
    small.feed(request, [1, 2])
    ready(small, request)
    small.release(request)


def test_only_held_requests_are_changed_by_their_callers(small, config):
    ids = random_ids(config, 20)
    for request in (small.submit_score(ids, first=1), submit(small, ids, 5)):
        for call in (
            lambda r: small.feed(r, [1]),
            lambda r: small.truncate(r, 3),
            small.fork,
            lambda r: small.choose(r, np.zeros(config.vocab_size, np.float32)),
            small.save,
        ):
            with pytest.raises(ParameterError, match="held"):
                call(request)
        small.release(request)


@pytest.mark.parametrize(
    "wrong", [dict(min_p=2.0), dict(temperature=-1.0), dict(typical_p=float("nan")), dict(top_k=-1)]
)
def test_parameters_that_the_sampler_cannot_work_with_are_refused(small, config, wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        submit(small, random_ids(config, 5), 5, **wrong)


def test_a_step_that_fails_leaves_the_others_as_they_were(config, tensors):
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from models import *
        config = make_config(vocab_size=50257, block_size=512, n_layer=1)
        engine = make_engine(config, random_tensors(config), threads=1, kv_cache_bytes=1 << 24)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (48 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        large = submit(engine, random_ids(config, 400), 5, held=True, wanted=400)  # 80 MB of logits
        small = submit(engine, random_ids(config, 10), 5)
        try:
            engine.advance([large])
        except MemoryError:
            print("MemoryError")
        engine.release(large)
        print(len(run(engine, [small])[0]), engine.stats()["requests"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.stdout == "MemoryError\n5 0\n", result.stderr


def test_a_forked_child_forgets_what_a_step_guessed(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24, threads=1)
    request = submit(engine, random_ids(config, 30), 20)
    engine.advance([request])
    before = engine.tokens(request)
    found = set()
    for _ in range(5):
        engine.propose(request, len(before), [1, 2, 3, 4])
        slow = threading.Thread(target=lambda: engine.logits(random_ids(config, 300)))
        driver = threading.Thread(target=lambda: engine.advance([request]))
        slow.start()
        driver.start()
        time.sleep(0.002)
        pid = os.fork()
        if pid == 0:
            engine.reset_after_fork()
            os._exit(len(engine.tokens(request)))
        found.add(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        slow.join()
        driver.join()
        after = engine.tokens(request)
        assert max(found) <= len(after)
        before = after


def test_logits_of_a_request_that_is_not_ready_are_refused(small, config):
    request = submit(small, random_ids(config, 30), 10, held=True)
    for call in (small.choose, lambda request: small.candidates(request, 3)):
        with pytest.raises(ParameterError, match="ready"):
            call(request)
    small.release(request)


def test_children_of_a_held_prompt_do_not_compute_it_again(config, tensors, mode, solo):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 30, poison=True, **mode)
    ids = random_ids(config, 100)
    parent = submit(engine, ids, 1, held=True)
    ready(engine, parent)
    rows = engine.stats()["rows"]
    requests = [
        submit(engine, ids, 10, parent=parent, **(SAMPLED | dict(seed=i))) for i in range(5)
    ]
    expected = [solo(ids, 10, **(SAMPLED | dict(seed=i))) for i in range(5)]
    assert run(engine, requests) == expected
    assert engine.stats()["rows"] - rows == 5 * 10
    engine.release(parent)


def test_a_saved_request_continues_where_it_was(small, config, tensors, mode):
    ids = random_ids(config, 150)
    request = submit(small, ids, 1, held=True)
    logits = ready(small, request)
    blocks = small.save(request)
    small.release(request)
    other = make_engine(config, tensors, **mode)
    restored = other.restore(ids, blocks)
    assert np.array_equal(ready(other, restored), logits)
    assert other.stats()["rows"] == 1
    other.release(restored)


def test_the_hidden_state_is_what_the_head_multiplies(config, tensors):
    engine = make_engine(config, tensors)
    ids = random_ids(config, 90)
    request = submit(engine, ids[:60], 1, held=True, hidden=True)
    ready(engine, request)
    engine.feed(request, ids[60:], 30)
    logits = ready(engine, request)
    hidden = engine.held_hidden(request)
    assert hidden.shape == (30, 48)
    assert np.abs(hidden @ tensors["wte.weight"].T - logits).max() < 1e-4


def test_hidden_states_without_logits_share_steps_with_everything_else(config, tensors, mode, solo):
    plain = make_engine(config, tensors, **mode)
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 24, poison=True, **mode)
    texts = [random_ids(config, n, seed=n) for n in (300, 1, 64, 250)]
    prompts = [random_ids(config, n, seed=n) for n in (90, 7, 200)]
    hidden = dict(held=True, hidden=True, logits=0)
    alone = []
    for ids in texts:
        request = submit(plain, ids, 1, wanted=len(ids), **hidden | dict(logits=len(ids)))
        ready(plain, request)
        alone.append(plain.held_hidden(request))

    def check(request, i, wanted):
        assert engine.held_logits(request).shape == (0, config.vocab_size)
        assert np.array_equal(engine.held_hidden(request), alone[i][-wanted:])

    asked = [(i, wanted) for i, ids in enumerate(texts) for wanted in {1, len(ids)}]
    states = [submit(engine, texts[i], 1, wanted=wanted, **hidden) for i, wanted in asked]
    generated = [submit(engine, ids, 30, **SAMPLED) for ids in prompts]
    assert run(engine, generated) == [solo(ids, 30, **SAMPLED) for ids in prompts]
    for request, (i, wanted) in zip(states, asked, strict=True):
        engine.advance([request])
        check(request, i, wanted)
        engine.feed(request, [3])
        assert ready(engine, request).shape == (0, config.vocab_size)
        assert engine.held_hidden(request).shape == (1, config.n_embd)
    steps = engine.stats()["steps"]
    request = submit(engine, texts[0], 1, wanted=300, **hidden)
    engine.advance([request])
    check(request, 0, 300)
    assert engine.stats()["steps"] - steps == 1


# Scores


def test_scores_are_the_log_probabilities_of_the_logits(small, config, tensors, mode):
    ids = random_ids(config, 300)
    logits = make_engine(config, tensors, **mode).logits(ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    request = small.submit_score(ids, first=40)
    assert [event[2] for event in small.advance([request])] == ["done"]
    found = small.scores(request)[0]
    small.release(request)
    assert np.abs(found - logprobs[np.arange(39, 299), ids[40:]]).max() < 1e-5


def test_a_score_takes_the_prefix_of_its_parent(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=1 << 30)
    ids = random_ids(config, 200)
    alone = engine.submit_score(ids, first=151)
    engine.advance([alone])
    parent = submit(engine, ids[:150], 1, held=True)
    ready(engine, parent)
    rows = engine.stats()["rows"]
    child = engine.submit_score(ids, first=151, parent=parent)
    engine.advance([child])
    assert engine.stats()["rows"] - rows == 49
    assert np.array_equal(engine.scores(child)[0], engine.scores(alone)[0])


# Drafts


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_prompt_lookup_changes_no_token(small, solo, config, params):
    ids = np.tile(random_ids(config, 17), 6)
    request = submit(small, ids, 150, lookup=8, **params)
    plain = solo(ids, 150, **params)
    tokens = run_keeping(small, request)
    usage = small.usage(request)
    small.release(request)
    assert tokens == plain
    assert usage["drafted"] > 0


def test_a_right_proposal_brings_its_tokens_in_one_step(small, solo, config):
    ids = random_ids(config, 50)
    plain = solo(ids, 30, **SAMPLED)
    request = submit(small, ids, 30, **SAMPLED)
    tokens = [event[1] for event in small.advance([request])]
    small.propose(request, 51, plain[1:9])
    steps = small.stats()["steps"]
    tokens += [event[1] for event in small.advance([request])]
    assert small.stats()["steps"] == steps + 1
    assert tokens == plain[:10]
    small.propose(request, 60, [plain[10], (plain[11] + 1) % config.vocab_size, plain[12]])
    tokens += [event[1] for event in small.advance([request])]
    assert tokens == plain[:12]
    assert tokens + run(small, [request])[0] == plain


def test_drafts_respect_the_context_and_the_number_of_tokens(small, solo, config):
    ids = random_ids(config, 312)
    plain = solo(ids, 100)
    request = submit(small, ids, 100)
    tokens = [event[1] for event in small.advance([request])]
    small.propose(request, 313, plain[1:] + [1] * 9)
    tokens += [event[1] for event in small.advance([request])]
    small.release(request)
    assert tokens == plain
    assert len(plain) == 8


def run_keeping(engine, request):
    tokens, finish = [], ""
    while not finish:
        for _, token, why, *_ in engine.advance([request]):
            tokens += [token] if token >= 0 else []
            finish = why
    return tokens


# Past the context, time, forced tokens


@pytest.mark.parametrize("keep", [320, 319, 200, 64, 1])
def test_a_slid_context_is_the_last_tokens_read_again(small, config, tensors, mode, keep):
    """The twin reads the window anew at each token, as nanoGPT crops it."""
    plain = make_engine(config, tensors, **mode)
    tokens = random_ids(config, 310).tolist()
    begin = 0
    for _ in range(40):
        if len(tokens) - begin > config.block_size:
            begin = len(tokens) - keep
        logits = plain.logits(np.array(tokens[begin:], np.int32))[-1]
        tokens.append(int(logits.argmax()))
    assert generate(small, tokens[:310], 40, slide=keep) == tokens[310:]
    assert generate(small, tokens[:310], 40, slide=keep, lookup=8) == tokens[310:]


def test_a_prompt_longer_than_the_context_is_cut_to_its_end(small, solo, config):
    ids = random_ids(config, 500)
    assert generate(small, ids, 10, slide=100) == solo(ids[-100:], 10)


def test_a_deadline_ends_a_request_with_what_it_has(small, config):
    request = submit(small, random_ids(config, 20), 200, seconds=0.05)
    tokens, finish = [], ""
    while not finish:
        for _, token, why, *_ in small.advance([request]):
            tokens += [token] if token >= 0 else []
            finish = why
        time.sleep(0.005)
    assert finish == "time"
    assert 0 < len(tokens) < 200
    small.release(request)
    late = submit(small, random_ids(config, 20), 200, seconds=0.0)
    assert [event[1:3] for event in small.advance([late])] == [(-1, "time")]
    small.release(late)
    assert small.free_blocks == 5


def test_forced_tokens_begin_and_end_what_is_generated(small, config):
    ids = random_ids(config, 20)
    tokens = generate(small, ids, 10, forced_tokens=[3, 4, 5], forced_end=6)
    assert tokens[:3] == [3, 4, 5]
    assert tokens[-1] == 6
    expected = generate(small, np.concatenate([ids, [3, 4, 5]]), 6)
    assert tokens[3:9] == expected


@pytest.mark.parametrize(
    "field",
    [
        dict(forced_tokens=[211]),
        dict(end_tokens=[-1]),
        dict(forced_end=300),
        dict(logit_bias=[(211, 1.0)]),
        dict(bad_words=[[1, -5]]),
        dict(dry_breakers=[1 << 30]),
    ],
    ids=str,
)
def test_the_core_refuses_foreign_ids_in_every_field(config, tensors, field):
    engine = make_engine(config, tensors)
    with pytest.raises(ParameterError, match="ids from 0 to 210"):
        submit(engine, [1, 2], 3, **field)


# All of it together

KINDS = [
    {},
    SAMPLED,
    SAMPLED | dict(seed=9, repetition_penalty=1.2, presence_penalty=0.3),
    dict(lookup=6),
    SAMPLED | dict(lookup=4, no_repeat_ngram_size=3),
    dict(slide=40),
    SAMPLED | dict(forced_tokens=[1, 2], min_new_tokens=4, end_tokens=[5, 6]),
    dict(logprobs=2, logit_bias=[(3, 1.0)]),
]


def test_a_soak_of_20000_mixed_requests_changes_nothing_and_leaks_nothing():
    """A small pool, poisoned, with prefixes, drafts, slides and cancellation at random."""
    config = make_config(block_size=128, n_layer=1, n_embd=32, vocab_size=101)
    tensors = random_tensors(config)
    options = dict(kv_cache_bytes=0, prefix_cache_bytes=1 << 30, poison=True, threads=1)
    blocks = make_engine(config, tensors, **options).kv_block_bytes * 6
    engine = make_engine(config, tensors, **(options | dict(kv_cache_bytes=blocks)))
    alone = make_engine(config, tensors, threads=1)
    rng = np.random.default_rng(0)
    prefixes = [random_ids(config, n, seed=n) for n in (3, 40, 55, 64, 90)]
    expected, living, tokens = {}, {}, {}
    submitted = survivors = cancelled = 0
    resident, files, threads = 0, 0, 0
    while submitted < 20_000 or living:
        if submitted >= 5_000 and not resident:
            resident, files, threads = resident_bytes(), open_files(), living_threads()
        while len(living) < 24 and submitted < 20_000:
            prefix = prefixes[rng.integers(len(prefixes))]
            tail = random_ids(config, int(rng.integers(1, 4)), seed=int(rng.integers(3)))
            key = (
                (*prefix, *tail),
                int(rng.choice([1, 7, 20, 33, 49])),
                int(rng.integers(len(KINDS))),
            )
            request = submit(engine, np.array(key[0]), key[1], **KINDS[key[2]])
            living[request], tokens[request] = key, []
            submitted += 1
        asked = [r for r in living if rng.random() < 0.9] or list(living)
        for request, token, finish, *_ in engine.advance(asked):
            if token >= 0:
                tokens[request].append(token)
            if finish:
                key = living.pop(request)
                if key not in expected:
                    expected[key] = generate(alone, np.array(key[0]), key[1], **KINDS[key[2]])
                assert tokens.pop(request) == expected[key], KINDS[key[2]]
                engine.release(request)
                survivors += 1
        if living and rng.random() < 0.05:
            victim = list(living)[rng.integers(len(living))]
            del living[victim], tokens[victim]
            engine.release(victim)
            cancelled += 1
    stats = engine.stats()
    assert survivors + cancelled == 20_000
    assert min(cancelled, stats["preemptions"]) > 500
    assert (stats["requests"], engine.free_blocks) == (0, stats["blocks"])
    assert resident_bytes() - resident < 16 << 20
    assert (open_files(), living_threads()) == (files, threads)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def living_threads():
    return len(list(Path("/proc/self/task").iterdir()))
