"""Text to ids and back: equal to tiktoken, total on str, exact when streamed."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptx.tokenizer.bpe
from gptx.checkpoints.tokenizer_files import from_chars, gpt2_spec
from gptx.errors import ParameterError, TokenIdError, TokenizeError
from gptx.tokenizer import GPT2_PATTERN, StopMatcher, Tokenizer, TokenizerSpec
from tokenizer_samples import byte_spec, random_text, random_texts

tiktoken = pytest.importorskip("tiktoken")

SMALL = byte_spec(
    b"  ", b"    ", b"th", b"the", b" the", b"\xe5\xba\x8a", b"^^", special={"<|endoftext|>": 270}
)
HAN_PATTERN = r"\p{Han}|" + GPT2_PATTERN.replace(r"\p{L}+", r"[^\P{L}\p{Han}]+", 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    try:
        return Tokenizer(gpt2_spec())
    except TokenizeError as error:
        pytest.skip(str(error))


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes texts of a few characters long ones."""
    monkeypatch.setattr(gptx.tokenizer.bpe, "_CHUNK", 5)
    monkeypatch.setattr(gptx.tokenizer.bpe, "_LIMIT", 12)


def _reference(spec: TokenizerSpec) -> tiktoken.Encoding:
    ranks = {token: i for i, token in enumerate(spec.tokens) if token is not None}
    return tiktoken.Encoding("test", pat_str=spec.pattern, mergeable_ranks=ranks, special_tokens={})


def test_random_unicode_gets_the_tokens_of_tiktoken(gpt2: Tokenizer) -> None:
    reference = tiktoken.get_encoding("gpt2")
    for text in random_texts(seed=1, count=5000):
        assert gpt2.encode(text) == reference.encode_ordinary(text)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_any_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer(SMALL)
    ids = tokenizer.encode(text)
    assert ids == _reference(SMALL).encode_ordinary(text)
    assert tokenizer.decode(ids) == text


@pytest.mark.usefixtures("short_limits")
@pytest.mark.parametrize("pattern", [GPT2_PATTERN, HAN_PATTERN, r"\s*\p{L}+|[\s\S]"])
def test_long_texts_get_the_same_tokens_as_short_ones(pattern: str) -> None:
    spec = byte_spec(*SMALL.tokens[256:], pattern=pattern)  # type: ignore[arg-type]
    tokenizer, reference = Tokenizer(spec), _reference(spec)
    for text in random_texts(seed=2, count=3000):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


@pytest.mark.usefixtures("short_limits")
def test_characters_newer_than_a_table_of_unicode_split_like_tiktoken() -> None:
    newest = [chr(c) for c in range(0x2E000, 0x34000, 7)] + [chr(c) for c in range(0x550, 0x600)]
    rng = random.Random(3)
    tokenizer, reference = Tokenizer(SMALL), _reference(SMALL)
    for _ in range(300):
        text = "".join(rng.choice([*rng.choices(newest, k=3), "a", "1", " "]) for _ in range(30))
        assert tokenizer.encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize(
    ("head", "count"), [(" ", 1_000_000), ("\n", 1_000_001), ("\u3000", 1_000_000), ("床", 999_999)]
)
def test_a_million_times_one_character_and_a_letter_encode(head: str, count: int) -> None:
    tokenizer = Tokenizer(SMALL)
    text = head * count + "x"
    begin = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - begin < 20
    assert tokenizer.decode(ids) == text
    assert ids[-1] == ord("x")


def test_a_million_spaces_before_a_letter_are_cut_before_the_last() -> None:
    ids = Tokenizer(SMALL).encode(" " * 1_000_001 + "the")
    assert ids == [257] * 250_000 + [260]


def test_a_long_run_of_one_sign_takes_linear_time() -> None:
    begin = time.perf_counter()
    assert Tokenizer(SMALL).encode("^" * 1_000_000) == [262] * 500_000
    assert time.perf_counter() - begin < 20


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "床\udc80x", "\ud83d\ude00"])
def test_a_lone_surrogate_is_refused_with_its_index(text: str) -> None:
    index = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    with pytest.raises(TokenizeError, match=rf"U\+{ord(text[index]):04X} at index {index}"):
        Tokenizer(SMALL).encode(text)


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"]])
def test_what_is_not_a_str_is_refused(text: object) -> None:
    with pytest.raises(ParameterError, match="text: expected a str"):
        Tokenizer(SMALL).encode(text)  # type: ignore[arg-type]


def test_text_that_spells_a_special_token_is_ordinary_unless_allowed() -> None:
    tokenizer = Tokenizer(SMALL)
    text = "the<|endoftext|> the"
    ordinary = tokenizer.encode(text)
    assert 270 not in ordinary
    assert tokenizer.encode(text, allow_special=True) == [259, 270, 260]
    assert tokenizer.decode(ordinary) == tokenizer.decode([259, 270, 260]) == text
    assert tokenizer.eos_token_id == 270


def test_the_longest_special_token_wins() -> None:
    tokenizer = Tokenizer(byte_spec(special={"<a>": 300, "<a><b>": 301, "<b>": 302}))
    assert tokenizer.encode("<a><b><a>", allow_special=True) == [301, 300]


def test_added_tokens_are_found_in_every_text() -> None:
    spec = TokenizerSpec("bpe", byte_spec().tokens, GPT2_PATTERN, {}, {"<user>": 256})
    assert Tokenizer(spec).encode("a<user>b") == [97, 256, 98]


def test_a_prefix_space_is_added_to_each_part_that_lacks_one() -> None:
    spec = TokenizerSpec(
        "bpe", byte_spec().tokens, GPT2_PATTERN, {}, {"<u>": 256}, add_prefix_space=True
    )
    tokenizer = Tokenizer(spec)
    assert [tokenizer.encode(text) for text in ("", "a", " a", "\na")] == [
        [],
        [32, 97],
        [32, 97],
        [32, 10, 97],
    ]
    assert tokenizer.encode("a<u>b") == [32, 97, 256, 32, 98]


def test_an_order_of_merges_apart_from_the_ids_is_followed() -> None:
    single = byte_spec().tokens
    order = (*range(256), 258, 256, 257)
    spec = TokenizerSpec("bpe", (*single, b"ab", b"abc", b"bc"), GPT2_PATTERN, {}, {}, order)
    assert Tokenizer(spec).encode("abc") == [257]
    assert Tokenizer(spec).encode("abd abcc") == [256, 100, 32, 257, 99]
    assert Tokenizer(byte_spec(b"ab", b"bc")).encode("abc") == [256, 99]
    swapped = TokenizerSpec(
        "bpe", (*single, b"ab", b"bc"), GPT2_PATTERN, {}, {}, (*range(256), 257, 256)
    )
    assert Tokenizer(swapped).encode("abc") == [97, 257]


def test_a_byte_without_a_token_is_named_with_its_character() -> None:
    tokens = tuple(None if b in (0xE5, ord("q")) else bytes([b]) for b in range(256))
    tokenizer = Tokenizer(TokenizerSpec("bpe", tokens, GPT2_PATTERN, {}))
    assert tokenizer.encode("no") == [110, 111]
    with pytest.raises(TokenizeError, match="byte 0xE5 of '床' at index 2"):
        tokenizer.encode("no床q")


def test_characters_map_one_to_one_and_an_unknown_one_is_named() -> None:
    tokenizer = Tokenizer(from_chars({"\n": 0, "a": 1, "床": 4}))
    assert tokenizer.encode("a床\n") == [1, 4, 0]
    assert tokenizer.decode([1, 4, 0]) == "a床\n"
    assert tokenizer.n_vocab == 5
    with pytest.raises(TokenizeError, match="got 'b' at index 2"):
        tokenizer.encode("aab")


@pytest.mark.parametrize("bad", [-1, 271, 2**70, True, 1.0, np.float32(1), "1", None, np.True_])
def test_a_bad_token_id_is_named_with_its_place(bad: object) -> None:
    tokenizer = Tokenizer(SMALL)
    with pytest.raises(TokenIdError, match=r"ids\[2\]: expected an integer from 0 to 270") as info:
        tokenizer.decode([1, 2, bad])  # type: ignore[list-item]
    assert (info.value.index, info.value.token_id, info.value.vocab_size) == (2, bad, 271)
    decoder = tokenizer.decoder()
    decoder.push(1)
    with pytest.raises(TokenIdError, match=r"ids\[1\]"):
        decoder.push(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", ["12", b"12", 5, None])
def test_ids_that_are_no_sequence_are_refused(bad: object) -> None:
    with pytest.raises(ParameterError, match="ids: expected a sequence of token ids"):
        Tokenizer(SMALL).decode(bad)  # type: ignore[arg-type]


def test_numpy_ids_are_accepted() -> None:
    tokenizer = Tokenizer(SMALL)
    for dtype in (np.int32, np.uint16, np.int64):
        assert tokenizer.decode(np.array([259, 97], dtype)) == "thea"  # type: ignore[arg-type]
    assert tokenizer.token_bytes(np.int64(260)) == b" the"  # type: ignore[arg-type]


def test_ids_of_the_model_without_a_token_decode_to_nothing() -> None:
    tokenizer = Tokenizer(SMALL, vocab_size=300)
    assert tokenizer.decode([97, 265, 299, 98]) == "ab"
    assert tokenizer.token_bytes(299) == b""
    assert tokenizer.token_bytes(270) == b"<|endoftext|>"
    with pytest.raises(TokenIdError):
        tokenizer.decode([300])


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.integers(0, 270), max_size=40))
def test_streamed_pieces_join_to_the_whole(ids: list[int]) -> None:
    _check_stream(Tokenizer(SMALL), ids)


def test_streamed_bytes_of_every_kind_join_to_the_whole() -> None:
    tokenizer = Tokenizer(SMALL)
    rng = random.Random(4)
    leads = [0x41, 0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xA0, 0xED, 0x9F, 0xF0, 0x90, 0xF4, 0x8F, 0xF5]
    for _ in range(20_000):
        _check_stream(tokenizer, rng.choices(leads, k=rng.randrange(1, 9)))
    for _ in range(300):
        whole = random_text(rng, 12)
        _check_stream(tokenizer, list(whole.encode()))
        assert tokenizer.decode(list(whole.encode())) == whole


def _check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    decoder = tokenizer.decoder()
    whole = tokenizer.decode(ids)
    done = ""
    for i in ids:
        done += decoder.push(i)
        assert whole.startswith(done)
    assert done + decoder.finish() == whole
    assert decoder.push(97) + decoder.finish() == "a"


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("ab床", max_size=4), max_size=8),
    stop=st.lists(st.text("ab床", min_size=1, max_size=4), max_size=4),
)
def test_the_stop_string_that_begins_first_wins(pieces: list[str], stop: list[str]) -> None:
    text = "".join(pieces)
    places = [text.find(s) for s in stop if s in text]
    expected = text[: min(places)] if places else text
    matcher = StopMatcher(stop)
    given_out, taken = "", ""
    for piece in pieces:
        given_out += matcher.push(piece)
        taken += piece
        assert expected.startswith(given_out)
        if not matcher.stopped:
            assert len(taken) - len(given_out) <= max(map(len, stop), default=1) - 1
    given_out += matcher.finish()
    assert given_out == expected
    assert matcher.stopped == bool(places)
    if places:
        assert text.startswith(matcher.matched or "?", min(places))
        assert matcher.push("more") == matcher.finish() == ""


def test_a_stop_string_across_pieces_never_shows() -> None:
    matcher = StopMatcher(["\n\nUser:", "END"])
    shown = [matcher.push(piece) for piece in ("Hi\n", "\nUs", "e", "less\n", "\nUser", ": no")]
    assert shown == ["Hi", "", "", "\n\nUseless", "", ""]
    assert matcher.stopped
    assert matcher.matched == "\n\nUser:"
    assert matcher.finish() == ""


@pytest.mark.parametrize("stop", ["", [""], [1], b"x", 5, [None]])
def test_a_stop_that_is_no_text_is_refused(stop: object) -> None:
    with pytest.raises(ParameterError, match="stop: expected"):
        StopMatcher(stop)  # type: ignore[arg-type]


def test_no_stop_passes_everything_on() -> None:
    for none in (None, [], ()):
        matcher = StopMatcher(none)
        assert matcher.push("abc") == "abc"
        assert not matcher.stopped


def test_import_and_decode_do_not_load_tiktoken() -> None:
    code = (
        "import sys; from gptx.tokenizer import Tokenizer, TokenizerSpec\n"
        "t = Tokenizer(TokenizerSpec('bpe', (b'a',), 'a', {})); assert t.decode([0]) == 'a'\n"
        "bad = {'tiktoken', 'regex', 'requests'} & set(sys.modules); assert not bad, bad"
    )
    path = [p for p in sys.path if p]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], check=True
    )
