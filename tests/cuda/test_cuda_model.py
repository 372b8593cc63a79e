"""The model on the CUDA backend: near the float64 definition, the same bits in any company."""

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
    submit,
)

MODES = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(dtype="int8"),
    "int8-fast": dict(dtype="int8", precision="int8-fast"),
    "int8, float32 cache": dict(dtype="int8", kv_cache_dtype="float32"),
    "int8, int8 cache": dict(dtype="int8", kv_cache_dtype="int8"),
    "float32, bfloat16 cache": dict(dtype="float32", kv_cache_dtype="bfloat16"),
    "float32 of bfloat16": dict(dtype="bfloat16", precision="float32"),
    "float32 of int8": dict(dtype="int8", precision="float32"),
}
# Root mean square of the error, as a share of that of the logits.
TOLERANCES = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 1e-2, "int8-fast": 2e-2}
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
    """bfloat16, unless a test asks for every mode."""
    return MODES["bfloat16"]


@pytest.fixture(scope="module")
def engine(config, tensors, mode, library):
    return on_cuda(library, config, tensors, **mode)


def on_cuda(library, config, tensors, kv_cache_bytes=8 << 20, **mode):
    options = dict(device="cuda", cuda_library=library, kv_cache_bytes=kv_cache_bytes)
    return make_engine(config, tensors, **options, **mode)


def relative_error(ours, exact):
    return np.sqrt(((ours - exact) ** 2).mean() / (exact**2).mean())


@EVERY_MODE
def test_logits_are_near_the_float64_values_of_the_weights(config, tensors, engine, mode):
    ids = random_ids(config, 200)
    exact = oracle.forward(config, rounded(config, tensors, mode["dtype"]), ids)
    precision = mode.get("precision", mode["dtype"])
    tolerance = TOLERANCES[precision]
    if mode.get("kv_cache_dtype") in ("bfloat16", "int8"):
        tolerance = max(tolerance, 1e-2)
    assert relative_error(engine.logits(ids), exact) < tolerance


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_head=1, n_embd=20),
        dict(n_head=25, n_embd=400, n_layer=1),
        dict(n_head=1, n_embd=272, n_layer=1),
        dict(n_head=2, n_embd=128),
        dict(n_inner=100),
        dict(n_inner=7),
        dict(n_inner=1100, n_layer=1),
        dict(vocab_size=1),
        dict(vocab_size=16),
        dict(vocab_size=509),
        dict(block_size=32),
        dict(activation="gelu"),
        dict(activation="relu"),
        dict(tie_word_embeddings=False),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True, n_layer=3),
        dict(n_head=3, n_embd=75),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_any_shape_is_computed(library, changes, dtype):
    config = make_config(**changes)
    tensors = random_tensors(config)
    ids = random_ids(config, min(70, config.block_size))
    ours = on_cuda(library, config, tensors, dtype=dtype).logits(ids)
    exact = oracle.forward(config, rounded(config, tensors, dtype), ids)
    assert relative_error(ours, exact) < TOLERANCES[dtype] * (5 if dtype != "float32" else 1)


@EVERY_MODE
def test_a_prefix_has_the_logits_it_has_within_the_whole(config, engine, mode):
    ids = random_ids(config, 200)
    whole = engine.logits(ids)
    for n in (1, 2, 7, 8, 9, 16, 17, 33, 63, 64, 65, 130):
        assert np.array_equal(engine.logits(ids[:n]), whole[:n])


@EVERY_MODE
def test_many_rows_have_the_states_of_few(config, engine, mode):
    """Logits are computed for 64 rows at a time, states for all."""
    ids = random_ids(config, 300)
    whole = engine.states(ids)
    for n in (1, 8, 9, 33, 64, 65, 130):
        assert np.array_equal(engine.states(ids[:n]), whole[:, :n])


@EVERY_MODE
def test_decoding_continues_the_logits_of_the_whole(config, engine, mode):
    """Greedy tokens found one by one are the arg-max of one prefill over all of them."""
    prompt = random_ids(config, 55)
    tokens = generate(engine, prompt, 30)
    logits = engine.logits(np.concatenate([prompt, tokens]))
    assert tokens == logits[54:-1].argmax(axis=1).tolist()


@EVERY_MODE
@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_a_request_is_the_same_alone_and_in_a_ragged_batch(config, engine, mode, params):
    lengths = [1, 2, 17, 63, 64, 65, 130, 200, 5, 90]
    prompts = [random_ids(config, n, seed=n) for n in lengths]
    alone = [generate(engine, p, 12, **params) for p in prompts]
    requests = [submit(engine, p, 12, **params) for p in prompts]
    assert run(engine, requests) == alone


def test_a_row_alone_is_the_row_among_64(config, engine):
    prompts = [random_ids(config, 3 + n % 5, seed=n) for n in range(64)]
    requests = [submit(engine, p, 10) for p in prompts]
    together = run(engine, requests)
    for i in (0, 1, 31, 63):
        assert generate(engine, prompts[i], 10) == together[i]


def test_a_request_is_the_same_when_others_join_and_leave(config, engine):
    prompt = random_ids(config, 30)
    alone = generate(engine, prompt, 40, **SAMPLED)
    request = submit(engine, prompt, 40, **SAMPLED)
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
        if len(tokens) == 40:
            break
    for other in [request, *others]:
        engine.release(other)
    assert tokens == alone


@EVERY_MODE
def test_three_runs_give_the_same_bits(config, tensors, library, mode, monkeypatch):
    ids = random_ids(config, 90)
    results = []
    for seed in ("1", "2", "3"):  # on the emulator: who runs when
        monkeypatch.setenv("GPTX_EMULATED_SEED", seed)
        engine = on_cuda(library, config, tensors, **mode)
        results.append((engine.logits(ids), generate(engine, ids[:20], 10, **SAMPLED)))
    for logits, tokens in results[1:]:
        assert np.array_equal(logits, results[0][0])
        assert tokens == results[0][1]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int8-fast"])
def test_warpgroups_multiply_to_the_bits_of_warps(library, dtype, monkeypatch):
    """Several chains, the last one cut off, and rows that end within a unit."""
    config = make_config(n_embd=272, n_inner=1100, n_head=2, n_layer=1, block_size=150)
    mode = dict(dtype=dtype.removesuffix("-fast"), precision=dtype)
    ids = random_ids(config, 150)
    by = {}
    for wanted in ("0", "1"):
        monkeypatch.setenv("GPTX_CUDA_WGMMA", wanted)
        engine = on_cuda(library, config, random_tensors(config), **mode)
        by[engine.isa.split()[1]] = [engine.states(ids[:n]) for n in (65, 72, 150)]
    if "wgmma" not in by:
        assert "emulated" not in library
        pytest.skip(f"{engine.isa}: no warpgroups, or they add up otherwise")
    for ours, expected in zip(by["wgmma"], by["mma"], strict=True):
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "int8"])
def test_sums_that_are_cut_off_as_on_hopper_keep_every_promise(
    emulated_library, config, tensors, monkeypatch, mode
):
    """Tensor cores do not round to nearest: the same errors are allowed, and the same bits."""
    monkeypatch.setenv("GPTX_EMULATED_TRUNCATES", "1")
    engine = on_cuda(emulated_library, config, tensors, **MODES[mode])
    assert engine.isa == ("sm_90 mma" if mode == "float32" else "sm_90 wgmma")
    ids = random_ids(config, 150)
    exact = oracle.forward(config, rounded(config, tensors, mode), ids)
    assert relative_error(engine.logits(ids), exact) < TOLERANCES[mode]
    whole = engine.states(ids)
    for n in (1, 9, 65):
        assert np.array_equal(engine.states(ids[:n]), whole[:, :n])


@pytest.mark.parametrize(
    ("name", "value", "multiplier"),
    [
        ("GPTX_EMULATED_SEED", "3", "sm_90 wgmma"),
        ("GPTX_EMULATED_BACKWARDS", "1", "sm_90 mma"),
        ("GPTX_EMULATED_CAPABILITY", "80", "sm_80 mma"),
        ("GPTX_EMULATED_CAPABILITY", "120", "sm_120 mma"),
        ("GPTX_CUDA_WGMMA", "0", "sm_90 mma"),
    ],
)
def test_warpgroups_multiply_only_where_they_add_up_like_warps(
    emulated_library, config, tensors, monkeypatch, name, value, multiplier
):
    monkeypatch.setenv(name, value)
    assert on_cuda(emulated_library, config, tensors, dtype="bfloat16").isa == multiplier


def test_a_wrong_choice_of_the_multiplier_is_named(emulated_library, config, tensors, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_WGMMA", "yes")
    with pytest.raises(ValueError, match="GPTX_CUDA_WGMMA: expected 0 or 1, got 'yes'"):
        on_cuda(emulated_library, config, tensors, dtype="bfloat16")


def test_integer_sums_are_those_of_the_cpu(config, tensors, library):
    """int8-fast differs from the CPU by float rounding outside the products alone."""
    mode = MODES["int8-fast"] | dict(kv_cache_dtype="float32")
    ids = random_ids(config, 100)
    cpu = make_engine(config, tensors, **mode).logits(ids)
    gpu = on_cuda(library, config, tensors, **mode).logits(ids)
    exact = oracle.forward(config, rounded(config, tensors, "int8"), ids)
    assert relative_error(gpu, cpu) < relative_error(cpu, exact)


def test_blocks_are_used_again_without_a_trace(config, tensors, library):
    """A small pool: later requests get the blocks of earlier ones, at other places."""
    engine = on_cuda(library, config, tensors, kv_cache_bytes=0, dtype="bfloat16")
    fresh = on_cuda(library, config, tensors, dtype="bfloat16")
    prompts = [random_ids(config, n, seed=n) for n in (200, 3, 120, 65, 10)]
    requests = [submit(engine, p, 8) for p in prompts]
    assert run(engine, requests) == [generate(fresh, p, 8) for p in prompts]


def test_weights_that_overflow_fail_their_request_alone(config, tensors, library):
    broken = dict(tensors)
    broken["wte.weight"] = tensors["wte.weight"].copy()
    broken["wte.weight"][5] = np.inf
    engine = on_cuda(library, config, broken, dtype="float32")
    ids = np.array([1, 2, 3], np.int32)
    request = submit(engine, ids, 4)
    events = engine.advance([request])
    engine.release(request)
    assert events[-1][2] == "non_finite"


def choice_of_the_cpu(logits, params, sequence, banned):
    """What its sampler takes from logits for the token behind the sequence."""
    params = {k: v for k, v in params.items() if k not in ("min_new_tokens", "end_tokens")}
    position = len(sequence)
    choices = _core.testing.sample(
        logits, params, sequence=sequence, banned=banned, first_position=position
    )
    return [token for token, _, _ in choices]


PARAMETERS = [
    {},
    dict(temperature=0.0),
    dict(temperature=0.5),
    dict(temperature=3.0),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.7),
    dict(top_p=0.05),
    dict(min_p=0.2),
    dict(repetition_penalty=1.8),
    dict(temperature=0.0, repetition_penalty=3.0),
    dict(temperature=0.8, top_k=12, top_p=0.9),
    dict(temperature=0.8, top_k=12, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
    dict(min_new_tokens=3, end_tokens=list(range(0, 200, 2))),
]


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_the_device_chooses_as_the_cpu_does_from_the_same_logits(library, params):
    config = make_config(vocab_size=700, n_layer=1, block_size=64)
    engine = on_cuda(library, config, random_tensors(config, std=0.4), dtype="float32")
    params = dict(temperature=1.0) | params
    for seed in range(25):
        ids = random_ids(config, 8, seed=seed)
        params |= dict(seed=seed)
        logits = engine.logits(ids)[-1]
        expected = choice_of_the_cpu(logits, params, ids.tolist(), params.get("end_tokens", []))
        assert generate(engine, ids, 1, **params) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_ban_of_everything_leaves_the_first_token(library, temperature):
    config = make_config(vocab_size=50, n_layer=1, block_size=64)
    everything = dict(min_new_tokens=2, end_tokens=list(range(50)), temperature=temperature)
    for engine in (
        on_cuda(library, config, random_tensors(config), dtype="float32"),
        make_engine(config, random_tensors(config)),
    ):
        request = submit(engine, random_ids(config, 4), 4, **everything)
        assert [event[1:3] for event in engine.advance([request])] == [(-1, "stop")]
        engine.release(request)


def test_equal_logits_are_kept_and_chosen_in_the_order_of_their_ids(library):
    """Weights of a single bit make many ties, which top-p has to cut."""
    config = make_config(vocab_size=300, n_layer=1, block_size=64)
    tensors = random_tensors(config)
    tensors["wte.weight"] = np.sign(tensors["wte.weight"]).astype(np.float32)
    tensors["wte.weight"][:, 2:] = 0.5
    engine = on_cuda(library, config, tensors, dtype="float32")
    for seed in range(40):
        ids = random_ids(config, 4, seed=seed)
        params = dict(temperature=1.0, top_p=0.1 + seed % 8 * 0.1, seed=seed)
        expected = choice_of_the_cpu(engine.logits(ids)[-1], params, ids.tolist(), [])
        assert generate(engine, ids, 1, **params) == expected
