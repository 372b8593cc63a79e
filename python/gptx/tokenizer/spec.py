"""The tokenizer that a model file stores: plain data with exactly one encoding as JSON."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise

from gptx.errors import ParameterError, shown

KINDS = ("bpe", "chars")

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How GPT-2 splits a text (Radford et al., 2019, encoder.py), its contractions factored."""

MAX_TOKEN_BYTES = 65_535
MAX_PATTERN = 65_536
MAX_ID = 2**31 - 1
MAX_JSON = 8 << 20
"""Characters. GPT-2's 50,257 tokens take 0.56 million."""


@dataclass(frozen=True)
class TokenizerSpec:
    """The vocabulary of a model and how a text is split. Equal specs have equal JSON.

    Attributes:
        kind: "bpe", byte-level byte pair encoding; "chars", one id per character.
        tokens: the bytes of each token, None where an id is special or unused. Trailing None are
            dropped.
        pattern: bpe: the pieces within which tokens are merged, in the syntax that the regex
            package and tiktoken share; it must match every character of any text. chars: "".
        special_tokens: text -> id. Ordinary text unless the caller of `encode` allows them.
        added_tokens: text -> id, found in every text before it is split.
        merge_order: bpe: the ids that encoding can yield, the earliest merge first; () means every
            token in order of its id.
        add_prefix_space: bpe: a text that does not begin with a space gets one.

    Raises:
        ParameterError: a field has another type, is out of range, or two of them disagree.
    """

    kind: str
    tokens: tuple[bytes | None, ...]
    pattern: str
    special_tokens: dict[str, int]
    added_tokens: dict[str, int] = field(default_factory=dict)
    merge_order: tuple[int, ...] = ()
    add_prefix_space: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError("kind", self.kind, "one of " + ", ".join(KINDS))
        if type(self.add_prefix_space) is not bool:
            raise ParameterError("add_prefix_space", self.add_prefix_space, "true or false")
        self._check_pattern()
        self._check_tokens()
        self._check_named_tokens()
        self._check_merge_order()

    @property
    def n_vocab(self) -> int:
        """The highest id + 1."""
        named = [*self.special_tokens.values(), *self.added_tokens.values()]
        return max(len(self.tokens), max(named, default=-1) + 1)

    def to_json(self) -> str:
        """ASCII, keys sorted, no spaces; lengths and bytes of the tokens in base64.

        Raises:
            ParameterError: longer than `MAX_JSON`, which `from_json` would not read.
        """
        tokens = [token or b"" for token in self.tokens]
        lengths = struct.pack(f"<{len(tokens)}H", *map(len, tokens))
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["tokens"] = {
            "bytes": base64.b64encode(b"".join(tokens)).decode(),
            "lengths": base64.b64encode(lengths).decode(),
        }
        text = json.dumps(values, separators=(",", ":"), sort_keys=True)
        if len(text) > MAX_JSON:
            raise ParameterError("tokenizer", len(text), f"at most {MAX_JSON} characters of JSON")
        return text

    @classmethod
    def from_json(cls, text: str) -> TokenizerSpec:
        """The inverse of `to_json`; any other text of the same meaning is refused.

        Raises:
            ValueError: not such a text. Memory and time are linear in its length, which is bounded.
        """
        if len(text) > MAX_JSON:
            raise ValueError(f"expected at most {MAX_JSON} characters, got {len(text)}")
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("expected a JSON object, got deeper nesting") from None
        names = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"expected an object with the keys {', '.join(sorted(names))}")
        values["tokens"] = _unpacked(values["tokens"])
        if not isinstance(values["merge_order"], list):
            raise ParameterError("merge_order", values["merge_order"], "a list of token ids")
        values["merge_order"] = tuple(values["merge_order"])
        spec = cls(**values)
        if spec.to_json() != text:
            raise ValueError("expected the canonical JSON of a tokenizer, got another spelling")
        return spec

    def _check_pattern(self) -> None:
        if not isinstance(self.pattern, str) or len(self.pattern) > MAX_PATTERN:
            raise ParameterError("pattern", self.pattern, f"at most {MAX_PATTERN} characters")
        _encodable("pattern", self.pattern)
        if bool(self.pattern) != (self.kind == "bpe"):
            allowed = "a pattern for bpe, none for chars"
            raise ParameterError("pattern", self.pattern, allowed)

    def _check_tokens(self) -> None:
        if not isinstance(self.tokens, tuple):
            raise ParameterError("tokens", self.tokens, "a tuple of bytes or None")
        end = len(self.tokens)
        while end and self.tokens[end - 1] is None:
            end -= 1
        tokens = self.tokens[:end]
        object.__setattr__(self, "tokens", tokens)
        if not tokens:
            raise ParameterError("tokens", tokens, "at least one token")
        first: dict[bytes, int] = {}
        for i, token in enumerate(tokens):
            if token is None:
                continue
            if type(token) is not bytes or not 1 <= len(token) <= MAX_TOKEN_BYTES:
                raise ParameterError(f"tokens[{i}]", token, f"1 to {MAX_TOKEN_BYTES} bytes")
            if first.setdefault(token, i) != i:
                raise ParameterError(
                    f"tokens[{i}]", token, f"another token than that of id {first[token]}"
                )
            if self.kind == "chars" and not _is_one_character(token):
                raise ParameterError(f"tokens[{i}]", token, "one character in UTF-8")

    def _check_named_tokens(self) -> None:
        texts: dict[int, str] = {}
        for name in ("special_tokens", "added_tokens"):
            named = getattr(self, name)
            if not isinstance(named, dict):
                raise ParameterError(name, named, "a dict from text to id")
            for text, i in named.items():
                if not isinstance(text, str) or not text:
                    raise ParameterError(name, text, "a text of at least one character")
                _encodable(name, text)
                if type(i) is not int or not 0 <= i <= MAX_ID:
                    raise ParameterError(f"{name}[{shown(text)}]", i, f"an id from 0 to {MAX_ID}")
                if texts.setdefault(i, text) is not text:
                    raise ParameterError(f"{name}[{shown(text)}]", i, f"not the id of {texts[i]!r}")
                token = self.tokens[i] if i < len(self.tokens) else None
                if token is not None and (name == "special_tokens" or token != text.encode()):
                    allowed = f"not the id of the token {shown(token)}"
                    raise ParameterError(f"{name}[{shown(text)}]", i, allowed)
            by_id = dict(sorted(named.items(), key=lambda item: item[1]))
            object.__setattr__(self, name, by_id)

    def _check_merge_order(self) -> None:
        order = self.merge_order
        if not isinstance(order, tuple):
            raise ParameterError("merge_order", order, "a tuple of token ids")
        if self.kind == "chars" and (order or self.add_prefix_space):
            raise ParameterError("kind", self.kind, "bpe, where merge_order or a prefix is given")
        for i in order:
            if type(i) is not int or not 0 <= i < len(self.tokens) or self.tokens[i] is None:
                raise ParameterError("merge_order", i, "ids of tokens")
        if len(set(order)) != len(order):
            raise ParameterError("merge_order", order, "each id once")
        if order == tuple(i for i, token in enumerate(self.tokens) if token is not None):
            object.__setattr__(self, "merge_order", ())


def _is_one_character(token: bytes) -> bool:
    try:
        return len(token.decode()) == 1
    except UnicodeDecodeError:
        return False


def _encodable(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ParameterError(name, text, "text without lone surrogates") from None


def _unpacked(packed: object) -> tuple[bytes | None, ...]:
    if not isinstance(packed, dict) or set(packed) != {"bytes", "lengths"}:
        raise ValueError("tokens: expected an object with the keys bytes, lengths")
    streams = [packed["bytes"], packed["lengths"]]
    if not all(isinstance(stream, str) for stream in streams):
        raise ValueError("tokens: expected base64 text")
    data, raw_lengths = (base64.b64decode(stream, validate=True) for stream in streams)
    if len(raw_lengths) % 2:
        raise ValueError("tokens: expected 2 bytes for each length")
    lengths = struct.unpack(f"<{len(raw_lengths) // 2}H", raw_lengths)
    if sum(lengths) != len(data):
        raise ValueError(f"tokens: expected {sum(lengths)} bytes, got {len(data)}")
    ends = accumulate(lengths, initial=0)
    return tuple(data[start:end] or None for start, end in pairwise(ends))
