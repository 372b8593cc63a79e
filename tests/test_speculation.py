"""Drafts, from the text itself or a smaller model, change the speed and never a token."""

import pytest

import gptx
from gptx.errors import ParameterError
from models import write_model

PROMPTS = ["Once upon a time", "abcabcabcabcabcabc", "x", "The king said: the king said: the king"]
WAYS = [
    dict(temperature=0.0),
    dict(temperature=0.9, top_k=30, seed=3),
    dict(temperature=0.7, top_p=0.8, repetition_penalty=1.3, seed=4),
    dict(temperature=1.2, min_new_tokens=10, presence_penalty=0.5, seed=5),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speculation")
    write_model(folder / "large.gptx", block_size=160, n_layer=3)
    write_model(folder / "small.gptx", block_size=96, n_layer=1)
    return gptx.load(folder / "large.gptx"), gptx.load(folder / "small.gptx")


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_draft_model_changes_no_token(models, way):
    large, small = models
    plain = large.generate(PROMPTS, max_new_tokens=80, **way)
    for draft in (small, large):
        drafted = large.generate(PROMPTS, max_new_tokens=80, draft=draft, **way)
        assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
        assert sum(r.drafted_tokens for r in drafted) > 0
    assert large._engine.stats()["requests"] == small._engine.stats()["requests"] == 0


def test_a_model_that_drafts_for_itself_is_always_right(models):
    large, _ = models
    twin = gptx.load(large.path)
    result = large.generate(PROMPTS[0], max_new_tokens=100, draft=twin, temperature=0.9, seed=1)
    assert result.accepted_tokens == result.drafted_tokens > 80


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_prompt_lookup_changes_no_token(models, way):
    large, _ = models
    plain = large.generate(PROMPTS, max_new_tokens=80, **way)
    looked_up = large.generate(PROMPTS, max_new_tokens=80, prompt_lookup=10, **way)
    assert [r.token_ids for r in looked_up] == [r.token_ids for r in plain]


@pytest.mark.parametrize("help", [dict(), dict(prompt_lookup=6)], ids=["model", "text"])
def test_drafts_change_nothing_that_processors_steer(models, help):
    large, small = models

    def vowels(ids, logits):
        logits[[97, 101, 105, 111, 117]] += 5
        return logits

    for way in WAYS:
        options = dict(max_new_tokens=50, logits_processors=[vowels], **way)
        plain = large.generate(PROMPTS, **options)
        drafted = large.generate(PROMPTS, **(help or dict(draft=small)), **options)
        assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
        assert sum(r.drafted_tokens for r in drafted) > 0
    assert large._engine.stats()["requests"] == small._engine.stats()["requests"] == 0


def test_drafts_stream_and_sample_several(models):
    large, small = models
    way = dict(temperature=0.9, seed=2, max_new_tokens=40)
    stream = large.stream(PROMPTS[0], draft=small, **way)
    assert "".join(stream) == large.generate(PROMPTS[0], **way).text
    several = large.generate(PROMPTS[0], n=3, draft=small, **way)
    plain = large.generate(PROMPTS[0], n=3, **way)
    assert [c.token_ids for c in several.choices] == [c.token_ids for c in plain.choices]


def test_the_end_of_the_context_ends_drafts(models):
    large, small = models
    prompt = "abcd" * 35
    plain = large.generate(prompt, temperature=0.0, max_new_tokens=100)
    for draft in (small, large):  # the small one cannot read the prompt
        drafted = large.generate(prompt, temperature=0.0, max_new_tokens=100, draft=draft)
        assert drafted.token_ids == plain.token_ids


def test_a_draft_of_another_kind_is_refused(models, tmp_path):
    large, _ = models
    write_model(tmp_path / "wide.gptx", vocab_size=300)
    for draft in (gptx.load(tmp_path / "wide.gptx"), "small", 3):
        with pytest.raises(ParameterError) as caught:
            large.generate("a", draft=draft)
        assert caught.value.param == "draft"
    with pytest.raises(ParameterError, match="draft"):
        large.generate("a", draft=large, context="slide")
    assert large._engine.stats()["requests"] == 0
