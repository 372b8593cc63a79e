"""Requests of every kind at once: each gives what it gives alone."""

import numpy as np
import pytest

import gptx
from gptx import SamplingParams
from gptx.errors import ParameterError
from models import write_model

KINDS = [
    dict(temperature=0.0),
    dict(temperature=0.9, seed=3),
    dict(temperature=1.1, top_k=0, top_p=0.9, min_p=0.02, typical_p=0.95, seed=4),
    dict(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.4, dry_multiplier=0.8, seed=5),
    dict(temperature=0.0, no_repeat_ngram_size=2, suppress_tokens=[32]),
    dict(temperature=0.7, n=3, seed=6, logprobs=2),
    dict(temperature=0.9, n=1, best_of=3, seed=7),
    dict(num_beams=3, n=2, max_new_tokens=15),
    dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, n=4, max_new_tokens=10),
    dict(penalty_alpha=0.5, top_k=4, max_new_tokens=12),
    dict(temperature=0.0, prompt_lookup=6),
    dict(temperature=0.8, context="slide", context_keep=50, max_new_tokens=120, seed=8),
    dict(temperature=0.8, stop=["e", "zz"], seed=9),
    dict(
        temperature=0.8, logits_processors=[lambda ids, logits: logits * np.float32(0.9)], seed=10
    ),
    dict(temperature=0.8, forced_tokens=[65, 66], min_new_tokens=5, seed=11),
    dict(temperature=0.0, logit_bias={97: 2.0, 98: float("-inf")}, bad_words=["ab", [99, 100]]),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtures") / "model.gptx"
    write_model(path, block_size=128, n_embd=48, n_head=3)
    return path


def requests():
    """64 prompts of 1 to 90 tokens, some with a common beginning, and parameters of every kind."""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 256, 70).tolist()
    for i in range(64):
        tail = rng.integers(0, 256, int(rng.integers(1, 20))).tolist()
        kind = dict(max_new_tokens=25) | KINDS[i % len(KINDS)]
        yield (common + tail if i % 3 else tail), SamplingParams(**kind)


def texts(result):
    return [(c.token_ids, c.text, c.finish_reason, c.score, c.logprobs) for c in result.choices]


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kv_cache_bytes=0, prefix_cache_bytes=0),
        dict(step_tokens=8),
        dict(threads=1, precision="float32", kv_cache_dtype="bfloat16"),
    ],
    ids=str,
)
def test_64_requests_of_every_kind_give_together_what_they_give_alone(path, options):
    prompts, params = zip(*requests(), strict=True)
    mode = {k: v for k, v in options.items() if k in ("precision", "kv_cache_dtype")}
    alone = gptx.load(path, prefix_cache_bytes=0, **mode)
    expected = [texts(alone.generate(p, q)) for p, q in zip(prompts, params, strict=True)]
    model = gptx.load(path, **options)
    for _ in range(2):  # the second time from cached prefixes, where there are any
        found = model.generate(list(prompts), list(params))
        for result, wanted, q in zip(found, expected, params, strict=True):
            assert result.error is None
            assert texts(result) == wanted, q
    stats = model._engine.stats()
    assert stats["requests"] == 0
    assert stats["free_blocks"] + stats["cached_blocks"] == stats["blocks"]
    if "kv_cache_bytes" in options:
        assert stats["preemptions"] > 0


def test_a_list_of_params_needs_as_many_as_there_are_prompts(path):
    model = gptx.load(path)
    with pytest.raises(ParameterError, match="params: expected one SamplingParams for each of 2"):
        model.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(ParameterError, match="params"):
        model.generate(["a", "b"], [SamplingParams(), "hot"])
    both = model.generate(
        ["a", "b"], [SamplingParams(seed=1), SamplingParams(seed=2)], max_new_tokens=3
    )
    assert [r.seed for r in both] == [1, 2]
