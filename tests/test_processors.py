"""Logits processors: functions in Python that see every token before it is chosen."""

import numpy as np
import pytest

import gptx
from models import write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    write_model(path)
    return gptx.load(path)


def nothing(ids, logits):
    return logits


def adding(bias):
    def processor(ids, logits):
        for token, value in bias.items():
            logits[token] += value
        return logits

    return processor


def banning(tokens):
    return adding(dict.fromkeys(tokens, -np.inf))


def failing_after(count, error):
    seen = []

    def processor(ids, logits):
        seen.append(len(ids))
        if len(seen) > count:
            raise error
        return logits

    return processor


OPTIONS = [
    dict(temperature=0),
    dict(seed=3),
    dict(seed=3, ignore_eos=True, min_new_tokens=5, logprobs=4),
    dict(seed=4, repetition_penalty=1.4, presence_penalty=0.5, no_repeat_ngram_size=3),
    dict(seed=5, temperature=1.5, top_k=0, top_p=1.0, min_p=0.02, stop=["e", "zz"]),
    dict(seed=6, max_new_tokens=200, context="slide"),
    dict(seed=7, forced_tokens=[65, 66], forced_eos_token_id=256, max_new_tokens=9),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_processor_that_changes_nothing_changes_nothing(model, options):
    plain = model.generate("Once", **options)
    steered = model.generate("Once", logits_processors=[nothing], **options)
    assert steered.token_ids == plain.token_ids
    assert steered.text == plain.text
    assert steered.finish_reason == plain.finish_reason
    if options.get("logprobs"):
        for ours, theirs in zip(steered.logprobs, plain.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
            assert [i for i, _ in ours.top] == [i for i, _ in theirs.top]
            assert np.allclose([p for _, p in ours.top], [p for _, p in theirs.top], atol=1e-5)


BIAS = {101: 2.5, 32: -3.0, 120: -np.inf, 256: -np.inf}


@pytest.mark.parametrize("seed", range(5))
def test_a_processor_that_adds_a_bias_is_logit_bias(model, seed):
    options = dict(seed=seed, max_new_tokens=60, logprobs=2)
    biased = model.generate("Once", logit_bias=BIAS, **options)
    steered = model.generate("Once", logits_processors=[adding(BIAS)], **options)
    assert steered.token_ids == biased.token_ids
    assert 120 not in steered.token_ids
    # The log-probabilities are the model's, before the bias.
    for ours, theirs in zip(steered.logprobs, biased.logprobs, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_a_banned_token_never_comes(model):
    odd = list(range(1, 257, 2))
    for seed in range(10):
        result = model.generate(
            "Once", logits_processors=[banning(odd)], seed=seed, ignore_eos=True, max_new_tokens=40
        )
        assert all(token % 2 == 0 for token in result.token_ids)
    only = model.generate(
        "Once", logits_processors=[banning([i for i in range(257) if i != 65])], max_new_tokens=8
    )
    assert only.text == "A" * 8


def test_processors_see_the_ids_and_each_other_in_order(model):
    seen = []

    def first(ids, logits):
        assert ids.dtype == np.int32
        assert logits.dtype == np.float32
        assert logits.shape == (257,)
        seen.append(ids.tolist())
        return logits * 2

    def second(ids, logits):
        assert np.array_equal(logits, 2 * model.logits(ids)[-1])
        return logits.astype(np.float64) / 2

    options = dict(seed=2, max_new_tokens=12, ignore_eos=True)
    result = model.generate("Once", logits_processors=[first, second], **options)
    assert result.token_ids == model.generate("Once", **options).token_ids
    whole = [*b"Once", *result.token_ids]
    assert seen == [whole[: 4 + i] for i in range(12)]


def test_processors_work_in_batches_samples_and_streams(model):
    options = dict(seed=2, max_new_tokens=25, logits_processors=[adding(BIAS)])
    alone = [model.generate(p, **options) for p in ("Once", "x" * 70, "upon a time")]
    batch = model.generate(["Once", "x" * 70, "upon a time"], **options)
    assert [r.token_ids for r in batch] == [r.token_ids for r in alone]
    stream = model.stream("Once", **options)
    assert "".join(stream) == alone[0].text
    several = model.generate("Once", n=4, **options)
    plain = model.generate("Once", n=4, seed=2, max_new_tokens=25, logit_bias=BIAS)
    assert [c.token_ids for c in several.choices] == [c.token_ids for c in plain.choices]
    best = model.generate("Once", n=2, best_of=5, **options)
    plain = model.generate("Once", n=2, best_of=5, seed=2, max_new_tokens=25, logit_bias=BIAS)
    assert [c.token_ids for c in best.choices] == [c.token_ids for c in plain.choices]
    assert best.score == pytest.approx(plain.score, abs=1e-5)


def test_a_stream_with_processors_can_be_left_and_runs_out_of_time(model):
    free = model._engine.free_blocks
    stream = model.stream("Once", logits_processors=[nothing], ignore_eos=True)
    next(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    late = model.generate("Once", logits_processors=[nothing], max_time=0)
    assert (late.finish_reason, late.token_ids) == ("time", ())
    assert model._engine.free_blocks == free


def test_an_exception_of_a_processor_comes_out_as_it_is(model):
    free = model._engine.free_blocks
    error = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        model.generate("Once", logits_processors=[failing_after(3, error)], ignore_eos=True)
    assert raised.value is error
    stream = model.stream("Once", logits_processors=[failing_after(3, error)], ignore_eos=True)
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert stream.result.completion_tokens == 3
    assert stream.result.finish_reason == "error"
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(model.stream("Once", logits_processors=[failing_after(0, StopIteration())]))
    with pytest.raises(KeyboardInterrupt):
        model.generate("Once", logits_processors=[failing_after(2, KeyboardInterrupt())])
    assert model._engine.free_blocks == free


def test_an_exception_ends_its_request_and_no_other(model):
    def long_prompts_fail(ids, logits):
        if len(ids) == 75:
            raise ValueError("too long for me")
        return logits

    free = model._engine.free_blocks
    options = dict(seed=1, max_new_tokens=15, ignore_eos=True)
    prompts = ["Once", "x" * 70, "upon"]
    results = model.generate(prompts, logits_processors=[long_prompts_fail], **options)
    assert isinstance(results[1].error, ValueError)
    assert results[1].finish_reason == "error"
    assert results[1].completion_tokens == 5
    plain = model.generate(prompts, **options)
    assert results[0].token_ids == plain[0].token_ids
    assert results[2].token_ids == plain[2].token_ids
    assert model._engine.free_blocks == free


def test_a_stream_goes_on_behind_a_ctrl_c_in_a_processor(model):
    seen = []

    def interrupted_once(ids, logits):
        seen.append(len(ids))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return logits

    options = dict(seed=1, max_new_tokens=8, ignore_eos=True)
    stream = model.stream("Once", logits_processors=[interrupted_once], **options)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    list(stream)
    assert stream.result.token_ids == model.generate("Once", **options).token_ids


WRONG_RESULTS = [
    (lambda ids, logits: None, "float32 array .257. as its result, got 'NoneType'"),
    (lambda ids, logits: logits[:-1], r"got 'float32 \[256\]'"),
    (lambda ids, logits: logits[None], r"got 'float32 \[1, 257\]'"),
    (lambda ids, logits: logits.tolist(), "got 'list'"),
    (lambda ids, logits: logits.astype(np.int32), r"got 'int32 \[257\]'"),
    (lambda ids, logits: logits + np.where(ids[-1] > 0, np.nan, 0), "finite.*got nan"),
    (lambda ids, logits: logits + np.inf, "finite.*got inf"),
    (lambda ids, logits: logits - np.inf, "finite.*got -inf"),
    (lambda ids, logits: logits.astype(np.float64) * 1e300, "finite.*got inf"),
]


@pytest.mark.parametrize(("processor", "match"), WRONG_RESULTS, ids=lambda v: str(v)[:30])
def test_a_wrong_result_names_the_processor_and_ends_that_request(model, processor, match):
    free = model._engine.free_blocks
    with pytest.raises(gptx.ParameterError, match=rf"logits_processors\[1\].*{match}"):
        model.generate("Once", logits_processors=[nothing, processor])
    only_for_x = [lambda ids, logits: processor(ids, logits) if ids[0] == 120 else logits]
    good, bad = model.generate(["Once", "x"], logits_processors=only_for_x, seed=1)
    assert good == model.generate("Once", seed=1)
    assert isinstance(bad.error, gptx.ParameterError)
    assert model._engine.free_blocks == free


def test_an_array_that_a_processor_keeps_is_not_written_to(model):
    kept = np.zeros(257, np.float32)
    kept[:200] = -np.inf
    before = kept.copy()
    model.generate("Once", logits_processors=[lambda ids, logits: kept], max_new_tokens=5)
    assert np.array_equal(kept, before)

    def writes(ids, logits):
        ids[0] = 1
        return logits

    with pytest.raises(ValueError, match="read-only"):
        model.generate("Once", logits_processors=[writes])


@pytest.mark.parametrize("value", [nothing, [3], ["x"], 7], ids=str)
def test_what_is_no_processor_is_refused(value):
    with pytest.raises(gptx.ParameterError, match="logits_processors: expected a sequence of func"):
        gptx.SamplingParams(logits_processors=value)


def test_damaged_weights_are_reported_as_such(tmp_path):
    from models import make_config, random_tensors

    tensors = random_tensors(make_config(vocab_size=257))
    tensors["wpe.weight"][6] = 3e38
    write_model(tmp_path / "huge.gptx", tensors)
    model = gptx.load(tmp_path / "huge.gptx")
    with pytest.raises(gptx.NonFiniteLogitsError, match="position 8"):
        model.generate("12345678", logits_processors=[nothing])
