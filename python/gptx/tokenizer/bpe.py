"""Byte-level BPE: tiktoken where it can, our own split where its regular expressions give up.

tiktoken merges, among neighbours whose concatenation is a token, the one of lowest rank; ranks are
given apart from ids, so that any order of merges can be run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from gptx.errors import TokenizeError
from gptx.tokenizer.spec import TokenizerSpec

if TYPE_CHECKING:
    import tiktoken

_CHUNK = 1 << 16
"""Characters encoded in one call, so that Ctrl-C is noticed between calls."""
_LIMIT = 1 << 17
"""Longest text for tiktoken's own split; its engine panics at a million steps for one piece."""
_PIECE_SECONDS = 10.0
_UNKNOWN = -1

_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space
_BEFORE_SPACE = re.compile(f"[^{_SPACE}][{_SPACE}]")

_CLASS = r"(?:\\p\{(?:L|N|M|P|S|Han)\}|\[\^\\s(?:\\p\{\w+\})*\]|\[\^\\P\{L\}(?:\\p\{\w+\})*\])"
_COUNT = r"(?:\+|\{\d+(?:,\d*)?\})?"
_CUTTABLE = re.compile(
    rf"(?:(?:'\(\?:[a-z\[\]|]+\)|(?: \?)?{_CLASS}{_COUNT})\|)+\\s\+\(\?!\\S\)\|\\s\+"
)
"""Patterns of GPT-2's form: no piece holds a space behind another character, and none looks past
its end but to see whether a space follows. Such a text can be cut before any space that follows
another character."""

_SET = re.compile(r"\\[pP]\{\^?\w+\}|\\[dDsS]")
_STAND_INS = "\u0378Àà\u01c5ʰª中あー한〇٣²Ⅷ\u0301\u0903«—€+"


class BytePairEncoder:
    """Encodes ordinary text. tiktoken is imported and its tables are built on first use."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._spec = spec
        self._cuttable = _CUTTABLE.fullmatch(spec.pattern) is not None
        self._by_pattern: tiktoken.Encoding | None = None
        self._whole: tiktoken.Encoding | None = None
        self._ids: list[int] | None = None
        self._missing: set[int] = set()

    def encode(self, text: str, start: int = 0) -> list[int]:
        """Token ids of a text without lone surrogates.

        Args:
            text: any length.
            start: the index of ``text`` in what the caller gave, for messages.

        Raises:
            TokenizeError: the vocabulary lacks a byte, or the pattern cannot split this text.
        """
        if self._by_pattern is None:
            self._by_pattern = self._encoding(self._spec.pattern)
        prefix = self._spec.add_prefix_space and text != "" and text[0] != " "
        ranks: list[int] = []
        for chunk in self._chunks(" " + text if prefix else text):
            ranks += self._encode_chunk(self._by_pattern, chunk)
        if self._ids is None:
            return ranks
        ids = [self._ids[rank] for rank in ranks]
        if _UNKNOWN in ids:
            self._refuse_unknown(text, start)
        return ids

    def _chunks(self, text: str) -> Iterator[str]:
        begin = 0
        while self._cuttable and len(text) - begin > _CHUNK:
            border = _BEFORE_SPACE.search(text, begin + _CHUNK - 1)
            if border is None:
                break
            end = border.start() + 1
            yield text[begin:end]
            begin = end
        yield text[begin:] if begin else text

    def _encode_chunk(self, encoding: tiktoken.Encoding, text: str) -> list[int]:
        if len(text) > _LIMIT:
            return self._encode_pieces(text)
        try:
            return encoding.encode_ordinary(text)
        except BaseException as error:  # a panic of its engine is not an Exception
            if not isinstance(error, ValueError) and type(error).__name__ != "PanicException":
                raise
            return self._encode_pieces(text)

    def _encode_pieces(self, text: str) -> list[int]:
        """Splits with the regex package, which has no limit, and merges piece by piece."""
        import regex  # type: ignore[import-untyped]

        if self._whole is None:
            self._whole = self._encoding(r"[\s\S]+")
        pattern = regex.compile(self._spec.pattern)
        shadow = _shadow(self._spec.pattern, text)
        ranks: list[int] = []
        at = 0
        try:
            while match := pattern.search(shadow, at, timeout=_PIECE_SECONDS):
                ranks += self._whole.encode_ordinary(text[match.start() : match.end()])
                at = max(match.end(), at + 1)
        except TimeoutError:
            raise TokenizeError(
                f"text: expected the split pattern to find the piece at index {at} of a part of "
                f"{len(text)} characters within {_PIECE_SECONDS:.0f} s; split the text"
            ) from None
        return ranks

    def _encoding(self, pattern: str) -> tiktoken.Encoding:
        import tiktoken

        tokens, order = self._spec.tokens, self._spec.merge_order
        ids = order or [i for i, token in enumerate(tokens) if token is not None]
        ranks: dict[Any, int] = {tokens[i]: i for i in ids}
        missing = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        if missing or order:
            ranks = {token: rank for rank, token in enumerate(missing)}
            ranks |= {tokens[i]: len(missing) + rank for rank, i in enumerate(ids)}
            self._ids = [_UNKNOWN] * len(missing) + list(ids)
            self._missing = {token[0] for token in missing}
        return tiktoken.Encoding("gptx", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def _refuse_unknown(self, text: str, start: int) -> None:
        for index, character in enumerate(text):
            missing = [byte for byte in character.encode() if byte in self._missing]
            if missing:
                raise TokenizeError(
                    f"text: this tokenizer has no token for the byte 0x{missing[0]:02X} "
                    f"of {character!r} at index {start + index}"
                )
        raise TokenizeError("text: this tokenizer has no token for its prefix space")


def _shadow(pattern: str, text: str) -> str:
    """``text`` as the regex package must see it to split it like tiktoken.

    The two may know different versions of Unicode. A character that they put into different
    classes of the pattern is replaced by one that regex puts where tiktoken puts the original.
    """
    import regex

    names = sorted(set(_SET.findall(pattern)))
    characters = "".join(set(text)) + _STAND_INS
    ours = [set(regex.findall(name, characters)) for name in names]
    theirs = [set(bytes(_members(name).encode_ordinary(characters)).decode()) for name in names]
    classes = {c: tuple(c in members for members in theirs) for c in characters}
    agreed = {c for c in characters if classes[c] == tuple(c in members for members in ours)}
    stand_ins = {classes[c]: c for c in _STAND_INS if c in agreed}
    replaced = {}
    for c in set(text) - agreed:
        if classes[c] not in stand_ins:
            raise TokenizeError(
                f"text: {c!r} (U+{ord(c):04X}) is not known to the regex package, which splits a "
                f"part of {len(text)} characters; update regex, or split the text"
            )
        replaced[ord(c)] = stand_ins[classes[c]]
    return text.translate(replaced) if replaced else text


@lru_cache(maxsize=64)
def _members(name: str) -> tiktoken.Encoding:
    """Encodes a text to the bytes of the characters that tiktoken finds in a class."""
    import tiktoken

    single = {bytes([b]): b for b in range(256)}
    return tiktoken.Encoding(name, pat_str=name, mergeable_ranks=single, special_tokens={})
