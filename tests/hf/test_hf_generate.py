"""generate: the tokens of transformers, for each of its deterministic arguments."""

import random

import pytest
from hf_samples import PROMPTS

LENGTH = dict(max_new_tokens=14)
CASES = {
    "default length": {},
    "max_length": dict(max_length=40),
    "greedy": LENGTH,
    "filters that greedy passes over": LENGTH | dict(top_k=3, top_p=0.5, temperature=0.3),
    "min_length": LENGTH | dict(min_length=30),
    "min_new_tokens": LENGTH | dict(min_new_tokens=9),
    "min_new_tokens before min_length": LENGTH | dict(min_length=40, min_new_tokens=2),
    "repetition_penalty": LENGTH | dict(repetition_penalty=1.4),
    "no_repeat_ngram_size 1": dict(max_new_tokens=6, no_repeat_ngram_size=1),
    "no_repeat_ngram_size 2": LENGTH | dict(no_repeat_ngram_size=2),
    "no_repeat_ngram_size 3": LENGTH | dict(no_repeat_ngram_size=3),
    "bad_words_ids": LENGTH | dict(bad_words_ids=[[i] for i in range(5, 300, 3)] + [[7, 10], [0]]),
    "suppress_tokens": LENGTH | dict(suppress_tokens=list(range(10, 390, 2))),
    "begin_suppress_tokens": LENGTH | dict(begin_suppress_tokens=list(range(0, 390))),
    "sequence_bias": LENGTH | dict(sequence_bias={(5,): 4.0, (9,): -3.0, (200,): 2.5}),
    "sequence_bias of several": LENGTH
    | dict(sequence_bias=[[[i, (i * 7) % 389], 9.0] for i in range(389)]),
    "forced_bos_token_id": LENGTH | dict(forced_bos_token_id=17),
    "forced_eos_token_id": LENGTH | dict(forced_eos_token_id=0),
    "forced_eos_token_id, several": LENGTH | dict(forced_eos_token_id=[30, 20]),
    "exponential_decay_length_penalty": LENGTH | dict(exponential_decay_length_penalty=(3, 1.5)),
    "exponential_decay_length_penalty, several ends": LENGTH
    | dict(exponential_decay_length_penalty=(2, 1.4), eos_token_id=[7, 0, 7, 99]),
    "padding that may come again": dict(max_new_tokens=20, no_repeat_ngram_size=2, eos_token_id=44),
    "eos_token_id": LENGTH | dict(eos_token_id=44),
    "eos_token_id, several": LENGTH | dict(eos_token_id=[0, *range(100, 250)]),
    "eos_token_id, several, min": LENGTH
    | dict(eos_token_id=[0, *range(100, 250)], min_new_tokens=5, pad_token_id=3),
    "eos_token_id none": LENGTH | dict(eos_token_id=-1, pad_token_id=2),
    "pad_token_id": LENGTH | dict(pad_token_id=9),
    "renormalize_logits": LENGTH | dict(renormalize_logits=True),
    "use_cache": LENGTH | dict(use_cache=False),
    "much": LENGTH
    | dict(
        repetition_penalty=1.2,
        no_repeat_ngram_size=3,
        min_new_tokens=6,
        sequence_bias={(5,): 4.0, (30, 40): 2.0},
        suppress_tokens=[11, 12, 13],
        bad_words_ids=[[20], [21, 22]],
        forced_eos_token_id=0,
    ),
}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_tokens_of_a_left_padded_batch_are_those_of_transformers(pair, arguments):
    ours, theirs = pair.run(lambda lib: lib.generate(PROMPTS, **arguments))
    assert ours == theirs


@pytest.mark.parametrize("name", ["greedy", "forced_bos_token_id", "begin_suppress_tokens", "much"])
def test_tokens_of_a_single_prompt_are_those_of_transformers(pair, name):
    def script(lib):
        found = []
        for text in PROMPTS:
            inputs = lib.tokenizer(text, return_tensors="pt")
            found.append(lib.model.generate(**inputs, **CASES[name]).tolist())
        return found

    ours, theirs = pair.run(script)
    assert ours == theirs


def random_arguments(rng, vocab_size):
    """Some arguments with values that change tokens now and then."""

    def ids(n):
        return [rng.randrange(vocab_size) for _ in range(n)]

    beams = rng.choice([1, 1, 2, 4])
    choices = {
        "max_length": lambda: rng.randrange(25, 60),
        "min_length": lambda: rng.randrange(40),
        "min_new_tokens": lambda: rng.randrange(20),
        "repetition_penalty": lambda: rng.uniform(0.7, 1.8),
        "no_repeat_ngram_size": lambda: rng.randrange(4),
        "bad_words_ids": lambda: [ids(rng.randrange(1, 3)) for _ in range(30)],
        "suppress_tokens": lambda: ids(100),
        "begin_suppress_tokens": lambda: ids(200),
        "sequence_bias": lambda: {tuple(ids(rng.choice([1, 2]))): rng.uniform(-4, 4)},
        "forced_eos_token_id": lambda: rng.choice([0, *ids(1)]),
        "exponential_decay_length_penalty": lambda: (rng.randrange(5), rng.uniform(1, 1.6)),
        "eos_token_id": lambda: rng.choice([*ids(1), ids(40)]),
        "pad_token_id": lambda: rng.randrange(vocab_size),
        "renormalize_logits": lambda: True,
        "length_penalty": lambda: rng.uniform(-1, 2),
        "early_stopping": lambda: rng.choice([True, False, "never"]),
    }
    found = {name: make() for name, make in choices.items() if rng.random() < 0.25}
    if rng.random() < 0.7:
        found["max_new_tokens"] = rng.randrange(2, 20)
    return found | dict(num_beams=beams, num_return_sequences=rng.randrange(1, beams + 1))


@pytest.mark.parametrize("seed", range(10))
def test_tokens_of_any_arguments_are_those_of_transformers(pair, seed):
    rng = random.Random(seed)
    for _ in range(5):
        arguments = random_arguments(rng, pair.ours.model.config.vocab_size)
        texts = rng.sample(PROMPTS, rng.randrange(1, 8))
        ours, theirs = pair.run(lambda lib, t=texts, a=arguments: lib.generate(t, **a))
        assert ours == theirs, (texts, arguments)


def test_without_a_prompt_the_text_begins_with_bos(pair):
    ours, theirs = pair.run(lambda lib: lib.model.generate(max_new_tokens=5).tolist())
    assert ours == theirs


def test_a_generation_config_gives_defaults_and_arguments_come_first(pair):
    def script(lib):
        config = lib.library.GenerationConfig(max_new_tokens=9, repetition_penalty=1.5)
        inputs = lib.padded(PROMPTS[:4])
        first = lib.model.generate(**inputs, generation_config=config).tolist()
        return first, lib.model.generate(
            **inputs, generation_config=config, max_new_tokens=4
        ).tolist()

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_stop_strings_end_rows_as_in_transformers(pair):
    texts = pair.ours.tokenizer.batch_decode(pair.ours.generate(PROMPTS, max_new_tokens=14))
    prompts = [t.replace("<|endoftext|>", "") for t in PROMPTS]
    stops = [*sorted({text[-4:-2] for text in texts if "�" not in text[-4:-2]})[:6], "e a"]

    def script(lib):
        return lib.generate(prompts, max_new_tokens=14, stop_strings=stops, tokenizer=lib.tokenizer)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_the_padding_of_a_mask_is_inferred_from_pad_token_id(pair):
    def script(lib):
        ids = lib.padded(PROMPTS[:5])["input_ids"]
        ids[ids == lib.end] = 3
        return lib.model.generate(ids, max_new_tokens=8, pad_token_id=3).tolist()

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_scores_and_logits_of_every_step_are_those_of_transformers(pair):
    import torch

    def script(lib):
        torch.manual_seed(0)
        return lib.model.generate(
            **lib.padded(PROMPTS[:6]),
            max_new_tokens=8,
            repetition_penalty=1.3,
            sequence_bias={(5,): 2.0},
            min_new_tokens=8,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )

    ours, theirs = pair.run(script)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name]) == 8
        for a, b in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


WARPERS = [
    dict(temperature=0.7),
    dict(top_k=7),
    dict(top_k=0, top_p=0.6),
    dict(top_k=0, min_p=0.1),
    dict(top_k=0, typical_p=0.5),
    dict(top_k=0, epsilon_cutoff=0.01),
    dict(top_k=0, eta_cutoff=0.02),
    dict(temperature=1.3, top_k=30, top_p=0.9, min_p=0.02, renormalize_logits=True),
]


@pytest.mark.parametrize("arguments", WARPERS, ids=str)
def test_scores_of_sampling_are_filtered_as_in_transformers(pair, arguments):
    import torch

    def script(lib):
        return lib.model.generate(
            **lib.padded(PROMPTS),
            max_new_tokens=1,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **arguments,
        ).scores[0]

    ours, theirs = pair.run(script)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_sampled_has_not_been_filtered(pair):
    for arguments in WARPERS:
        out = pair.ours.model.generate(
            **pair.ours.padded(PROMPTS),
            max_new_tokens=3,
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **arguments,
        )
        for step, scores in enumerate(out.scores):
            for row, token in enumerate(out.sequences[:, out.sequences.shape[1] - 3 + step]):
                assert token == pair.ours.end or scores[row, token] > -float("inf")


def test_a_processor_of_the_script_sees_what_transformers_shows_it(pair):
    def script(lib):
        seen = []

        class Ban(lib.library.LogitsProcessor):
            def __call__(self, input_ids, scores):
                seen.append((input_ids.tolist(), scores.argmax(-1).tolist()))
                scores[:, scores.argmax(-1)] = -float("inf")
                return scores

        processors = lib.library.LogitsProcessorList([Ban()])
        options = dict(logits_processor=processors, repetition_penalty=1.2, min_new_tokens=8)
        return lib.generate(PROMPTS[:1], max_new_tokens=8, **options), seen

    (ours, ours_seen), (theirs, theirs_seen) = pair.run(script)
    assert ours == theirs
    assert ours_seen == theirs_seen


def test_criteria_of_the_script_end_rows(pair):
    def script(lib):
        class Odd(lib.library.StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return input_ids[:, -1] % 5 == 0

        criteria = lib.library.StoppingCriteriaList([Odd()])
        return lib.generate(PROMPTS, max_new_tokens=12, stopping_criteria=criteria)

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_criterion_may_end_all_rows_with_one_bool(pair):
    def script(lib):
        criteria = [lambda ids, scores, **_: ids.shape[1] >= 30]
        return len(pair.ours.generate(PROMPTS, max_new_tokens=40, stopping_criteria=criteria)[0])

    assert script(pair.ours) == 30


def test_rows_that_have_ended_go_on_where_no_end_token_is_set(pair):
    def script(lib):
        lib.model.generation_config.eos_token_id = None
        try:
            return lib.generate(
                PROMPTS, max_new_tokens=10, stop_strings=["a", "e", "t"], tokenizer=lib.tokenizer
            )
        finally:
            lib.model.generation_config.eos_token_id = lib.end

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_allowed_tokens_are_those_of_the_function(pair):
    def script(lib):
        return lib.generate(
            PROMPTS[:6],
            max_new_tokens=8,
            prefix_allowed_tokens_fn=lambda i, ids: [3 + i, 50 + int(ids[-1]) % 20, 300],
        )

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_speculation_changes_no_token(pair):
    plain = pair.ours.generate(PROMPTS, max_new_tokens=12)
    draft = pair.ours.model
    assert pair.ours.generate(PROMPTS, max_new_tokens=12, assistant_model=draft) == plain
    assert pair.ours.generate(PROMPTS, max_new_tokens=12, prompt_lookup_num_tokens=4) == plain


def test_a_seed_gives_the_same_samples_in_every_company(pair):
    import torch

    options = dict(do_sample=True, max_new_tokens=10, num_return_sequences=3)
    first = pair.ours.generate(PROMPTS[:3], seed=5, **options)
    assert pair.ours.generate(PROMPTS[:3], seed=5, **options) == first
    assert pair.ours.generate(PROMPTS[:3], seed=6, **options) != first
    assert len({str(row) for row in first}) == 9
    pair.ours.library.set_seed(1)
    second = pair.ours.generate(PROMPTS[:3], **options)
    assert pair.ours.generate(PROMPTS[:3], **options) != second
    pair.ours.library.set_seed(1)
    assert pair.ours.generate(PROMPTS[:3], **options) == second
    torch.manual_seed(1)
    assert pair.ours.generate(PROMPTS[:3], **options) == second


def test_both_ways_to_generate_sample_the_same(pair):
    options = dict(do_sample=True, max_new_tokens=10, seed=3, top_p=0.9, repetition_penalty=1.2)
    by_engine = pair.ours.generate(PROMPTS, **options)
    processor = [lambda ids, scores: scores]
    assert pair.ours.generate(PROMPTS, logits_processor=processor, **options) == by_engine


def test_a_full_context_ends_the_text(pair):
    texts = ["x y z", "Once upon a time there was a princess"]
    ids = pair.ours.generate(texts, max_new_tokens=500, eos_token_id=-1, pad_token_id=0)
    processor = [lambda ids, scores: scores]
    stepwise = dict(eos_token_id=-1, pad_token_id=0, logits_processor=processor)
    assert pair.ours.generate(texts, max_new_tokens=500, **stepwise) == ids
    mask = pair.ours.padded(texts)["attention_mask"]
    assert len(ids[0]) == 96 + int((mask == 0).sum())


BEAMS = {
    "plain": {},
    "several": dict(num_return_sequences=3),
    "length_penalty": dict(length_penalty=0.3),
    "early_stopping": dict(early_stopping=True),
    "never": dict(early_stopping="never"),
    "changes": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, min_new_tokens=5),
    "chained": dict(sequence_bias={(5, 9): 4.0, (7,): 1.0}, renormalize_logits=True),
    "several ends": dict(eos_token_id=[0, 44, 45, 46], num_return_sequences=4),
    "forced_bos_token_id": dict(forced_bos_token_id=12, begin_suppress_tokens=[3, 4]),
    "padding that may come again": dict(no_repeat_ngram_size=2, eos_token_id=44),
    "allowed": dict(prefix_allowed_tokens_fn=lambda i, ids: [3 + i, 50 + int(ids[-1]) % 20, 300]),
}


@pytest.mark.parametrize("arguments", BEAMS.values(), ids=BEAMS)
def test_tokens_of_beam_search_are_those_of_transformers(pair, arguments):
    ours, theirs = pair.run(
        lambda lib: lib.generate(PROMPTS, max_new_tokens=12, num_beams=4, **arguments)
    )
    assert ours == theirs


def test_scores_of_beams_are_those_of_transformers(pair):
    def script(lib):
        out = lib.model.generate(
            **lib.padded(PROMPTS),
            max_new_tokens=10,
            num_beams=3,
            num_return_sequences=2,
            output_scores=True,
            return_dict_in_generate=True,
        )
        return out.sequences_scores.tolist()

    ours, theirs = pair.run(script)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_contrastive_search_goes_on_with_a_penalty(pair):
    plain = pair.ours.generate(PROMPTS, max_new_tokens=10)
    options = dict(max_new_tokens=10, penalty_alpha=0.6, top_k=4)
    found = pair.ours.generate(PROMPTS, **options)
    assert found != plain
    model = pair.ours.model.gptx
    for row, text in zip(found, PROMPTS, strict=True):
        ids = pair.ours.tokenizer(text)["input_ids"]
        expected = model.generate(ids, temperature=0.0, top_p=1.0, **options).token_ids
        start = max(len(pair.ours.tokenizer(t)["input_ids"]) for t in PROMPTS)
        assert tuple(row[start : start + len(expected)]) == expected


def test_a_generation_config_of_transformers_is_taken_by_what_is_set_in_it(pair):
    import transformers

    config = transformers.GenerationConfig(max_new_tokens=7, num_beams=3, length_penalty=0.5)

    def script(lib):
        ids = lib.tokenizer("One day a prince", return_tensors="pt").input_ids
        return lib.model.generate(ids, generation_config=config).tolist()

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_a_criterion_of_length_replaces_that_of_the_call(pair):
    def script(lib):
        ids = lib.tokenizer("One day a prince", return_tensors="pt").input_ids
        lengths = []
        for most, more in ((30, {}), (9, {"max_new_tokens": 2}), (12, {"num_beams": 2})):
            criteria = lib.library.StoppingCriteriaList(
                [lib.library.MaxLengthCriteria(max_length=most)]
            )
            out = lib.model.generate(
                ids, eos_token_id=-1, pad_token_id=0, stopping_criteria=criteria, **more
            )
            lengths.append(out.tolist())
        return lengths

    ours, theirs = pair.run(script)
    assert ours == theirs


def test_bad_words_that_are_end_tokens_alone_are_none(pair):
    def script(lib):
        ids = lib.tokenizer("One day a prince", return_tensors="pt").input_ids
        options = dict(bad_words_ids=[[0]], eos_token_id=[0, 5], max_new_tokens=5)
        return lib.model.generate(ids, **options).tolist()

    ours, theirs = pair.run(script)
    assert ours == theirs
