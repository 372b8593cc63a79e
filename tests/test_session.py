"""Branches: the logits of the whole, forks, going back, files."""

import numpy as np
import pytest

import gptx
from gptx.errors import ContextLengthError, ModelFileError, ParameterError, UnsupportedError
from models import write_model

TEXT = "Once upon a time there was a king who had three daughters and a very old horse. "


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sessions") / "model.gptx"
    write_model(path, block_size=160, n_embd=48, n_head=3)
    return path


@pytest.fixture(scope="module")
def model(path):
    return gptx.load(path)


def test_a_branch_has_the_logits_of_the_whole(model):
    whole = model.logits(TEXT)
    with model.branch(TEXT[:30]) as branch:
        assert np.array_equal(branch.logits, whole[29:30])
        assert np.array_equal(branch.feed(TEXT[30:70], logits=5), whole[65:70])
        assert branch.ids == model.tokenizer.encode(TEXT[:70])
        branch.truncate(10)
        assert branch.logits.shape == (0, 257)
        assert np.array_equal(branch.feed(TEXT[10:50]), whole[49:50])
        assert len(branch) == 50


def test_forks_go_their_own_ways(model):
    with model.branch(TEXT[:70]) as base:
        forks = [base.fork() for _ in range(3)]
        assert np.array_equal(forks[0].logits, base.logits)
        for fork, end in zip(forks, ("abc", "xyz", "a"), strict=True):
            assert np.array_equal(fork.feed(end), model.logits(TEXT[:70] + end)[-1:])
        assert np.array_equal(base.feed("q"), model.logits(TEXT[:70] + "q")[-1:])
        for fork in forks:
            fork.close()
    assert model._engine.stats()["requests"] == 0


def test_hidden_states_stand_beside_the_logits(model):
    with model.branch("abc", logits=3, hidden=True) as branch:
        assert branch.hidden.shape == (3, 48)
        branch.feed("de")
        assert branch.hidden.shape == (1, 48)


def test_a_branch_refuses_what_it_cannot_do(model):
    with model.branch(TEXT) as branch:
        with pytest.raises(ContextLengthError, match="at most 160 tokens, got 161"):
            branch.feed("x" * (161 - len(TEXT)))
        for call, param in [
            (lambda: branch.feed("ab", logits=3), "logits"),
            (lambda: branch.truncate(0), "n"),
            (lambda: branch.truncate(len(TEXT) + 1), "n"),
            (lambda: branch.feed(""), "prompt"),
            (lambda: model.branch("ab", logits=0), "logits"),
        ]:
            with pytest.raises(ParameterError) as caught:
                call()
            assert caught.value.param == param
        assert len(branch) == len(TEXT)
    with pytest.raises(UnsupportedError, match="closed"):
        branch.feed("a")


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 80])
def test_a_saved_branch_goes_on_in_another_process_as_here(model, path, tmp_path, n):
    with model.branch(TEXT[:n]) as branch:
        branch.save(tmp_path / "s.session")
        expected = branch.logits
        after = branch.feed("abc")
    other = gptx.load(path)
    with other.restore(tmp_path / "s.session") as restored:
        assert other._engine.stats()["rows"] == 1
        assert restored.ids == model.tokenizer.encode(TEXT[:n])
        assert np.array_equal(restored.logits, expected)
        assert np.array_equal(restored.feed("abc"), after)


def test_a_session_of_another_model_or_mode_is_refused(model, path, tmp_path):
    with model.branch(TEXT) as branch:
        branch.save(tmp_path / "s.session")
        with pytest.raises(ParameterError, match="force"):
            branch.save(tmp_path / "s.session")
        branch.save(tmp_path / "s.session", force=True)
    write_model(
        tmp_path / "other.gptx", block_size=160, n_embd=48, n_head=3, layer_norm_epsilon=1e-3
    )
    for other, param in [
        (gptx.load(tmp_path / "other.gptx"), "model"),
        (gptx.load(path, kv_cache_dtype="bfloat16"), "kv_cache_dtype"),
    ]:
        with pytest.raises(ParameterError) as caught:
            other.restore(tmp_path / "s.session")
        assert caught.value.param == param
    with pytest.raises(FileNotFoundError):
        model.restore(tmp_path / "none.session")


def test_every_flipped_bit_and_every_cut_of_a_session_is_found(model, tmp_path):
    with model.branch("abc") as branch:
        branch.save(tmp_path / "s.session")
    data = (tmp_path / "s.session").read_bytes()
    damaged = tmp_path / "damaged.session"
    rng = np.random.default_rng(0)
    places = {*range(400), *rng.integers(0, len(data), 200).tolist()}
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        with pytest.raises(ModelFileError):
            model.restore(damaged)
    for length in (0, 1, 15, 16, 31, 32, 100, len(data) // 2, len(data) - 1):
        damaged.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            model.restore(damaged)
