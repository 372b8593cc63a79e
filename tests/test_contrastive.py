"""Contrastive search: the tokens of the twin, alone and in any company."""

import numpy as np
import pytest

import gptx
from models import make_config, random_ids, random_tensors, write_model
from search_twin import contrastive, log_softmax

OPTIONS = dict(penalty_alpha=0.6, top_k=4)


@pytest.fixture(scope="module", params=[0, 1], ids=lambda seed: f"seed {seed}")
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    config = make_config(vocab_size=257)
    write_model(path, random_tensors(config, seed=request.param, std=0.3))
    return gptx.load(path, threads=1)


@pytest.mark.parametrize(
    "case",
    [
        dict(penalty_alpha=0.6, top_k=4),
        dict(penalty_alpha=0.3, top_k=8, repetition_penalty=1.3, presence_penalty=0.3),
        dict(penalty_alpha=0.9, top_k=5, no_repeat_ngram_size=2, min_new_tokens=4),
        dict(penalty_alpha=1.0, top_k=3, logit_bias={4: 2.0}, bad_words=[[125], [80, 138]]),
        dict(penalty_alpha=0.5, top_k=6, forced_tokens=[65, 66], forced_eos_token_id=256),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_twin(model, case):
    params = gptx.SamplingParams(max_new_tokens=12, stop_token_ids=[7, 91], **case)
    prompts = [random_ids(model.config, 3 + i, seed=i) for i in range(6)]
    results = model.generate(prompts, params)
    for prompt, result in zip(prompts, results, strict=True):
        expected = contrastive(
            lambda ids: model.logits(ids)[-1],
            lambda ids: hidden(model, ids),
            prompt,
            params,
            [256, 7, 91],
        )
        assert list(result.token_ids) == expected


def hidden(model, ids):
    with model.branch(ids, logits=len(ids), hidden=True) as branch:
        return branch.hidden


def test_it_is_deterministic_alone_and_in_a_list(model):
    prompts = ["a", "of any", "different length", "x" * 80]
    params = gptx.SamplingParams(max_new_tokens=20, seed=1, **OPTIONS)
    assert model.generate(prompts, params) == [model.generate(p, params) for p in prompts]
    assert model._engine.stats()["requests"] == 0


def test_the_candidates_of_a_token_are_one_step(model):
    steps = model._engine.stats()["steps"]
    model.generate("Once", max_new_tokens=10, ignore_eos=True, **OPTIONS)
    assert model._engine.stats()["steps"] - steps == 11


def test_it_streams_stops_and_reports_log_probabilities(model):
    options = dict(max_new_tokens=25, ignore_eos=True, seed=1) | OPTIONS
    free = model.generate("Once", logprobs=3, **options)
    stream = model.stream("Once", logprobs=3, **options)
    assert "".join(stream) == stream.result.text == free.text
    assert stream.result == free
    rows = model.logits([*b"Once", *free.token_ids[:-1]])[3:]
    for row, entry in zip(rows, free.logprobs, strict=True):
        assert entry.logprob == pytest.approx(log_softmax(row)[entry.token_id], abs=1e-5)
        assert len(entry.top) == 3
    stop = free.text[10:12]
    result = model.generate("Once", stop=stop, **options)
    assert result.text == free.text[: free.text.index(stop)]
    assert result.finish_reason == "stop"


def test_time_the_context_and_the_caller_end_it(model):
    assert model.generate("Once", max_time=0.0, **OPTIONS).finish_reason == "time"
    full = model.generate("x" * 90, ignore_eos=True, **OPTIONS)
    assert full.finish_reason == "length"
    assert full.prompt_tokens + full.completion_tokens == model.config.block_size
    stream = model.stream("Once", ignore_eos=True, **OPTIONS)
    next(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    nothing = model.generate("Once", suppress_tokens=range(257), **OPTIONS)
    assert (nothing.text, nothing.finish_reason) == ("", "stop")
    assert model._engine.stats()["requests"] == 0


def test_processors_see_logits(model):
    def only_letters(ids, logits):
        logits[:97] = logits[123:] = -np.inf
        return logits

    result = model.generate("Once", max_new_tokens=8, logits_processors=[only_letters], **OPTIONS)
    others = [i for i in range(257) if not 97 <= i < 123]
    same = model.generate("Once", max_new_tokens=8, suppress_tokens=others, **OPTIONS)
    assert result.token_ids == same.token_ids
    assert result.text.isalpha()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(top_k=1), "top_k: expected an integer from 2 to 64 with penalty_alpha above 0"),
        (dict(top_k=0), "top_k"),
        (dict(n=2), "n: expected 1 with penalty_alpha above 0"),
        (dict(best_of=2), "best_of: expected None with penalty_alpha above 0"),
        (dict(context="slide"), 'context: expected "stop"'),
        (dict(penalty_alpha=1.5), "penalty_alpha"),
    ],
)
def test_a_wrong_call_names_the_parameter(model, changes, match):
    with pytest.raises(gptx.ParameterError, match=match):
        model.generate("Once", **(OPTIONS | changes))


def test_it_matches_the_guide(model):
    pytest.importorskip("llguidance")
    for ends in (dict(ignore_eos=True), {}):
        result = model.generate("Once", guide=gptx.guided.regex("[0-9]{2,4}"), **OPTIONS, **ends)
        assert result.text.isdigit()
        assert 2 <= len(result.text) <= 4
        assert result.finish_reason == "stop"


def test_it_goes_on_after_an_interrupted_processor(model):
    def interrupted(ids, logits):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return logits

    calls = []
    options = dict(max_new_tokens=8, ignore_eos=True) | OPTIONS
    stream = model.stream("Once", logits_processors=[interrupted], **options)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    list(stream)
    assert stream.result.token_ids == model.generate("Once", **options).token_ids
