"""Beam search: the tokens and scores of transformers, alone and in any company."""

import numpy as np
import pytest

import gptx
from gptx import jobs, requests
from models import (
    as_transformers,
    make_config,
    make_engine,
    random_ids,
    random_tensors,
    write_model,
)
from search_twin import best, group_beams, log_softmax, processed

ENDS = [256, 7, 91]
CASES = {
    "plain": {},
    **{f"{n} beams": dict(num_beams=n) for n in (2, 3, 5)},
    **{f"length penalty {p}": dict(length_penalty=p) for p in (-1.0, 0.0, 0.5, 2.0)},
    "early": dict(early_stopping=True),
    "early, several": dict(early_stopping=True, n=4),
    "never early": dict(early_stopping="never", length_penalty=1.0),
    "never early, no penalty": dict(early_stopping="never", length_penalty=0.0),
    "never early, negative penalty": dict(early_stopping="never", length_penalty=-1.0),
    "several": dict(n=4),
    "some of several": dict(n=2, num_beams=5),
    "no end": dict(ignore_eos=True, stop_token_ids=()),
    "one end": dict(stop_token_ids=()),
    "one token": dict(max_new_tokens=1, n=4),
    "repetition penalty": dict(repetition_penalty=1.3),
    "no repeated n-gram": dict(no_repeat_ngram_size=2),
    "bad words": dict(bad_words=[[10], [20, 30], [65], [66], [67, 68, 69]]),
    "bias": dict(logit_bias={5: 2.0, 9: -4.0, 100: 1.5}),
    "suppressed": dict(suppress_tokens=list(range(20, 120))),
    "at least": dict(min_new_tokens=9),
    "forced end": dict(forced_eos_token_id=256, n=3),
    "much": dict(
        num_beams=5,
        n=5,
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        min_new_tokens=4,
        early_stopping="never",
        length_penalty=2.0,
        logit_bias={40: 3.0},
    ),
}


@pytest.fixture(scope="module", params=[0, 1, 2], ids=lambda seed: f"seed {seed}")
def pair(request, tmp_path_factory):
    """The same random weights here and in transformers."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share out
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    config = make_config(vocab_size=257)
    tensors = random_tensors(config, seed=request.param, std=0.3)
    tensors["wte.weight"][ENDS] *= 1.5  # so that texts end now and then
    write_model(path, tensors)
    yield gptx.load(path, threads=1), as_transformers(config, tensors)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    tensors = random_tensors(make_config(vocab_size=257), seed=3, std=0.3)
    write_model(path, tensors)
    return gptx.load(path, threads=1)


def prompts(config, count=20):
    """Of two lengths, so that transformers can take ten at once without padding."""
    return [random_ids(config, 3 if i < count // 2 else 9, seed=i) for i in range(count)]


def in_transformers(theirs, prompts, params):
    """For each prompt of a length the (token ids, score) of its texts, the end token left out."""
    import torch

    ids = np.stack(prompts)
    names = (
        "num_beams",
        "length_penalty",
        "early_stopping",
        "max_new_tokens",
        "min_new_tokens",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "forced_eos_token_id",
    )
    options = {name: getattr(params, name) for name in names}
    ends = sorted({*params.stop_token_ids, *([] if params.ignore_eos else [256])})
    options |= dict(eos_token_id=ends or None, pad_token_id=0)
    if params.logit_bias:
        options["sequence_bias"] = {(i,): b for i, b in params.logit_bias.items()}
    if params.bad_words:
        options["bad_words_ids"] = list(params.bad_words)
    if params.suppress_tokens:
        options["suppress_tokens"] = list(params.suppress_tokens)
    with torch.no_grad():
        out = theirs.generate(
            torch.tensor(ids.astype(np.int64)),
            attention_mask=torch.ones(ids.shape, dtype=torch.int64),
            do_sample=False,
            num_return_sequences=params.n,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    texts = []
    for row, indices, score in zip(
        out.sequences, out.beam_indices, out.sequences_scores, strict=True
    ):
        generated = row[ids.shape[1] :][: int((indices >= 0).sum())].tolist()
        while generated and generated[-1] in ends:
            generated.pop()
        texts.append((generated, float(score)))
    return [texts[i : i + params.n] for i in range(0, len(texts), params.n)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_tokens_and_scores_are_those_of_transformers(pair, case):
    ours, theirs = pair
    params = gptx.SamplingParams(
        **(dict(num_beams=4, max_new_tokens=14, stop_token_ids=ENDS[1:]) | case)
    )
    ids = prompts(ours.config)
    theirs = in_transformers(theirs, ids[:10], params) + in_transformers(theirs, ids[10:], params)
    for result, expected in zip(ours.generate(ids, params), theirs, strict=True):
        assert [list(r.token_ids) for r in result.choices] == [t for t, _ in expected]
        scores = [r.score for r in result.choices]
        assert scores == pytest.approx([s for _, s in expected], rel=2e-5, abs=2e-5)


@pytest.mark.parametrize(
    "case",
    [
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, n=4),
        dict(num_beams=6, num_beam_groups=3, diversity_penalty=0.5, n=6, length_penalty=0.0),
        dict(num_beams=4, num_beam_groups=4, diversity_penalty=2.0, n=4, early_stopping=True),
        dict(num_beams=4, num_beam_groups=2, early_stopping="never", repetition_penalty=1.2, n=2),
    ],
    ids=str,
)
def test_groups_of_beams_are_those_of_the_twin(model, case):
    params = gptx.SamplingParams(max_new_tokens=10, stop_token_ids=[7, 91], **case)
    for prompt in prompts(model.config, 5):
        result = model.generate(prompt, params)
        twin = group_beams(lambda ids: model.logits(ids)[-1], prompt, params, [256, 7, 91])
        assert [list(r.token_ids) for r in result.choices] == [tokens for _, tokens in twin]
        assert [r.score for r in result.choices] == pytest.approx([s for s, _ in twin], abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_the_core_names_the_candidates_of_the_twin(model, seed):
    rng = np.random.default_rng(seed)
    params = gptx.SamplingParams(
        logit_bias={int(i): float(rng.normal()) for i in rng.integers(0, 257, 5)},
        repetition_penalty=float(rng.uniform(0.7, 1.5)),
        presence_penalty=0.5,
        frequency_penalty=-0.3,
        no_repeat_ngram_size=int(rng.integers(0, 3)),
        bad_words=[[1, 2], [3], [5, 6, 7]],
        suppress_tokens=rng.integers(0, 257, 9).tolist(),
        min_new_tokens=int(rng.integers(0, 9)),
    )
    engine, ids = model._engine, rng.integers(0, 9, 12).astype(np.int32)
    fields = requests.fields(model, params, 0)
    request = engine.submit(ids, held=True, **fields)
    engine.advance([request])
    engine.feed(request, ids[:7])
    engine.advance([request])
    text = [*ids, *ids[:7]]
    bias = [(4, -1.5), (8, 0.25)]
    logits = engine.held_logits(request)[0]
    for given in (None, logits):
        start = log_softmax(logits) if given is None else given
        scores = processed(start, text, len(ids), params, fields["end_tokens"], bias)
        found, best_scores, logprobs, _, total = engine.candidates(
            request, 20, scores=given, bias=bias
        )
        assert found.tolist() == best(scores, 20)
        assert best_scores == pytest.approx(scores[found], abs=2e-5)
        assert logprobs == pytest.approx(log_softmax(logits)[found], abs=2e-5)
        if given is not None:
            finite = scores[scores > -np.inf]
            assert total == pytest.approx(np.log(np.exp(finite).sum()), abs=1e-5)
    mask = np.zeros(288, bool)
    mask[[10, 20, 256]] = True
    words = np.packbits(mask, bitorder="little").view(np.uint32).tolist()
    found = engine.candidates(request, 20, allowed=words)[0]
    assert set(found.tolist()) <= {10, 20, 256}
    engine.release(request)


JOBS = [
    dict(num_beams=4, n=3, max_new_tokens=40, early_stopping="never", repetition_penalty=1.1),
    dict(num_beams=6, num_beam_groups=3, diversity_penalty=1.0, n=6, max_new_tokens=30),
    dict(penalty_alpha=0.6, top_k=5, max_new_tokens=30),
    dict(num_beams=2, max_new_tokens=70, ignore_eos=True, logprobs=2),
    dict(temperature=0.9, n=2, max_new_tokens=30),
]


def drive(model, tasks):
    """The results of different jobs in one engine."""
    started = [jobs.start(model._task(p, gptx.SamplingParams(**params))) for p, params in tasks]
    while running := [job for job in started if not job.finished]:
        jobs.step(model._engine, running)
    for job in started:
        job.close()
    return [
        [
            (c.token_ids, c.text, c.finish_reason, c.score, c.logprobs)
            for c in job.generation().choices
        ]
        for job in started
    ]


def test_company_little_memory_and_preemption_change_nothing(tmp_path):
    config = make_config(vocab_size=257, block_size=192)
    tensors = random_tensors(config, std=0.3)
    write_model(tmp_path / "m.gptx", tensors, block_size=192)
    model = gptx.load(tmp_path / "m.gptx", threads=1, prefix_cache_bytes=0)
    tasks = [
        (random_ids(config, 5 + 23 * i, seed=i), job | dict(stop_token_ids=[7, 91], seed=5))
        for i, job in enumerate(JOBS)
    ]
    alone = [drive(model, [task])[0] for task in tasks]
    assert drive(model, tasks) == alone
    assert model._engine.stats()["requests"] == 0
    model._engine = make_engine(config, tensors, kv_cache_bytes=0, poison=True, threads=1)
    assert model._engine.stats()["blocks"] == 3
    assert [drive(model, [task])[0] for task in tasks] == alone
    assert drive(model, tasks) == alone
    stats = model._engine.stats()
    assert stats["preemptions"] > 0
    assert (stats["requests"], stats["free_blocks"]) == (0, 3)


def test_a_list_gives_each_prompt_what_it_gets_alone(model):
    texts = ["prompts", "of any", "different length", "x" * 60]
    params = gptx.SamplingParams(num_beams=3, n=2, max_new_tokens=15, seed=1)
    assert model.generate(texts, params) == [model.generate(text, params) for text in texts]


def test_all_beams_of_all_prompts_are_one_step_of_the_engine(model):
    steps = model._engine.stats()["steps"]
    model.generate(["abc", "xyz"], num_beams=5, max_new_tokens=10, ignore_eos=True)
    assert model._engine.stats()["steps"] - steps == 10


@pytest.mark.parametrize("changes", [{}, dict(num_beam_groups=2, diversity_penalty=0.5)], ids=str)
def test_pieces_of_a_stream_are_never_taken_back(model, changes):
    options = dict(num_beams=4, max_new_tokens=30, stop_token_ids=[7, 91], seed=1) | changes
    for prompt in prompts(model.config, 8):
        stream = model.stream(prompt, **options)
        pieces = list(stream)
        assert "".join(pieces) == stream.result.text
        assert stream.result == model.generate(prompt, **options)


def test_the_steps_of_a_search_say_what_each_beam_continues(model):
    options = dict(num_beams=4, n=4, max_new_tokens=20, stop_token_ids=[7, 91], seed=1)
    for prompt in prompts(model.config, 4):
        stream = model.beams(prompt, **options)
        before = [("", 0.0, 0)]
        for number, (step, beams, finished) in enumerate(stream, 1):
            assert step == number
            assert len(beams) in (0, 4)
            for text, _, parent in beams:
                assert text.startswith(before[parent][0])
            assert [s for _, s in finished] == sorted((s for _, s in finished), reverse=True)
            before = beams
        assert beams == ()
        assert stream.result == model.generate(prompt, **options)
        assert finished == tuple((r.text, r.score) for r in stream.result.choices)


def test_leaving_the_steps_gives_the_memory_back(model):
    free = model._engine.free_blocks
    for _ in model.beams("The princess", num_beams=3):
        assert model._engine.free_blocks < free
        break
    assert model._engine.free_blocks == free
    stream = model.beams("The princess", num_beams=3, max_new_tokens=50, ignore_eos=True)
    next(stream)
    next(stream)
    stream.close()
    assert model._engine.free_blocks == free
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.completion_tokens == 2
    stream = model.stream("The princess", num_beams=3, ignore_eos=True)
    next(stream, None)
    stream.close()
    assert model._engine.stats()["requests"] == 0


def test_a_text_ends_where_a_stop_string_is_complete(model):
    options = dict(num_beams=3, n=3, max_new_tokens=25, ignore_eos=True)
    free = model.generate("Once", **options)
    stop = free.text[8:10]
    result = model.generate("Once", stop=stop, **options)
    assert any(choice.finish_reason == "stop" for choice in result.choices)
    for choice in result.choices:
        assert stop not in choice.text
        if choice.finish_reason == "stop":
            assert (choice.text + stop).startswith(choice.text)
            assert stop in model.tokenizer.decode(choice.token_ids)


def test_log_probabilities_are_the_model_s_own(model):
    result = model.generate(
        "Once", num_beams=3, n=3, max_new_tokens=12, ignore_eos=True, logprobs=2, length_penalty=2.0
    )
    for choice in result.choices:
        assert [t.token_id for t in choice.logprobs] == list(choice.token_ids)
        ids = [*b"Once", *choice.token_ids]
        rows = model.logits(ids[:-1])[3:]
        for row, entry in zip(rows, choice.logprobs, strict=True):
            expected = log_softmax(row)
            assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-5)
            assert [i for i, _ in entry.top] == best(expected, 2)
        total = sum(t.logprob for t in choice.logprobs)
        assert choice.score == pytest.approx(total / 12**2, abs=1e-5)


def test_processors_see_log_probabilities(model):
    seen = []

    def only_letters(ids, scores):
        seen.append((ids, float(np.exp(scores.astype(np.float64)).sum())))
        scores[:97] = scores[123:] = -np.inf
        return scores

    result = model.generate(
        "Once", num_beams=3, n=3, max_new_tokens=8, logits_processors=[only_letters]
    )
    assert all(choice.text.isalpha() for choice in result.choices)
    assert all(total == pytest.approx(1, abs=1e-4) for _, total in seen)
    others = [i for i in range(257) if not 97 <= i < 123]
    same = model.generate("Once", num_beams=3, n=3, max_new_tokens=8, suppress_tokens=others)
    assert [c.token_ids for c in same.choices] == [c.token_ids for c in result.choices]


def test_what_is_forced_comes_and_where_nothing_may_follow_the_text_ends(model):
    result = model.generate("Once", num_beams=3, n=2, max_new_tokens=6, forced_tokens=[65, 66])
    assert all(choice.token_ids[:2] == (65, 66) for choice in result.choices)
    nothing = model.generate("Once", num_beams=3, suppress_tokens=range(257))
    assert (nothing.text, nothing.finish_reason) == ("", "stop")
    one = model.generate("Once", num_beams=3, suppress_tokens=range(1, 257), max_new_tokens=3)
    assert one.token_ids == (0, 0, 0)


def test_time_and_the_context_end_a_search(model):
    late = model.generate("Once", num_beams=3, n=3, max_time=0.0)
    assert late.finish_reason == "time"
    assert late.token_ids == ()
    full = model.generate("x" * 90, num_beams=3, ignore_eos=True, n=3)
    assert full.finish_reason == "length"
    assert full.prompt_tokens + full.completion_tokens == model.config.block_size
    assert model._engine.stats()["requests"] == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(context="slide"), 'context: expected "stop" with num_beams above 1'),
        (dict(n=4), "n: expected at most num_beams = 3"),
        (dict(best_of=3), "best_of: expected None with num_beams above 1"),
        (dict(num_beam_groups=2), "num_beam_groups: expected a divisor of num_beams = 3"),
        (dict(num_beams=65), "num_beams: expected an integer from 1 to 64"),
        (dict(num_beams=1), "num_beams: expected at least 2"),
        (dict(penalty_alpha=0.5), "penalty_alpha: expected 0 with num_beams above 1"),
        (dict(early_stopping="soon"), "early_stopping: expected True, False or"),
    ],
)
def test_a_search_names_the_parameter_that_is_wrong(model, changes, match):
    with pytest.raises(gptx.ParameterError, match=match):
        model.beams("Once", **(dict(num_beams=3) | changes))
    assert model._engine.stats()["requests"] == 0


def test_logits_that_overflow_fail_alone(tmp_path):
    config = make_config(vocab_size=257)
    tensors = random_tensors(config)
    tensors["wpe.weight"][6] = 3e38  # overflows, for the longer prompt only
    write_model(tmp_path / "huge.gptx", tensors)
    model = gptx.load(tmp_path / "huge.gptx")
    options = dict(max_new_tokens=3, num_beams=3, ignore_eos=True)
    with pytest.raises(gptx.NonFiniteLogitsError, match="position 8"):
        model.generate("12345678", **options)
    with pytest.raises(gptx.NonFiniteLogitsError, match="position 8"):
        list(model.beams("12345678", **options))
    long, short = model.generate(["12345678", "12"], **options)
    assert isinstance(long.error, gptx.NonFiniteLogitsError)
    assert long.finish_reason == "error"
    assert (short.error, short.completion_tokens) == (None, 3)


@pytest.mark.parametrize("changes", [{}, dict(num_beam_groups=3, diversity_penalty=2.0)], ids=str)
def test_every_beam_matches_the_guide(model, changes):
    pytest.importorskip("llguidance")
    options = dict(num_beams=3, n=3, max_new_tokens=12) | changes
    for ends in (dict(ignore_eos=True), dict(stop_token_ids=[7])):
        result = model.generate("Once", guide=gptx.guided.regex("[0-9]{2,4}"), **options, **ends)
        for choice in result.choices:
            assert choice.text.isdigit()
            assert 2 <= len(choice.text) <= 4
            assert choice.finish_reason == "stop"
    words = gptx.guided.choices(["one", "two", "three"])
    result = model.generate("Once", guide=words, **dict(options, num_beam_groups=1))
    assert {choice.text for choice in result.choices} == {"one", "two", "three"}
    with pytest.raises(gptx.ParameterError, match="guide: expected a text that no other"):
        model.generate("Once", guide=words, suppress_tokens=[ord("e"), ord("w")], **options)
    assert model._engine.stats()["requests"] == 0


def test_a_processor_that_fails_ends_its_search_alone(model):
    def fails(ids, scores):
        if len(ids) == 6:
            raise ZeroDivisionError
        return scores

    options = dict(num_beams=3, max_new_tokens=6, ignore_eos=True)
    with pytest.raises(ZeroDivisionError):
        model.generate("Once", logits_processors=[fails], **options)
    failed, other = model.generate(["Once", "1234567"], logits_processors=[fails], **options)
    assert isinstance(failed.error, ZeroDivisionError)
    assert (other.error, other.completion_tokens) == (None, 6)
    assert model._engine.stats()["requests"] == 0


def test_a_search_goes_on_after_an_interrupted_processor(model):
    def interrupted(ids, scores):
        calls.append(len(ids))
        if len(calls) == 12:
            raise KeyboardInterrupt
        return scores

    calls = []
    options = dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, n=4, seed=1)
    options |= dict(max_new_tokens=8, ignore_eos=True)
    stream = model.stream("Once", **(options | dict(n=1)), logits_processors=[interrupted])
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    list(stream)
    expected = model.generate("Once", **(options | dict(n=1)))
    assert stream.result.token_ids == expected.token_ids


def test_pieces_are_whole_characters():
    model = gptx.load()
    for prompt in ("Once upon a time", "床前明月光，"):
        options = dict(num_beams=4, max_new_tokens=40, no_repeat_ngram_size=3)
        stream = model.stream(prompt, **options)
        pieces = list(stream)
        assert len(pieces) > 1
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == stream.result.text
