import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from training_samples import make_text

from gptx.checkpoints.tokenizer_files import from_chars, from_file
from gptx.errors import ParameterError, TokenizeError
from gptx.tokenizer import Tokenizer
from gptx.training.bpe import Encoder, load_tokenizer, tokenizer_from_spec, train_bpe

TEXTS = [make_text(300, seed=1), "春风又绿江南岸，明月何时照我还。" * 50, "don't stop 123\n\n  now"]


@pytest.fixture(scope="module")
def encoder():
    return Encoder(train_bpe(TEXTS, 400))


def test_the_end_of_text_is_id_zero_and_the_size_is_kept(encoder):
    assert encoder.eot_id == 0
    assert encoder.start_ids == [0]
    assert encoder.n_vocab <= 400


def test_a_small_corpus_needs_fewer_tokens_than_allowed():
    assert Encoder(train_bpe(["aa"], 5000)).n_vocab == 258


def test_a_han_character_is_a_piece_by_itself(encoder):
    assert len(encoder.encode_batch(["春风明月"])[0]) == 4
    merged = Encoder(train_bpe(TEXTS, 400, "gpt2"))
    assert len(merged.encode_batch(["春风又绿江南岸"])[0]) < 7


@given(st.text())
@settings(max_examples=100, deadline=None)
def test_every_text_comes_back(encoder, text):
    assert encoder.decode(encoder.encode_batch([text])[0]) == text


def test_text_that_spells_the_end_of_text_is_text(encoder):
    ids = encoder.encode_batch(["a<|endoftext|>b"])[0]
    assert 0 not in ids
    assert encoder.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize(("vocab_size", "pattern"), [(256, None), (300, "(")])
def test_arguments_that_make_no_tokenizer_are_named(vocab_size, pattern):
    with pytest.raises(ParameterError) as caught:
        train_bpe(TEXTS, vocab_size, pattern)
    assert caught.value.param == ("pattern" if pattern else "vocab_size")


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("the princs wp春风又。《 \n'0é\U0001f600<|endoftext|>")))
def test_gptx_reads_the_tokenizer_that_was_trained(encoder, tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "trained.json"
    if not path.exists():
        encoder.tokenizer.save(str(path))
    assert Tokenizer(from_file(path)).encode(text) == encoder.encode_batch([text])[0]


def test_a_stored_tokenizer_becomes_the_one_it_was(encoder, tmp_path):
    encoder.tokenizer.save(str(tmp_path / "tokenizer.json"))
    spec = from_file(tmp_path / "tokenizer.json")
    rebuilt = tokenizer_from_spec(spec)
    assert rebuilt.get_vocab() == encoder.tokenizer.get_vocab()
    assert Encoder(rebuilt).encode_batch(TEXTS) == encoder.encode_batch(TEXTS)
    rebuilt.save(str(tmp_path / "again.json"))
    assert from_file(tmp_path / "again.json") == spec


def test_the_demo_tokenizer_survives_the_way_through_its_spec(shared_dir):
    path = shared_dir / "demo" / "tokenizer.json"
    original = HFTokenizer.from_file(str(path))
    rebuilt = tokenizer_from_spec(from_file(path))
    text = "Once upon a time, don't!  床前明月光，疑是地上霜。\n 12345 " + TEXTS[0]
    assert rebuilt.encode(text).ids == original.encode(text).ids


def test_a_vocabulary_of_characters_is_kept():
    spec = from_chars({c: i for i, c in enumerate("\n abc春")})
    encoder = Encoder(tokenizer_from_spec(spec))
    assert encoder.encode_batch(["ab\n春 c"])[0] == [2, 3, 0, 5, 1, 4]
    assert encoder.decode([2, 3, 0, 5, 1, 4]) == "ab\n春 c"
    assert (encoder.eot_id, encoder.start_ids, encoder.n_vocab) == (None, [0], 6)
    assert from_chars(encoder.characters) == spec
    with pytest.raises(TokenizeError, match="cannot be encoded"):
        encoder.encode_batch(["x"])


def test_a_damaged_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizeError, match="tokenizer.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
