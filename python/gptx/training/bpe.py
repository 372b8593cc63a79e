"""The tokenizer of a training run: trained here, or rebuilt from the one of a checkpoint.

Byte-level BPE (Sennrich et al., 2016; bytes as in GPT-2) of the tokenizers library, which encodes
many texts at once and writes the ``tokenizer.json`` that transformers reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gptx.errors import ParameterError, TokenizeError
from gptx.tokenizer import GPT2_PATTERN
from gptx.training.data import END_OF_TEXT

if TYPE_CHECKING:
    from gptx.tokenizer import TokenizerSpec

PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "han": (
        r"\p{Han}|'(?:[sdmt]|ll|ve|re)| ?(?:(?!\p{Han})\p{L})+| ?\p{N}+"
        r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ),
}
"""``gpt2`` is GPT-2's own; ``han`` differs in that every Han character is a piece by itself."""

_SMALLEST = 257  # every byte and the end of a text


def train_bpe(texts: Iterable[str], vocab_size: int, pattern: str | None = None) -> Tokenizer:
    """Learns a byte-level BPE; ``<|endoftext|>`` is id 0.

    Args:
        texts: what to learn from.
        vocab_size: ids at most; a small corpus may need fewer.
        pattern: a key of `PATTERNS` (default "han") or a regular expression.

    Raises:
        ParameterError: vocab_size is below 257, or the pattern is no regular expression.
    """
    if vocab_size < _SMALLEST:
        allowed = f"at least {_SMALLEST} (each byte and {END_OF_TEXT})"
        raise ParameterError("vocab_size", vocab_size, allowed)
    tokenizer = Tokenizer(models.BPE())
    _split_bytes(tokenizer, PATTERNS.get(pattern or "han", pattern or ""))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Raises:
        TokenizeError: it cannot be read.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise TokenizeError(f"{path}: not a tokenizer.json: {error}") from error


def tokenizer_from_spec(spec: TokenizerSpec) -> Tokenizer:
    """The tokenizer stored in a model file, as one of the tokenizers library.

    The merges of a BPE are found again by splitting each token with the tokens of lower rank.

    Raises:
        TokenizeError: a ``tokenizer.json`` cannot express it.
    """
    tokenizer = _characters(spec) if spec.kind == "chars" else _pairs(spec)
    for named, special in ((spec.special_tokens, True), (spec.added_tokens, False)):
        tokens = [AddedToken(name, special=special, normalized=False) for name in named]
        tokenizer.add_special_tokens(tokens) if special else tokenizer.add_tokens(tokens)
    return tokenizer


class Encoder:
    """Texts to ids and back; a special token that a text spells is ordinary text.

    Attributes:
        tokenizer: of the tokenizers library.
        n_vocab: highest id + 1.
        eot_id: of ``<|endoftext|>``, or None.
        start_ids: what a document begins with: the end of the text before it; a line break where
            the vocabulary has no such token; nothing where it has neither.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.n_vocab = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eot_id = tokenizer.token_to_id(END_OF_TEXT)
        starts = (self.eot_id, tokenizer.token_to_id("\n"))
        self.start_ids = [i for i in starts if i is not None][:1]
        tokenizer.encode_special_tokens = True

    @property
    def characters(self) -> dict[str, int] | None:
        """Character -> id, for a vocabulary of characters; else None."""
        is_characters = isinstance(self.tokenizer.model, models.WordLevel)
        return self.tokenizer.get_vocab(with_added_tokens=False) if is_characters else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text.

        Raises:
            TokenizeError: a text holds what the vocabulary cannot spell.
        """
        try:
            return [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exception
            raise TokenizeError(f"the text cannot be encoded: {error}") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _split_bytes(tokenizer: Tokenizer, pattern: str) -> None:
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises plain Exception
        allowed = f"{', '.join(PATTERNS)} or a regular expression ({error})"
        raise ParameterError("pattern", pattern, allowed) from error
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()


def _pairs(spec: TokenizerSpec) -> Tokenizer:
    order = spec.merge_order or [i for i, token in enumerate(spec.tokens) if token is not None]
    by_rank = [spec.tokens[i] or b"" for i in order]
    ranks = {token: rank for rank, token in enumerate(by_rank)}
    parents = [_parents(token, ranks) for token in by_rank]
    merges = [(_as_text(left), _as_text(right)) for left, right in parents if right]
    vocab = {_as_text(token): i for i, token in enumerate(spec.tokens) if token is not None}
    vocab |= {_as_text(token): i for token, i in zip(by_rank, order, strict=True)}
    tokenizer = Tokenizer(models.BPE(vocab | spec.special_tokens | spec.added_tokens, merges))
    if not spec.add_prefix_space:
        _split_bytes(tokenizer, spec.pattern)
    elif spec.pattern == GPT2_PATTERN:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        raise TokenizeError("tokenizer: a prefix space needs the pattern of GPT-2")
    return tokenizer


def _characters(spec: TokenizerSpec) -> Tokenizer:
    vocab = {token.decode(): i for i, token in enumerate(spec.tokens) if token is not None}
    tokenizer = Tokenizer(models.WordLevel(vocab | spec.special_tokens))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?m:.)|\n"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _parents(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that the last merge joins; the second is empty if no merge makes the token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [left + right for left, right in pairwise(parts)]
        rank, i = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(joined))
        if rank >= ranks[token]:
            return token, b""
        parts[i : i + 2] = [joined[i]]
    return (parts[0], parts[1]) if len(parts) == 2 else (token, b"")


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte: itself where visible, else U+0100 onwards."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


_ALPHABET = _byte_alphabet()


def _as_text(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)
