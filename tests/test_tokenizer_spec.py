"""The JSON of a tokenizer: one text per value, bounded, anything else refused."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptx.errors import ParameterError
from gptx.tokenizer import GPT2_PATTERN, Tokenizer, TokenizerSpec
from tokenizer_samples import byte_spec

SPEC = TokenizerSpec(
    "bpe",
    (b"a", None, b"b", b"ab", b"\xff\x00", b"c"),
    GPT2_PATTERN,
    {"<|endoftext|>": 9, "<s>": 1},
    {"<user>": 7},
    (0, 2, 5, 4, 3),
    add_prefix_space=True,
)


def test_a_spec_survives_its_json() -> None:
    for spec in (
        SPEC,
        byte_spec(b"ab"),
        TokenizerSpec("chars", (b"a", None, b"\xe5\xba\x8a"), "", {}),
    ):
        text = spec.to_json()
        assert text.isascii()
        assert TokenizerSpec.from_json(text) == spec
        assert TokenizerSpec.from_json(text).to_json() == text


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(
        st.none() | st.binary(min_size=1, max_size=5), min_size=1, max_size=30, unique=True
    ),
    special=st.dictionaries(st.text("ab<|>床", min_size=1), st.integers(40, 2**31 - 1), max_size=4),
)
def test_any_vocabulary_survives_its_json(
    tokens: list[bytes | None], special: dict[str, int]
) -> None:
    if not any(tokens) or len(set(special.values())) < len(special):
        return
    spec = TokenizerSpec("bpe", tuple(tokens), GPT2_PATTERN, special)
    assert TokenizerSpec.from_json(spec.to_json()) == spec
    assert Tokenizer(spec).n_vocab == spec.n_vocab


def test_equal_tokenizers_have_equal_json() -> None:
    one = TokenizerSpec("bpe", (b"a", b"b", None), "x", {"s": 5, "t": 4}, {}, (0, 1))
    two = TokenizerSpec("bpe", (b"a", b"b"), "x", {"t": 4, "s": 5})
    assert one == two
    assert one.to_json() == two.to_json()
    assert list(one.special_tokens) == ["t", "s"]
    assert (one.n_vocab, one.merge_order) == (6, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "wordpiece"}, "kind: expected one of bpe, chars"),
        ({"tokens": ()}, "at least one token"),
        ({"tokens": (None, None)}, "at least one token"),
        ({"tokens": [b"a"]}, "tokens: expected a tuple"),
        ({"tokens": (b"a", b"")}, r"tokens\[1\]: expected 1 to 65535 bytes"),
        ({"tokens": (b"a", "b")}, r"tokens\[1\]"),
        ({"tokens": (b"a", b"b", b"a")}, r"tokens\[2\]: expected another token than that of id 0"),
        ({"pattern": ""}, "a pattern for bpe"),
        ({"pattern": "a" * 70_000}, "pattern: expected at most"),
        ({"pattern": "\ud800"}, "without lone surrogates"),
        ({"special_tokens": {"x": 0}}, "not the id of the token b'a'"),
        ({"special_tokens": {"x": 5, "y": 5}}, "not the id of 'x'"),
        ({"special_tokens": {"x": 5}, "added_tokens": {"y": 5}}, "not the id of 'x'"),
        ({"special_tokens": {"": 5}}, "at least one character"),
        ({"special_tokens": {"x": -1}}, "an id from 0 to"),
        ({"special_tokens": {"x": True}}, "an id from 0 to"),
        ({"special_tokens": {"x": 2**31}}, "an id from 0 to"),
        ({"special_tokens": {"\udc00": 5}}, "without lone surrogates"),
        ({"special_tokens": []}, "special_tokens: expected a dict"),
        ({"added_tokens": {"y": 0}}, "not the id of the token b'a'"),
        ({"merge_order": (0, 0)}, "each id once"),
        ({"merge_order": (0, 7)}, "ids of tokens"),
        ({"merge_order": [0]}, "a tuple of token ids"),
        ({"add_prefix_space": 1}, "true or false"),
        ({"kind": "chars", "pattern": "", "tokens": (b"ab",)}, "one character in UTF-8"),
        ({"kind": "chars", "pattern": "", "tokens": (b"\xff",)}, "one character in UTF-8"),
        ({"kind": "chars"}, "none for chars"),
    ],
)
def test_a_field_out_of_range_is_named(change: dict[str, object], message: str) -> None:
    values: dict[str, object] = {
        "kind": "bpe",
        "tokens": (b"a", b"b"),
        "pattern": GPT2_PATTERN,
        "special_tokens": {},
    }
    with pytest.raises(ParameterError, match=message):
        TokenizerSpec(**(values | change))  # type: ignore[arg-type]


def test_another_spelling_of_the_same_json_is_refused() -> None:
    text = SPEC.to_json()
    values = json.loads(text)
    order = (0, 2, 3, 4, 5)
    spelled_out = values | {"merge_order": order}
    for other in (
        text + " ",
        json.dumps(values, sort_keys=True),
        json.dumps(dict(reversed(values.items())), separators=(",", ":")),
        text.replace('"kind"', '"\\u006bind"'),
        text.replace('"kind":"bpe"', '"kind":"bpe","kind":"bpe"'),
        json.dumps(spelled_out, separators=(",", ":"), sort_keys=True),
        text.replace("true", "1"),
        text.replace(":9", ":9.0"),
    ):
        assert other != text
        with pytest.raises(ValueError, match="expected"):
            TokenizerSpec.from_json(other)


def test_every_changed_character_of_the_json_is_refused_or_means_something_else() -> None:
    text = SPEC.to_json()
    rng = random.Random(5)
    for index in range(len(text)):
        other = text[:index] + chr(rng.randrange(32, 127)) + text[index + 1 :]
        try:
            spec = TokenizerSpec.from_json(other)
        except ValueError:
            continue
        assert (spec == SPEC) == (other == text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "5",
        "[" * 100_000,
        "{}",
        '{"a":' * 50_000,
        "1" * 5000,
        " " * (9 << 20),
    ],
)
def test_text_that_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        TokenizerSpec.from_json(text)


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        {},
        {"bytes": "YQ==", "lengths": "AQ=="},
        {"bytes": "YQ==", "lengths": "AgA="},
        {"bytes": "Y", "lengths": "AQA="},
        {"bytes": 3, "lengths": "AQA="},
        {"bytes": "é", "lengths": ""},
        {"bytes": "YR==", "lengths": "AQA="},
    ],
)
def test_damaged_tokens_are_refused(tokens: object) -> None:
    values = json.loads(byte_spec().to_json()) | {"tokens": tokens}
    with pytest.raises(ValueError, match=r"\w"):
        TokenizerSpec.from_json(json.dumps(values, separators=(",", ":"), sort_keys=True))
