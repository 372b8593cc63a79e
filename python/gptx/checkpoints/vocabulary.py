"""Byte-level BPE vocabularies: the printable alphabet, and merges turned into an order of ids."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gptx.errors import ParameterError, TokenizeError, shown
from gptx.tokenizer import TokenizerSpec

MAX_FILE = 64 << 20
"""Bytes of a file of a tokenizer; that of a vocabulary of 250,000 tokens takes about 17 million."""
MAX_MERGED_BYTES = 1024
"""Longest token that merges may make; GPT-2's longest has 128 bytes."""
MAX_UNUSED_IDS = 1 << 20

Merges = Sequence[tuple[str, str]]


def read_bytes(path: Path) -> bytes:
    """The content of a file of at most `MAX_FILE` bytes."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE + 1)
    expect(path, "size", len(data), len(data) <= MAX_FILE, f"at most {MAX_FILE} bytes")
    return data


def read_text(path: Path) -> str:
    """The content of a file in UTF-8, with or without a byte order mark."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TokenizeError(f"{path}: expected UTF-8, got byte {error.start}: {error}") from None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in a file; ``{}`` for one that is absent, where that may be."""
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise TokenizeError(f"{path}: expected JSON, got an error: {error}") from None
    return expect_object(path, "content", value)


def expect(path: Path, name: str, value: object, condition: bool, allowed: str) -> None:
    """Raises TokenizeError that names a value of a file unless the condition holds."""
    if not condition:
        raise TokenizeError(f"{path}: {name}: expected {allowed}, got {shown(value)}")


def expect_object(path: Path, name: str, value: object) -> dict[str, Any]:
    """``value``, which must be an object of a JSON file."""
    expect(path, name, value, isinstance(value, dict), "an object")
    return value  # type: ignore[return-value]


def checked_vocab(path: Path, name: str, vocab: object) -> dict[str, int]:
    """A dict from entry to id, each id once."""
    values = expect_object(path, name, vocab)
    entries: dict[int, str] = {}
    for entry, i in values.items():
        expect(path, f"{name}[{shown(entry)}]", i, type(i) is int and i >= 0, "an id")
        other = entries.setdefault(i, entry)
        expect(path, f"{name}[{shown(entry)}]", i, other == entry, f"not the id of {shown(other)}")
    return values


def by_id(path: Path | str, tokens: Mapping[int, bytes]) -> tuple[bytes | None, ...]:
    """Tokens in order of their ids, None in the gaps."""
    count = max(tokens) + 1
    if count > len(tokens) + MAX_UNUSED_IDS:
        raise TokenizeError(
            f"{path}: expected ids below {len(tokens) + MAX_UNUSED_IDS} for {len(tokens)} tokens, "
            f"got {count - 1}"
        )
    return tuple(tokens.get(i) for i in range(count))


@dataclass
class NamedTokens:
    """Tokens with a text of their own: special ones, and those that every text is searched for."""

    special: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)

    def add(self, path: Path, name: str, entry: object, token_id: object) -> None:
        """Takes an element of added_tokens, or a value of added_tokens_decoder."""
        values = expect_object(path, name, entry)
        text = values.get("content")
        expect(path, f"{name}.content", text, isinstance(text, str) and text != "", "a text")
        known = type(token_id) is int and token_id >= 0
        expect(path, f"{name}[{shown(text)}].id", token_id, known, "an id")
        for flag in ("single_word", "lstrip", "rstrip"):
            value = values.get(flag, False)
            expect(path, f"{name}[{shown(text)}].{flag}", value, not value, "false")
        named = self.special if values.get("special") else self.added
        named[text] = token_id  # type: ignore[index,assignment]


def byte_level_spec(
    path: Path,
    vocab: dict[str, int],
    merges: Merges,
    named: NamedTokens,
    pattern: str,
    *,
    add_prefix_space: bool = False,
) -> TokenizerSpec:
    """Puts a tokenizer together. A special token that is also an ordinary one stays ordinary.

    Raises:
        TokenizeError: the parts disagree; says where.
    """
    order = merge_order(path, vocab, merges)
    ordinary = set(order)
    special = {text: i for text, i in named.special.items() if i not in ordinary}
    hidden = {*special.values(), *(i for i in named.added.values() if i not in ordinary)}
    tokens = {i: token_bytes(entry) for entry, i in vocab.items() if i not in hidden}
    expect(path, "vocabulary", len(order), len(order) > 0, "tokens of single bytes and merges")
    try:
        return TokenizerSpec(
            "bpe", by_id(path, tokens), pattern, special, named.added, order, add_prefix_space
        )
    except ParameterError as error:
        raise TokenizeError(f"{path}: {error}") from None


def alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte (Radford et al., 2019): character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + n): byte for n, byte in enumerate(others)}
    return {chr(byte): byte for byte in printable} | shifted


_ALPHABET = alphabet()


def token_bytes(entry: str) -> bytes:
    """The bytes of a vocabulary entry; one outside the alphabet stands for its own UTF-8."""
    if all(char in _ALPHABET for char in entry):
        return bytes(_ALPHABET[char] for char in entry)
    return entry.encode("utf-8", "replace")


def merge_order(path: Path, vocab: dict[str, int], merges: Merges) -> tuple[int, ...]:
    """The ids that encoding can yield: those of single bytes, then those of merges, by rank.

    tiktoken merges any two neighbours whose concatenation has a rank, a list of merges only the
    pairs it holds. Both give the same for the tokens into which the merges turn their own bytes:
    whatever surrounds these bytes, what happens between their two ends is the same as in the
    token alone until a merge crosses an end. Other tokens appear in no encoding and are left out.

    Args:
        path: named in errors.
        vocab: entry -> id.
        merges: pairs of entries, the first merge first.

    Raises:
        TokenizeError: names the first merge that the vocabulary does not hold or that comes twice.
    """
    ranked: dict[tuple[int, int], tuple[int, int]] = {}
    merged: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        what = f"merge {rank} ({left[:40]!r} with {right[:40]!r})"
        for entry in (left, right, left + right):
            if entry not in vocab:
                raise TokenizeError(
                    f"{path}: {what}: expected its tokens in the vocabulary, {entry[:80]!r} is not"
                )
        if len(left + right) > MAX_MERGED_BYTES:
            raise TokenizeError(
                f"{path}: {what}: expected a token of at most {MAX_MERGED_BYTES} bytes"
            )
        merged[left + right] = vocab[left + right]
        first, _ = ranked.setdefault((vocab[left], vocab[right]), (rank, vocab[left + right]))
        if first != rank:
            raise TokenizeError(
                f"{path}: {what}: expected each merge once, it is merge {first} too"
            )
    bytes_ = {entry: i for entry, i in vocab.items() if entry in _ALPHABET}
    ranks = ((_last_rank(entry, i, bytes_, ranked), i) for entry, i in merged.items())
    reachable = sorted((rank, i) for rank, i in ranks if rank is not None)
    return (*sorted(bytes_.values()), *(i for _, i in reachable))


def _last_rank(
    entry: str,
    token_id: int,
    bytes_: dict[str, int],
    ranked: dict[tuple[int, int], tuple[int, int]],
) -> int | None:
    """The rank of the merge that completes a token from its bytes, None where none does."""
    if any(char not in bytes_ for char in entry):
        return None
    ids = [bytes_[char] for char in entry]
    last = None
    while len(ids) > 1:
        merges = [(ranked[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in ranked]
        if not merges:
            return None
        (last, new), at = min(merges)
        ids[at : at + 2] = [new]
    return last if ids == [token_id] else None
