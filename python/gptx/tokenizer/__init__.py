"""Text to token ids and back: byte-level BPE run by tiktoken, or one id per character.

`TokenizerSpec` is what a model file stores, `Tokenizer` what runs. Importing this package imports
no other one; tiktoken is imported when a text is first encoded, and decoding never needs it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator

from gptx.errors import ParameterError, TokenIdError, TokenizeError
from gptx.tokenizer.bpe import BytePairEncoder
from gptx.tokenizer.spec import GPT2_PATTERN, TokenizerSpec
from gptx.tokenizer.stream import IncrementalDecoder, StopMatcher

__all__ = [
    "END_OF_TEXT",
    "GPT2_PATTERN",
    "IncrementalDecoder",
    "StopMatcher",
    "Tokenizer",
    "TokenizerSpec",
]

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """The tokenizer of a model. Threads may share it.

    Args:
        spec: the vocabulary and how a text is split.
        vocab_size: number of ids of the model, default ``spec.n_vocab``. An id below it that the
            spec does not name (the padding of an embedding) decodes to nothing.

    Attributes:
        spec: as given.
        n_vocab: number of ids that `decode` accepts.
        eos_token_id: the id of ``<|endoftext|>``, or None.
    """

    def __init__(self, spec: TokenizerSpec, vocab_size: int | None = None) -> None:
        self.spec = spec
        self.n_vocab = spec.n_vocab if vocab_size is None else vocab_size
        named = spec.special_tokens | spec.added_tokens
        self.eos_token_id = named.get(END_OF_TEXT)
        self._named_bytes = {i: text.encode() for text, i in named.items()}
        self._special = _any_of(spec.special_tokens)
        self._added = _any_of(spec.added_tokens)
        self._bpe = BytePairEncoder(spec) if spec.kind == "bpe" else None
        self._characters = (
            {token.decode(): i for i, token in enumerate(spec.tokens) if token is not None}
            if spec.kind == "chars"
            else {}
        )

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """The token ids of a text; no token is added in front or behind.

        Args:
            text: any str of Unicode scalar values, the empty one included.
            allow_special: turn text that spells a special token into that token. Otherwise it is
                ordinary text, whoever wrote it.

        Raises:
            ParameterError: ``text`` is not a str.
            TokenizeError: a lone surrogate, or a character that the vocabulary cannot spell;
                the message names it and its index.
        """
        if not isinstance(text, str):
            raise ParameterError("text", text, "a str")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise TokenizeError(
                f"text: expected Unicode text, got the lone surrogate U+{code:04X} "
                f"at index {error.start}"
            ) from None
        ids: list[int] = []
        for start, piece, special in _parts(text, 0, self._special if allow_special else None):
            if special:
                ids.append(self.spec.special_tokens[piece])
                continue
            for at, part, added in _parts(piece, start, self._added):
                if added:
                    ids.append(self.spec.added_tokens[part])
                else:
                    ids += self._encode_ordinary(part, at)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens included. Invalid UTF-8 becomes U+FFFD.

        Raises:
            ParameterError: ``ids`` is not a sequence.
            TokenIdError: one of them is not an integer in ``[0, n_vocab)``.
        """
        if isinstance(ids, str | bytes | bytearray) or not isinstance(ids, Iterable):
            raise ParameterError("ids", ids, "a sequence of token ids")
        parts = [self._bytes(i, index) for index, i in enumerate(ids)]
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; ``b""`` for an id without a token.

        Raises:
            TokenIdError: not an integer in ``[0, n_vocab)``.
        """
        return self._bytes(token_id, 0)

    def decoder(self) -> IncrementalDecoder:
        """A new decoder for one stream of ids."""
        return IncrementalDecoder(self._bytes)

    def _bytes(self, token_id: object, index: int) -> bytes:
        try:
            number = -1 if isinstance(token_id, bool) else operator.index(token_id)  # type: ignore[arg-type]
        except TypeError:
            number = -1
        if not 0 <= number < self.n_vocab:
            raise TokenIdError("ids", index, token_id, self.n_vocab)
        tokens = self.spec.tokens
        token = tokens[number] if number < len(tokens) else None
        return self._named_bytes.get(number, b"") if token is None else token

    def _encode_ordinary(self, text: str, start: int) -> list[int]:
        """``text`` begins at index ``start`` of what the caller gave."""
        if self._bpe is not None:
            return self._bpe.encode(text, start)
        try:
            return [self._characters[character] for character in text]
        except KeyError as error:
            index = start + text.index(error.args[0])
            raise TokenizeError(
                f"text: expected the {len(self._characters)} characters of this model, "
                f"got {error.args[0]!r} at index {index}"
            ) from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the leftmost of the texts and, where several begin there, the longest."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _parts(
    text: str, start: int, pattern: re.Pattern[str] | None
) -> Iterator[tuple[int, str, bool]]:
    """Cuts a text at the matches: (index, part, is a match), empty parts left out."""
    end = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > end:
            yield start + end, text[end : match.start()], False
        yield start + match.start(), match.group(), True
        end = match.end()
    if end < len(text):
        yield start + end, text[end:], False
