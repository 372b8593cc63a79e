"""Scores against transformers and against the logits; choices, perplexity, embeddings."""

import math

import numpy as np
import pytest

import gptx
from gptx import modelfile
from gptx.errors import ContextLengthError, NonFiniteLogitsError, ParameterError, TokenizeError
from models import as_transformers, canonical_of, random_tensors, write_model

TEXTS = [
    "Once upon a time there was a king.",
    "x",
    "She said: \u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "a" * 50,
    "The quick brown fox jumps over the lazy dog",
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("scoring") / "model.gptx"
    write_model(path, block_size=96, n_embd=48, n_head=3)
    return path


@pytest.fixture(scope="module")
def model(path):
    return gptx.load(path)


@pytest.fixture(scope="module")
def reference(path):
    """log P of each token of ids but the first, by transformers in float64."""
    torch = pytest.importorskip("torch")
    source = modelfile.read(path)
    twin = as_transformers(source.config, canonical_of(source)).double()

    def logprobs(ids):
        with torch.no_grad():
            logits = twin(torch.tensor([list(ids)])).logits[0]
        chosen = torch.log_softmax(logits, dim=-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        return chosen[:, 0].numpy()

    return logprobs


def test_logprobs_equal_transformers(model, reference):
    found = model.logprobs(TEXTS, bos=True)
    for text, scores in zip(TEXTS, found, strict=True):
        ids = [256, *model.tokenizer.encode(text)]
        assert scores.token_ids.tolist() == ids
        assert np.isnan(scores.logprobs[0])
        assert np.abs(scores.logprobs[1:] - reference(ids)).max() < 1e-4
        assert math.isclose(scores.total, reference(ids).sum(), abs_tol=1e-3)
        assert math.isclose(scores.perplexity, math.exp(-reference(ids).mean()), rel_tol=1e-4)


def test_ranks_and_top_tokens_are_those_of_the_logits(model):
    scores = model.logprobs(TEXTS[0], top=5)
    logits = model.logits(TEXTS[0])[:-1].astype(np.float64)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(scores.top_ids[1:], order[:, :5])
    ids = scores.token_ids[1:]
    assert np.array_equal(scores.ranks[1:], np.argmax(order == ids[:, None], axis=1))
    exact = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert np.abs(scores.top_logprobs[1:] - np.take_along_axis(exact, order[:, :5], 1)).max() < 1e-5
    assert scores.ranks[0] == -1
    assert np.array_equal(scores.surprisal[1:], -scores.logprobs[1:])


def test_a_text_has_the_same_score_alone_and_in_a_batch(model):
    together = model.logprobs(TEXTS * 5)
    for i, text in enumerate(TEXTS * 5):
        assert np.array_equal(together[i].logprobs, model.logprobs(text).logprobs, equal_nan=True)
    assert model.score(TEXTS) == [model.score(text) for text in TEXTS]


def test_a_single_token_has_no_score_without_a_beginning(model):
    alone = model.logprobs("x")
    assert (alone.total, len(alone.token_ids)) == (0.0, 1)
    assert math.isnan(alone.perplexity)
    assert model.score("", bos=True) == 0.0


def test_a_score_behind_a_prompt_is_the_difference_of_two_scores(model):
    prompt = "Once upon a time"
    for option in (" there", " was a king", "."):
        expected = model.score(prompt + option) - model.score(prompt)
        assert math.isclose(model.score(option, prompt=prompt), expected, abs_tol=1e-4)
    ids = model.tokenizer.encode(prompt)
    assert model.score([[5, 6]], prompt=ids) == [model.score([5, 6], prompt=ids)]


@pytest.mark.parametrize("normalize", ["sum", "mean", "bytes"])
def test_choose_takes_the_option_with_the_largest_score(model, normalize):
    prompt, options = TEXTS[0], [" yes", " no", " perhaps not", "\u662f"]
    choice = model.choose(prompt, options, normalize=normalize)
    scores = np.array(model.score(options, prompt=prompt))
    # One token for each byte, with this tokenizer.
    lengths = 1 if normalize == "sum" else np.array([len(o.encode()) for o in options])
    assert np.allclose(choice.scores, scores / lengths, atol=1e-6)
    assert choice.index == int(np.argmax(scores / lengths))
    assert str(choice) == options[choice.index]


def test_choose_computes_the_prompt_once(model):
    before = model._engine.stats()["rows"]
    model.choose("p" * 60, [" yes", " no", " maybe", " never"])
    # The prompt; of each option all tokens but the last, with the row in front of them.
    assert model._engine.stats()["rows"] - before == 60 + 4 + 3 + 6 + 6


def test_a_token_that_reaches_into_the_option_is_counted_with_it():
    demo = gptx.load()
    prompt, options = "Once upon a ti", ["me", "ger"]
    choice = demo.choose(prompt, options)
    ids = [demo.tokenizer.encode(prompt + option) for option in options]
    given = demo.tokenizer.encode(prompt)
    shared = min(
        next(i for i, (a, b) in enumerate(zip(given, w, strict=False)) if a != b) for w in ids
    )
    expected = [demo.logprobs(w).logprobs[shared:].sum() for w in ids]
    assert np.allclose(choice.scores, expected, atol=1e-4)
    assert str(choice) == "me"


@pytest.mark.parametrize("stride", [96, 48, 10, 1, None])
@pytest.mark.parametrize("length", [2, 95, 96, 97, 300])
def test_perplexity_equals_the_loop_of_transformers_documentation(model, reference, stride, length):
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    nll, count, previous = 0.0, 0, 0
    for begin in range(0, length, stride or 48):
        end = min(begin + 96, length)
        target = end - previous
        window = reference(ids[begin:end]) if end - begin > 1 else np.zeros(0)
        kept = window[-target:] if target <= len(window) else window
        nll -= kept.sum()
        count += len(kept)
        previous = end
        if end == length:
            break
    assert math.isclose(model.perplexity(ids, stride=stride), math.exp(nll / count), rel_tol=1e-4)


def test_embeddings_are_the_states_after_the_final_norm(model, path):
    torch = pytest.importorskip("torch")
    source = modelfile.read(path)
    twin = as_transformers(source.config, canonical_of(source))
    for pooling in ("mean", "last"):
        found = model.embed(TEXTS, pooling=pooling)
        assert found.shape == (5, 48)
        for i, text in enumerate(TEXTS):
            ids = torch.tensor([model.tokenizer.encode(text)])
            with torch.no_grad():
                states = twin.transformer(ids).last_hidden_state[0].numpy()
            expected = states.mean(axis=0) if pooling == "mean" else states[-1]
            assert np.abs(found[i] - expected).max() < 1e-4
            assert np.array_equal(model.embed(text, pooling=pooling), found[i])
    assert np.allclose(np.linalg.norm(model.embed(TEXTS, normalize=True), axis=1), 1, atol=1e-6)


def test_hidden_states_equal_transformers(model, path):
    torch = pytest.importorskip("torch")
    source = modelfile.read(path)
    twin = as_transformers(source.config, canonical_of(source))
    for text in TEXTS:
        found = model.hidden_states(text)
        with torch.no_grad():
            ids = torch.tensor([model.tokenizer.encode(text)])
            expected = twin(ids, output_hidden_states=True).hidden_states
        expected = np.stack([states[0].numpy() for states in expected])
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() < 1e-4


def test_hidden_states_are_the_same_while_others_generate(model):
    alone = model.hidden_states(TEXTS[0])
    stream = model.stream("abc", max_new_tokens=90, temperature=0, ignore_eos=True)
    pieces = [next(stream)]
    for _ in range(20):
        assert np.array_equal(model.hidden_states(TEXTS[0]), alone)
        pieces.append(next(stream))
    text = "".join([*pieces, *stream])
    assert text == model.generate("abc", max_new_tokens=90, temperature=0, ignore_eos=True).text


def test_refusals_name_the_parameter(model):
    for call, param in [
        (lambda: model.logprobs("ab", top=101), "top"),
        (lambda: model.logprobs("ab", top=True), "top"),
        (lambda: model.choose("ab", []), "options"),
        (lambda: model.choose("ab", "cd"), "options"),
        (lambda: model.choose("ab", ["c"], normalize="max"), "normalize"),
        (lambda: model.choose("ab", ["c", ""]), "text[1] behind the prompt"),
        (lambda: model.score([""], prompt="a"), "text[0] behind the prompt"),
        (lambda: model.perplexity("abc", stride=97), "stride"),
        (lambda: model.perplexity("a"), "text"),
        (lambda: model.embed("abc", pooling="max"), "pooling"),
    ]:
        with pytest.raises(ParameterError) as caught:
            call()
        assert caught.value.param == param
    with pytest.raises(ContextLengthError, match="perplexity takes any length"):
        model.logprobs("a" * 98)
    with pytest.raises(TokenizeError):
        model.score("\ud800")
    assert model._engine.stats()["requests"] == 0


def test_bos_needs_an_end_token(tmp_path):
    write_model(tmp_path / "m.gptx")
    source = modelfile.read(tmp_path / "m.gptx")
    modelfile.write(
        tmp_path / "none.gptx", source.config, canonical_of(source), generation={}, tokenizer=None
    )
    with pytest.raises(ParameterError, match="bos"):
        gptx.load(tmp_path / "none.gptx").score([1, 2], bos=True)


def test_weights_that_overflow_are_an_error(tmp_path):
    config = write_model(tmp_path / "m.gptx")
    tensors = random_tensors(config)
    tensors["ln_f.weight"][:] = 3e38
    write_model(tmp_path / "bad.gptx", tensors)
    with pytest.raises(NonFiniteLogitsError, match="position 1"):
        gptx.load(tmp_path / "bad.gptx").score("abc")
