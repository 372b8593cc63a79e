"""Tokenizers of other programs: the same tokens as they give, or a refusal that says why."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gptx.checkpoints.split_pattern import translate
from gptx.checkpoints.tokenizer_files import from_chars, from_file, from_folder, gpt2_spec
from gptx.checkpoints.vocabulary import alphabet
from gptx.errors import TokenizeError
from gptx.tokenizer import GPT2_PATTERN, Tokenizer
from tokenizer_samples import byte_spec, random_texts, trained

CORPUS = [
    "the cat sat on the mat, and the dog's bone isn't there",
    "床前明月光，疑是地上霜。",
    "12 345  \n",
] * 9
HAN_SPLIT = (
    r"\p{Han}|'(?:[sdmt]|ll|ve|re)| ?(?:(?!\p{Han})\p{L})+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)
CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LETTERS = {byte: char for char, byte in alphabet().items()}


def _json_values(**changes: Any) -> dict[str, Any]:
    """A small tokenizer.json: all bytes and two merges."""
    vocab = {LETTERS[b]: b for b in range(256)} | {"th": 256, "the": 257}
    model = {"type": "BPE", "vocab": vocab, "merges": ["t h", ["th", "e"]]}
    values: dict[str, Any] = {
        "added_tokens": [{"id": 258, "content": "<|endoftext|>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "decoder": {"type": "ByteLevel"},
        "model": model | changes.pop("model", {}),
    }
    return values | changes


def _write(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def _write_pair(folder: Path, merges: list[str], entries: list[str], first: str | None) -> None:
    vocab = {LETTERS[b]: i for i, b in enumerate([*range(33, 256), *range(33)])}
    vocab |= {entry: 256 + i for i, entry in enumerate(entries)}
    _write(folder / "vocab.json", vocab)
    lines = merges if first is None else [first, *merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_demo_tokenizer_gives_the_tokens_of_tokenizers(shared_dir: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference = tokenizers.Tokenizer.from_file(str(shared_dir / "demo" / "tokenizer.json"))
    spec = from_folder(shared_dir / "demo")
    assert spec is not None
    assert (spec.n_vocab, spec.special_tokens, spec.merge_order) == (8192, {"<|endoftext|>": 0}, ())
    tokenizer = Tokenizer(spec)
    for text in random_texts(seed=11, count=4000):
        assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.encode("a<|endoftext|>", allow_special=True)[-1] == 0


def test_gpt2_from_every_kind_of_file_is_the_same(tmp_path: Path) -> None:
    try:
        spec = gpt2_spec()
    except TokenizeError as error:
        pytest.skip(str(error))
    entries = ["".join(LETTERS[b] for b in token) for token in spec.tokens if token]
    vocab = {entry: i for i, entry in enumerate(entries)} | spec.special_tokens
    assert len(spec.to_json()) < 1_000_000
    (tmp_path / "gpt2.tiktoken").write_bytes(
        b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(spec.tokens) if t)
    )
    assert from_folder(tmp_path) == from_file(tmp_path / "gpt2.tiktoken") == spec
    merges = _merges_of(spec.tokens)  # type: ignore[arg-type]
    _write(tmp_path / "encoder.json", vocab)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
    assert from_folder(tmp_path) == from_file(tmp_path / "vocab.bpe") == spec


def _merges_of(tokens: tuple[bytes, ...]) -> list[str]:
    """The merge behind each token: merging its bytes with the earlier ranks leaves two parts."""
    ranks = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens[256:]:
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(tokens)) for a, b in pairwise(parts)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append(" ".join("".join(LETTERS[b] for b in part) for part in parts))
    return merges


@pytest.mark.parametrize("split", [HAN_SPLIT, CL100K_SPLIT, r"\s+", r"\p{L}+(?!x)|\d", None])
def test_a_trained_tokenizer_gives_the_tokens_of_tokenizers(
    tmp_path: Path, split: str | None
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    steps: Any = pre.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is not None:
        steps = pre.Sequence([pre.Split(tokenizers.Regex(split), "isolated"), steps])
    reference: Any = trained(tmp_path, CORPUS, steps)
    tokenizer = Tokenizer(from_file(tmp_path / "tokenizer.json"))
    for text in random_texts(seed=12, count=1500):
        assert tokenizer.encode(text) == reference.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_prefix_space_is_honoured_like_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    reference: Any = trained(tmp_path, CORPUS, tokenizers.pre_tokenizers.ByteLevel())
    spec = from_file(tmp_path / "tokenizer.json")
    assert spec.add_prefix_space
    for text in random_texts(seed=13, count=500):
        assert Tokenizer(spec).encode(text) == reference.encode(text).ids


def test_added_tokens_match_like_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference: Any = trained(tmp_path, CORPUS, pre)
    reference.add_tokens(["<user>", "<user>x", "the", "  "])
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(from_file(tmp_path / "tokenizer.json"))
    rng = random.Random(14)
    parts = ["<user>", "<", "x", "the", " ", "  ", "床", "<|endoftext|>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randrange(9)))
        assert tokenizer.encode(text, allow_special=True) == reference.encode(text).ids


def test_random_merges_in_any_order_give_the_tokens_of_tokenizers(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(15)
    for _ in range(150):
        vocab, merges = _random_merges(rng)
        reference = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
        reference.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False)
        reference.save(str(tmp_path / "tokenizer.json"))
        tokenizer = Tokenizer(from_file(tmp_path / "tokenizer.json"))
        for _ in range(30):
            text = "".join(rng.choices("abc ", weights=[5, 4, 3, 1], k=rng.randrange(25)))
            assert tokenizer.encode(text) == reference.encode(text).ids


def _random_merges(rng: random.Random) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges that no training would give: unordered, ambiguous, unreachable, ids at random."""
    made = ["a", "b", "c"]
    merges: dict[tuple[str, str], None] = {}
    for _ in range(rng.randrange(1, 25)):
        pair = (rng.choice(made), rng.choice(made))
        if len("".join(pair)) <= 9:
            merges[pair] = None
            made.append("".join(pair))
    order = list(merges)
    if rng.random() < 0.4:
        rng.shuffle(order)
    entries = [LETTERS[b] for b in range(256)] + sorted({e for e in made if len(e) > 1})
    ids = rng.sample(range(3 * len(entries)), len(entries))
    return dict(zip(entries, ids, strict=True)), order


def test_tokens_that_no_merge_makes_stay_decodable(tmp_path: Path) -> None:
    values = _json_values()
    values["model"]["vocab"]["Ġcat"] = 259
    spec = from_file(_write(tmp_path / "tokenizer.json", values))
    tokenizer = Tokenizer(spec)
    assert tokenizer.decode([259, 257]) == " catthe"
    assert tokenizer.encode(" cat") == list(b" cat")
    assert tokenizer.encode("the") == [257]


def test_a_special_token_that_is_ordinary_stays_ordinary(tmp_path: Path) -> None:
    values = _json_values(added_tokens=[{"id": 257, "content": "the", "special": True}])
    tokenizer = Tokenizer(from_file(_write(tmp_path / "tokenizer.json", values)))
    assert tokenizer.encode("the") == [257]
    assert tokenizer.spec.special_tokens == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "WordPiece"}}, "model.type: expected BPE, got 'WordPiece'"),
        ({"model": {"type": "Unigram"}}, "model.type: expected BPE, got 'Unigram'"),
        ({"model": {"dropout": 0.1}}, "model.dropout: expected none"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "model.end_of_word_suffix"),
        ({"model": {"continuing_subword_prefix": "##"}}, "model.continuing_subword_prefix"),
        ({"model": {"byte_fallback": True}}, "model.byte_fallback"),
        ({"model": {"vocab": []}}, "model.vocab: expected an object"),
        ({"model": {"vocab": {}, "merges": []}}, "vocabulary: expected tokens"),
        ({"model": {"vocab": {"a": "0"}}}, r"model.vocab\['a'\]: expected an id"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "not the id of 'a'"),
        ({"model": {"merges": None}}, "model.merges: expected a list"),
        ({"model": {"merges": ["t h e"]}}, "merge 0: expected two tokens"),
        ({"model": {"merges": ["t h", 5]}}, "merge 1: expected two tokens"),
        ({"model": {"merges": ["x y"]}}, r"merge 0 \('x' with 'y'\): .* 'xy' is not"),
        ({"model": {"merges": ["t h", "t h"]}}, "merge 1 .* it is merge 0 too"),
        ({"model": {"vocab": {"a": 0, "b": 2**40}, "merges": []}}, "expected ids below"),
        ({"normalizer": {"type": "NFC"}}, "normalizer: expected null, got 'NFC'"),
        ({"decoder": {"type": "Metaspace"}}, "decoder: expected ByteLevel, got 'Metaspace'"),
        ({"pre_tokenizer": None}, r"pre_tokenizer: expected ByteLevel.*got \['none'\]"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer: .*Whitespace"),
        (
            {"added_tokens": [{"id": 258, "content": "<m>", "lstrip": True}]},
            "lstrip: expected false",
        ),
        ({"added_tokens": [{"id": -1, "content": "<m>"}]}, "id: expected an id"),
        ({"added_tokens": [{"id": 3}]}, "content: expected a text"),
        ({"added_tokens": 5}, "added_tokens: expected a list"),
        ({"model": None}, "model"),
    ],
)
def test_what_gptx_does_not_run_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = (
        _json_values() | changes if changes.get("model", 0) is None else _json_values(**changes)
    )
    with pytest.raises(TokenizeError, match=message) as info:
        from_folder(_write(tmp_path / "tokenizer.json", values).parent)
    assert str(tmp_path) in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"behavior": "Removed"}, "Split.behavior: expected Isolated, got 'Removed'"),
        ({"invert": True}, "Split.invert: expected false"),
        ({"pattern": {"String": " "}}, "Split.pattern: expected a Regex"),
        ({"pattern": {"Regex": r"\w+"}}, r"Split: '\\\\w' at index 0 of the pattern"),
    ],
)
def test_a_split_of_another_kind_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    split = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    steps = {"type": "Sequence", "pretokenizers": [split | change, byte_level]}
    path = _write(tmp_path / "tokenizer.json", _json_values(pre_tokenizer=steps))
    with pytest.raises(TokenizeError, match=message):
        from_file(path)


def test_ignore_merges_is_refused_where_it_would_change_tokens(tmp_path: Path) -> None:
    values = _json_values(model={"ignore_merges": True})
    from_file(_write(tmp_path / "tokenizer.json", values))
    values["model"]["vocab"]["Ġcat"] = 259
    with pytest.raises(TokenizeError, match="ignore_merges: expected false"):
        from_file(_write(tmp_path / "tokenizer.json", values))


@pytest.mark.parametrize("first", ["#version: 0.2", None])
def test_the_first_line_of_merges_is_skipped_only_if_it_says_version(
    tmp_path: Path, first: str | None
) -> None:
    _write_pair(tmp_path, ["t h", "th e"], ["th", "the", "<|endoftext|>"], first)
    spec = from_folder(tmp_path)
    assert spec is not None
    assert spec.special_tokens == {"<|endoftext|>": 258}
    assert Tokenizer(spec).encode("the") == [257]
    assert from_file(tmp_path / "vocab.json") == from_file(tmp_path / "merges.txt") == spec


@pytest.mark.parametrize(
    ("merges", "entries", "message"),
    [
        (["th e"], ["th", "the"], r"token 256 \('th'\): expected a merge in merges.txt"),
        (["t h", "th e"], ["th"], r"merge 1 \('th' with 'e'\).*'the' is not"),
        (["t h", "the"], ["th", "the"], "line 3: expected two tokens and a space, got 'the'"),
        (["t  h"], ["th"], "line 2: expected two tokens"),
    ],
)
def test_files_that_disagree_are_refused_at_the_first_place(
    tmp_path: Path, merges: list[str], entries: list[str], message: str
) -> None:
    _write_pair(tmp_path, merges, entries, "#version: 0.2")
    with pytest.raises(TokenizeError, match=message):
        from_folder(tmp_path)


def test_tokens_beside_a_vocabulary_are_special_or_added_as_the_folder_says(tmp_path: Path) -> None:
    _write_pair(tmp_path, ["t h"], ["th", "[PAD]"], None)
    _write(tmp_path / "added_tokens.json", {"<pad>": 300, "<user>": 301})
    _write(tmp_path / "special_tokens_map.json", {"pad_token": {"content": "<pad>"}})
    entry = {"content": "<bot>", "special": False}
    _write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"302": entry}})
    spec = from_folder(tmp_path)
    assert spec is not None
    assert spec.special_tokens == {"[PAD]": 257, "<pad>": 300}
    assert spec.added_tokens == {"<user>": 301, "<bot>": 302}


def test_gpt2_classes_of_transformers_take_the_prefix_from_the_config(tmp_path: Path) -> None:
    byte_level = {"type": "ByteLevel", "add_prefix_space": True}
    _write(tmp_path / "tokenizer.json", _json_values(pre_tokenizer=byte_level))
    assert from_file(tmp_path / "tokenizer.json").add_prefix_space
    _write(tmp_path / "tokenizer_config.json", {"tokenizer_class": "GPT2Tokenizer"})
    assert not from_file(tmp_path / "tokenizer.json").add_prefix_space


def test_ranks_are_read_with_the_split_of_gpt2(tmp_path: Path) -> None:
    spec = byte_spec(b"th", b"the")
    lines = [b"%s %d" % (base64.b64encode(t), i) for i, t in enumerate(spec.tokens) if t]
    path = tmp_path / "own.tiktoken"
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert from_folder(tmp_path) == from_file(path) == spec
    for broken in (b"!! 300", b"YQ== x", b"YWI= 5", b"YQ==", b"th= 300"):
        path.write_bytes(b"\n".join([*lines[:40], broken]))
        with pytest.raises(TokenizeError, match="line 41: expected base64 and a rank"):
            from_file(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", b"[PAD]\n", "expected byte-level BPE, got WordPiece"),
        ("spiece.model", b"\n\x0e", "expected byte-level BPE, got SentencePiece"),
        ("merges.txt", b"a b\n", "expected vocab.json with merges.txt, got one of them"),
        ("tokenizer.json", b"{", "expected JSON"),
        ("tokenizer.json", b"[" * 100_000, "expected JSON"),
        ("tokenizer.json", b"\xff", "expected UTF-8"),
        ("tokenizer.json", b"[]", "content: expected an object"),
    ],
)
def test_a_folder_with_another_kind_of_tokenizer_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizeError, match=message):
        from_folder(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert from_folder(tmp_path) is None
    with pytest.raises(TokenizeError, match="found none"):
        from_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        from_file(tmp_path / "absent.json")
    (tmp_path / "other.bin").write_bytes(b"\x80\x04\x95")
    with pytest.raises(TokenizeError, match="got a file that begins with"):
        from_file(tmp_path / "other.bin")


@pytest.mark.parametrize(
    "stoi",
    [
        {},
        {"ab": 0},
        {"": 0},
        {1: 0},
        {"a": -1},
        {"a": True},
        {"a": 0, "b": 0},
        {"\ud800": 0},
        {"a": 1.0},
        {"a": 2**40},
    ],
)
def test_a_table_that_is_none_of_characters_is_refused(stoi: dict[Any, Any]) -> None:
    with pytest.raises(TokenizeError, match="stoi"):
        from_chars(stoi)


def test_patterns_become_what_every_engine_understands_alike() -> None:
    assert translate(GPT2_PATTERN) == GPT2_PATTERN
    assert translate(CL100K_SPLIT) == CL100K_SPLIT
    assert r"(?!\p{Han})" not in translate(HAN_SPLIT)
    assert translate(r"(a)$|\P{^L}|[\s\S]") == r"(?:a)(?![^\n])|\p{L}|[\s\S]"
    assert translate(r"\s+") == r"\s+|(?:(?!\s+)[\s\S])+"


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a*",
        "(?=a)",
        r"\bx",
        "^a",
        "(?i)a",
        "(?i:st)",
        "(?i:é)",
        "[[:alpha:]]",
        "[a&&b]",
        "[]",
        "(a",
        "[a",
        "a)",
        "a{,3}",
        "a{2}+",
        "a**",
        "(?<n>a)",
        r"\1",
        "\\",
        r"\p{Foo}",
        r"\X",
        "(" * 9999,
    ],
)
def test_a_construct_that_engines_read_differently_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        translate(pattern)


def test_random_patterns_split_like_tokenizers() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    regex = pytest.importorskip("regex")
    atoms = [
        r"\p{L}",
        r"\p{N}",
        r"\s",
        r"[^\s\p{L}\p{N}]",
        r"\p{Han}",
        "[a-c]",
        r"\S",
        "x",
        " ",
        "(?:'s)",
        r"\d",
        r"[\r\n]",
        r"(?:(?!\p{Han})\p{L})",
        "(ab|cd)",
        "(?i:a|'b)",
        r"\P{L}",
        r"[\-a^]",
        ".",
        "-",
        "#",
        "(?>a|ab)",
    ]
    ends = ["", "", r"(?!\S)", "$", "(?=b)", "(?<!a)"]
    rng = random.Random(16)
    for _ in range(150):
        branches = [
            "".join(
                rng.choice(atoms) + rng.choice(["", "", "+", "?", "++", "{1,3}"])
                for _ in range(rng.randrange(1, 4))
            )
            + rng.choice(ends)
            for _ in range(rng.randrange(1, 5))
        ]
        pattern = "|".join(branches)
        try:
            ours = regex.compile(translate(pattern))
        except ValueError:
            continue
        theirs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for _ in range(10):
            text = "".join(rng.choices("aabcdxAB'sS \n\r\t-1²床ş#^", k=rng.randrange(12)))
            assert ours.findall(text) == [piece for piece, _ in theirs.pre_tokenize_str(text)]
