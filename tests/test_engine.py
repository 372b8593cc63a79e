"""The engine's promises: the same request gives the same bits, however it is computed."""

import numpy as np
import pytest

import oracle
from gptx import _core
from models import (
    generate,
    make_config,
    make_engine,
    random_ids,
    random_tensors,
    rounded,
    run,
    stored,
    submit,
)

# How a model can compute: the type of its weights, the precision of the products, the KV cache.
MODES = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(dtype="int8"),
    "int8-fast": dict(dtype="int8", precision="int8-fast"),
    "int8, float32 cache": dict(dtype="int8", kv_cache_dtype="float32"),
    "int8, int8 cache": dict(dtype="int8", kv_cache_dtype="int8"),
    "float32, bfloat16 cache": dict(dtype="float32", kv_cache_dtype="bfloat16"),
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES, scope="module")
SAMPLED = dict(temperature=0.9, top_k=20, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def config():
    return make_config(block_size=320, n_embd=48, n_head=3)


@pytest.fixture(scope="module")
def tensors(config):
    return random_tensors(config)


@pytest.fixture(scope="module")
def mode():
    """float32, unless a test asks for every mode."""
    return MODES["float32"]


@pytest.fixture(scope="module")
def engine(config, tensors, mode):
    return make_engine(config, tensors, **mode)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(n_head=1, n_embd=20),
        dict(n_head=25, n_embd=400),
        dict(n_head=4, n_embd=64),
        dict(n_head=2, n_embd=256),
        dict(n_inner=100),
        dict(n_inner=7),
        dict(vocab_size=1),
        dict(vocab_size=16),
        dict(vocab_size=509),
        dict(block_size=32),
        dict(block_size=2048, n_layer=1),
        dict(activation="gelu"),
        dict(activation="relu"),
        dict(tie_word_embeddings=False),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
        dict(layer_norm_epsilon=1e-3),
        dict(n_head=3, n_embd=75),
    ],
    ids=str,
)
def test_logits_equal_the_float64_definition(changes):
    config = make_config(**changes)
    tensors = random_tensors(config)
    ids = random_ids(config, min(90, config.block_size))
    ours = make_engine(config, tensors).logits(ids)
    exact = oracle.forward(config, tensors, ids)
    assert np.abs(ours - exact).max() < 1e-5 * max(1, np.abs(exact).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_expanded_to_float32_compute_what_their_values_do(config, tensors, dtype):
    ids = random_ids(config, 40)
    ours = make_engine(config, tensors, dtype, precision="float32").logits(ids)
    assert np.array_equal(ours, make_engine(config, rounded(config, tensors, dtype)).logits(ids))


@pytest.mark.parametrize(
    ("mode", "tolerance"),
    [
        ("bfloat16", 3e-2),
        ("int8", 2e-2),
        ("int8-fast", 5e-2),
        ("int8, float32 cache", 2e-4),
        ("int8, int8 cache", 2e-2),
    ],
)
def test_every_mode_is_near_the_float64_values_of_its_weights(config, tensors, mode, tolerance):
    ids = random_ids(config, 200)
    ours = make_engine(config, tensors, **MODES[mode]).logits(ids)
    exact = oracle.forward(config, rounded(config, tensors, MODES[mode]["dtype"]), ids)
    assert np.sqrt(((ours - exact) ** 2).mean()) < tolerance * np.sqrt((exact**2).mean())


@EVERY_MODE
def test_every_isa_gives_the_same_logits(config, tensors, mode):
    ids = random_ids(config, 100)
    first, *others = [
        make_engine(config, tensors, isa=isa, **mode).logits(ids) for isa in _core.usable_isas()
    ]
    assert all(np.array_equal(first, other) for other in others)


@EVERY_MODE
@pytest.mark.parametrize("threads", [2, 3, 4])
def test_any_number_of_threads_gives_the_same_logits(config, tensors, mode, threads):
    ids = random_ids(config, 150)
    one = make_engine(config, tensors, threads=1, **mode).logits(ids)
    assert np.array_equal(make_engine(config, tensors, threads=threads, **mode).logits(ids), one)


@EVERY_MODE
def test_a_prefix_has_the_logits_it_has_within_the_whole(config, engine, mode):
    ids = random_ids(config, 200)
    whole = engine.logits(ids)
    for n in (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 130, 199):
        assert np.array_equal(engine.logits(ids[:n]), whole[:n])


@EVERY_MODE
def test_decoding_continues_the_logits_of_the_whole(config, engine, mode):
    """Greedy tokens found one by one are the arg-max of one prefill over all of them."""
    prompt = random_ids(config, 70)
    tokens = generate(engine, prompt, 100)
    logits = engine.logits(np.concatenate([prompt, tokens]))
    assert tokens == logits[69:-1].argmax(axis=1).tolist()


@EVERY_MODE
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_is_the_same_alone_and_in_a_ragged_batch(config, engine, mode, params):
    lengths = [1, 2, 17, 63, 64, 65, 130, 200, 5, 90]
    prompts = [random_ids(config, n, seed=n) for n in lengths]
    alone = [generate(engine, p, 40, **params) for p in prompts]
    for order in (range(10), reversed(range(10))):
        order = list(order)
        requests = [submit(engine, prompts[i], 40, **params) for i in order]
        assert run(engine, requests) == [alone[i] for i in order]


@EVERY_MODE
def test_a_request_is_the_same_when_others_join_and_leave(config, engine, mode):
    prompt = random_ids(config, 30)
    alone = generate(engine, prompt, 60, **SAMPLED)
    request = submit(engine, prompt, 60, **SAMPLED)
    others, tokens = [], []
    for step in range(1000):
        if step % 3 == 0:
            ids = random_ids(config, 20 + step % 100, seed=step)
            others.append(submit(engine, ids, 5))
        if step % 4 == 3:
            engine.release(others.pop(0))
        for owner, token, *_ in engine.advance([request, *others]):
            if owner == request:
                tokens.append(token)
        if len(tokens) == 60:
            break
    for other in [request, *others]:
        engine.release(other)
    assert tokens == alone


def test_every_block_returns_to_the_pool(config, tensors):
    engine = make_engine(config, tensors)
    free = engine.free_blocks
    for n in range(20):
        requests = [submit(engine, random_ids(config, 10 + i), 10) for i in range(8)]
        for _ in range(n % 5):
            engine.advance(requests)
        for request in requests:
            engine.release(request)
    assert engine.free_blocks == free


def test_more_requests_than_blocks_wait_for_their_turn(config, tensors):
    engine = make_engine(config, tensors, kv_cache_bytes=0)  # one context: 5 blocks
    prompts = [random_ids(config, 20 + i, seed=i) for i in range(12)]
    requests = [submit(engine, p, 60) for p in prompts]
    together = run(engine, requests)
    assert together == [generate(engine, p, 60) for p in prompts]
    assert engine.free_blocks == 5


def test_generation_ends_exactly_at_the_context(config, engine):
    tokens = generate(engine, random_ids(config, 310), 100)
    assert len(tokens) == 10


def test_end_tokens_stop_and_min_new_tokens_holds_them_back(config, engine):
    prompt = random_ids(config, 12)
    free = generate(engine, prompt, 30)
    end = free[10]
    stopped = generate(engine, prompt, 30, end_tokens=[end])
    assert stopped == free[: free.index(end)]
    held = generate(engine, prompt, 30, end_tokens=[end], min_new_tokens=30)
    assert len(held) == 30
    assert end not in held


def test_nan_weights_fail_only_with_the_reason_non_finite(config, tensors):
    broken = dict(tensors)
    broken["wte.weight"] = tensors["wte.weight"].copy()
    broken["wte.weight"][5] = np.nan
    engine = make_engine(config, broken)
    request = submit(engine, [1, 2, 3], 3)
    assert [event[:3] for event in engine.advance([request])] == [(request, -1, "non_finite")]


def test_the_core_refuses_ids_outside_the_vocabulary(config, engine):
    from gptx.errors import ParameterError

    for ids in ([-1], [config.vocab_size], [0, 2**31 - 1], []):
        with pytest.raises(ParameterError, match="ids"):
            engine.logits(np.array(ids, np.int32))
    with pytest.raises(ParameterError, match="ids"):
        engine.logits(np.zeros(config.block_size + 1, np.int32))


def test_a_missing_or_short_tensor_is_named(config, tensors):
    from gptx.errors import ParameterError

    packed = stored(config, tensors)
    for name in ("h.1.mlp.c_fc.weight", "ln_f.bias", "wpe.weight"):
        with pytest.raises(ParameterError, match=name):
            _core.Engine(
                config.to_dict(), "float32", {k: v for k, v in packed.items() if k != name}
            )
        with pytest.raises(ParameterError, match=name):
            _core.Engine(config.to_dict(), "float32", packed | {name: packed[name].ravel()[:-1]})


@pytest.mark.parametrize(
    ("dtype", "precision", "allowed"),
    [
        ("float32", "int8", "float32 for float32 weights"),
        ("bfloat16", "int8-fast", "bfloat16 or float32 for bfloat16 weights"),
        ("int8", "bfloat16", "int8, int8-fast or float32 for int8 weights"),
        ("int8", "int4", "one of float32, bfloat16, int8, int8-fast"),
    ],
)
def test_a_precision_that_the_weights_do_not_have_is_refused(
    config, tensors, dtype, precision, allowed
):
    from gptx.errors import ParameterError

    with pytest.raises(ParameterError, match=f"precision: .*{allowed}, got '{precision}'"):
        make_engine(config, tensors, dtype, precision=precision)
    with pytest.raises(ParameterError, match="kv_cache_dtype: .*got 'int4'"):
        make_engine(config, tensors, dtype, kv_cache_dtype="int4")
