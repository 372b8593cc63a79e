"""Jobs that a guide steers, with a guide of one's own in place of llguidance's."""

from dataclasses import dataclass

import numpy as np
import pytest

import gptx
from gptx.guided import Guide
from models import write_model


class Spelling:
    """Allows the bytes of some texts, one after the other, and the end tokens behind them."""

    def __init__(self, texts, ends, so_far=b""):
        self.texts = [text.encode() for text in texts]
        self.ends = ends
        self.so_far = so_far

    def _next(self):
        n = len(self.so_far)
        return {t[n] for t in self.texts if t.startswith(self.so_far) and len(t) > n}

    def mask(self):
        allowed = self._next() | (set(self.ends) if self.is_accepting else set())
        words = np.zeros(9, np.uint32)
        for token in allowed:
            words[token // 32] |= np.uint32(1 << token % 32)
        if not allowed:
            raise gptx.ParameterError("guide", "Spelling", "a text to go on with")
        return words

    def accept(self, token):
        if token not in self._next():
            raise gptx.ParameterError("guide", "Spelling", "a byte that fits")
        self.so_far += bytes([token])

    def forced(self):
        # Wrong where several texts go on otherwise: guesses need not be right.
        return list(max(t for t in self.texts if t.startswith(self.so_far))[len(self.so_far) :])

    @property
    def is_accepting(self):
        return self.so_far in self.texts

    @property
    def is_finished(self):
        return self.is_accepting and not self._next()

    def copy(self):
        return Spelling([t.decode() for t in self.texts], self.ends, self.so_far)


@dataclass(frozen=True)
class Spell(Guide):
    texts: tuple = ()

    def start(self, model, end_tokens):
        return Spelling(self.texts, end_tokens)


def spell(*texts):
    return Spell("spell", "", texts)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.gptx"
    write_model(path)
    return gptx.load(path)


TEXTS = ("abc", "abd", "xyz!", "床前", "床头")


@pytest.mark.parametrize("seed", range(20))
def test_a_text_is_one_that_the_guide_allows_and_ends_with_it(model, seed):
    result = model.generate("Once", guide=spell(*TEXTS), seed=seed)
    assert result.text in TEXTS
    assert result.finish_reason == "stop"
    assert result.completion_tokens == len(result.text.encode())


def test_the_end_token_decides_between_a_text_and_a_longer_one(model):
    found = {
        model.generate(
            "Once", guide=spell("a", "ab", "abc"), seed=seed, temperature=3, top_k=0
        ).text
        for seed in range(60)
    }
    assert found == {"a", "ab", "abc"}
    whole = model.generate("Once", guide=spell("a", "ab", "abc"), seed=1, ignore_eos=True)
    assert (whole.text, whole.finish_reason) == ("abc", "stop")
    least = model.generate("Once", guide=spell("a", "ab", "abc"), seed=1, min_new_tokens=3)
    assert least.text == "abc"


def test_what_ends_a_text_early_says_so(model):
    cut = model.generate("Once", guide=spell("abcdef"), max_new_tokens=3)
    assert (cut.text, cut.finish_reason) == ("abc", "length")
    exact = model.generate("Once", guide=spell("abcdef"), max_new_tokens=6)
    assert (exact.text, exact.finish_reason) == ("abcdef", "stop")
    stopped = model.generate("Once", guide=spell("abcdef"), stop=["cd"])
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")
    late = model.generate("Once", guide=spell("abcdef"), max_time=0)
    assert late.finish_reason == "time"


def test_an_empty_text_may_be_all_there_is(model):
    result = model.generate("Once", guide=spell(""))
    assert (result.text, result.finish_reason, result.error) == ("", "stop", None)
    assert list(model.stream("Once", guide=spell(""))) == []


def test_what_the_guide_allows_and_something_else_bans_ends_with_an_error(model):
    free = model._engine.free_blocks
    with pytest.raises(gptx.ParameterError, match="guide: expected a byte that fits"):
        model.generate("Once", guide=spell("abc"), suppress_tokens=[98])
    with pytest.raises(gptx.ParameterError, match="guide"):
        model.generate("Once", guide=spell("abc"), forced_tokens=[65])
    with pytest.raises(gptx.ParameterError, match="guide: expected a text that may end"):
        model.generate("Once", guide=spell("abc"), forced_eos_token_id=256, max_new_tokens=2)

    def never_b(ids, logits):
        logits[98] = -np.inf
        return logits

    with pytest.raises(gptx.ParameterError, match="logits_processors: .*that guide allows"):
        model.generate("Once", guide=spell("abc"), logits_processors=[never_b])
    assert (
        model.generate("Once", guide=spell("abc", "ad"), logits_processors=[never_b]).text == "ad"
    )
    assert model._engine.free_blocks == free


def test_what_a_guide_forces_is_computed_in_one_step(model):
    text = "what must come, must come at once"
    result = model.generate("Once", guide=spell(text), max_new_tokens=60)
    assert result.text == text
    assert result.accepted_tokens == result.drafted_tokens > 20
    steps = model._engine.stats()["steps"]
    again = model.generate("Once", guide=spell(text), max_new_tokens=60, logprobs=2)
    assert model._engine.stats()["steps"] - steps < 8
    assert again.token_ids == result.token_ids
    whole = model.logprobs("Once" + text, top=2).logprobs[-len(text) :]
    assert np.allclose([t.logprob for t in again.logprobs], whole, atol=1e-5)


def test_samples_of_a_guided_prompt_go_on_by_themselves(model):
    options = dict(seed=3, temperature=2.0, logprobs=1)
    result = model.generate("Once", guide=spell(*TEXTS), n=12, **options)
    texts = [choice.text for choice in result.choices]
    assert set(texts) <= set(TEXTS)
    assert len(set(texts)) > 2
    for choice in result.choices:
        alone = model.generate("Once", guide=spell(*TEXTS), **options | dict(seed=choice.seed))
        assert alone.token_ids == choice.token_ids
    best = model.generate("Once", guide=spell(*TEXTS), n=2, best_of=12, **options)
    assert best.score >= best.others[0].score


def test_a_text_is_the_same_alone_and_in_company(model):
    def task(prompt, **changes):
        params = gptx.SamplingParams(**dict(seed=4, max_new_tokens=30) | changes)
        return model._task(prompt, params)

    from gptx import jobs

    tasks = [
        dict(prompt="Once", guide=spell(*TEXTS)),
        dict(prompt="Once"),
        dict(prompt="x" * 80, guide=spell("ab" * 30)),
        dict(prompt="upon", n=3, guide=spell(*TEXTS), temperature=2.0),
        dict(prompt="upon", n=3),
        dict(prompt="time", logits_processors=[lambda ids, logits: logits * 2]),
        dict(prompt="time", logits_processors=[lambda ids, logits: logits], prompt_lookup=8),
        dict(prompt="x" * 80, guide=spell("ab" * 30), prompt_lookup=8, logprobs=0),
        dict(prompt="time", guide=spell("abc"), suppress_tokens=[98]),
    ]

    def run(started):
        while running := [job for job in started if not job.finished]:
            jobs.step(model._engine, running)
        return [job.generation() for job in started]

    free = model._engine.free_blocks
    alone = [run([jobs.start(task(**t))])[0] for t in tasks]
    together = run([jobs.start(task(**t)) for t in tasks])
    for one, other in zip(alone, together, strict=True):
        assert [c.token_ids for c in one.choices] == [c.token_ids for c in other.choices]
        assert [c.finish_reason for c in one.choices] == [c.finish_reason for c in other.choices]
    assert isinstance(together[-1].error, gptx.ParameterError)
    assert model._engine.free_blocks == free


def test_what_is_no_guide_is_refused():
    with pytest.raises(gptx.ParameterError, match=r"guide: .*gptx\.guided makes"):
        gptx.SamplingParams(guide=r"\d{4}")
