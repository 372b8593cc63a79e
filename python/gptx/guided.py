"""What a text must match: JSON, a regular expression, a grammar, or one of several texts.

>>> model.generate("The year was ", guide=gptx.guided.regex(r"[0-9]{4}"))
>>> model.generate("As JSON: ", guide=gptx.guided.json_schema({"type": "boolean"}))

At every token those that cannot go on are left out, and the end token is left in exactly where the
text may end. A text to which nothing can be added ends, with or without an end token. Only what
ends it early can leave it incomplete: ``max_new_tokens`` or the context ("length"), ``max_time``
("time"), a stop string.

The work is done by llguidance (``pip install "gptx[guided]"``), imported when a guide is used.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptx.errors import MissingExtraError, ParameterError, TokenizeError
from gptx.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

    from gptx.model import Model

__all__ = ["Guide", "GuideState", "choices", "grammar", "json_schema", "regex"]

_MAX_MESSAGE = 200
_COMPILED = 64  # guides that a model keeps ready
_NEVER = "<|never|>"

# As json.dumps: where any white space may stand, small models write little else.
_JSON_DEFAULTS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Guide:
    """What a text must match. Made by `json_schema`, `regex`, `grammar` and `choices`.

    Attributes:
        kind: "json", "regex", "grammar" or "choices".
        text: the schema as JSON, the pattern, the grammar, or the choices as JSON.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise ParameterError("guide", self.text, "text without lone surrogates") from None

    def start(self, model: Model, end_tokens: Sequence[int]) -> GuideState:
        """The beginning of a text by a model.

        Args:
            end_tokens: the ids that end the text, allowed exactly where it may end.

        Raises:
            MissingExtraError: llguidance is not installed.
            ParameterError: the guide is not one, with llguidance's message.
            TokenizeError: the model has no tokenizer.
        """
        vocabulary = _vocabularies.get(model)
        if vocabulary is None:
            vocabulary = _vocabularies[model] = _Vocabulary(
                model.tokenizer, model.config.vocab_size
            )
        matcher = vocabulary.compiled(self).deep_copy()
        return GuideState(self, matcher, vocabulary.size, tuple(end_tokens))


def json_schema(schema: dict[str, Any] | str | bool) -> Guide:
    """JSON that a schema accepts, spaced as by ``json.dumps``.

    Properties come in the order of the schema. Its key ``x-guidance`` may hold llguidance's
    options: with ``{"whitespace_flexible": True}`` any white space may stand between the parts.

    Args:
        schema: a JSON Schema as a dict or as text; True is any JSON.
    """
    if schema is True or (isinstance(schema, str) and schema.strip() == "true"):
        return Guide("json", "{}")
    if isinstance(schema, str):
        return Guide("json", schema)
    if not isinstance(schema, dict):
        raise ParameterError("schema", schema, "a dict, a str or True")
    try:
        return Guide("json", json.dumps(schema, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        raise ParameterError("schema", schema, "a dict of what JSON can hold") from None


def regex(pattern: str) -> Guide:
    """A text that a regular expression matches as a whole.

    Args:
        pattern: in the syntax of Rust's regex crate: as Python's, without look-around and
            back-references. ``.`` matches no line break, ``\\d`` the digits of every script.
    """
    return Guide("regex", _text("pattern", pattern))


def grammar(lark: str) -> Guide:
    """A text of a context-free grammar.

    Args:
        lark: in llguidance's variant of the syntax of Lark; it begins at the rule ``start``.
    """
    return Guide("grammar", _text("lark", lark))


def choices(texts: Sequence[str]) -> Guide:
    """One of several texts. Where one is the beginning of another, the end token decides.

    Args:
        texts: at least one; none of them empty.
    """
    good = isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 0
    if not good or not all(isinstance(text, str) and text for text in texts):
        raise ParameterError("texts", texts, "a sequence of non-empty strings")
    return Guide("choices", json.dumps(list(texts), ensure_ascii=False))


class GuideState:
    """Where a text stands in what it must match. Made by `Guide.start`; one thread at a time."""

    def __init__(
        self, guide: Guide, matcher: llguidance.LLMatcher, size: int, ends: tuple[int, ...]
    ) -> None:
        self._guide = guide
        self._matcher = matcher
        self._size = size
        self._ends = ends
        self._length = 0
        self._finished = False
        self._fitting: NDArray[np.uint32] | None = None

    def mask(self) -> NDArray[np.uint32]:
        """Bit ``i % 32`` of word ``i // 32`` says whether token i may come next: uint32
        ``[ceil(V / 32)]``. Empty of bits only once it `is_finished`, for want of end tokens.

        Raises:
            ParameterError: no token can go on, or the grammar is too complex.
        """
        words = self._fit().copy()
        may_end = self.is_accepting
        for token in self._ends:
            bit = np.uint32(1 << token % 32)
            words[token // 32] = words[token // 32] | bit if may_end else words[token // 32] & ~bit
        if not may_end and not words.any():
            after = f"after {self._length} tokens"
            raise self._error(f"a grammar that the tokens of this model can go on with {after}")
        return words

    def forced(self) -> list[int]:
        """The tokens of the text that must come next, as the tokenizer puts it; it may be spelled
        otherwise."""
        if self._finished or self._matcher.is_stopped():
            return []
        tokens = self._matcher.compute_ff_tokens()
        return list(itertools.takewhile(lambda token: token < self._size, tokens))

    def accept(self, token: int) -> None:
        """Goes on by a token; an end token finishes the text.

        Raises:
            ParameterError: the token does not fit.
        """
        if token in self._ends and self.is_accepting:
            self._finished, self._fitting = True, None
            return
        self._fitting = None
        if self._finished or token >= self._size or not self._matcher.consume_token(token):
            after = f"after {self._length} tokens"
            raise self._error(f"a token {after} that no other parameter bans")
        self._length += 1

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        return self._finished or self._matcher.is_accepting()

    @property
    def is_finished(self) -> bool:
        """Whether the text is complete, and nothing can be added."""
        return self.is_accepting and not self._fit().any()

    def copy(self) -> GuideState:
        """Another state that goes on from here by itself."""
        copy = GuideState(self._guide, self._matcher.deep_copy(), self._size, self._ends)
        copy._length, copy._finished, copy._fitting = self._length, self._finished, self._fitting
        return copy

    def _fit(self) -> NDArray[np.uint32]:
        """The tokens that go on, end tokens aside."""
        if self._fitting is None:
            words = np.zeros(-(-self._size // 32), np.uint32)
            if not self._finished and not self._matcher.is_stopped():
                bits = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
                words[:] = bits[: len(words)]
                if self._size % 32:  # llguidance's end token is the first that the model lacks
                    words[-1] &= np.uint32((1 << self._size % 32) - 1)
            failure = self._matcher.get_error()
            if failure and not failure.startswith("NoExtension"):
                raise self._error(f"a simpler grammar ({_line(failure)})")
            self._fitting = words
        return self._fitting

    def _error(self, allowed: str) -> ParameterError:
        return ParameterError("guide", self._guide, allowed)


class _Vocabulary:
    """The tokens of a model as llguidance wants them, and the guides compiled for them."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.size = size
        llguidance = _llguidance()
        self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Tokens(tokenizer, size)))
        self.compiled = lru_cache(_COMPILED)(self._compile)

    def _compile(self, guide: Guide) -> llguidance.LLMatcher:
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._tokens, _source(guide), log_level=0, limits=limits)
        if matcher.is_error():
            allowed = f"what llguidance accepts ({_line(matcher.get_error())})"
            raise ParameterError("guide", guide, allowed)
        return matcher


class _Tokens:
    """What llguidance's TokenizerWrapper asks of a tokenizer.

    Behind the ids of the model come some that it lacks: an end token, since which tokens of the
    model may end a text differs between requests, and the bytes that have no token, since a grammar
    may force half a character. Ids without bytes fit nowhere.
    """

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        spec = tokenizer.spec
        known = min(size, tokenizer.n_vocab)
        tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (size - known)
        spelled = set(tokens)
        lacking = [byte for byte in range(256) if bytes([byte]) not in spelled]
        self.tokens = [*tokens, _NEVER.encode(), *(bytes([byte]) for byte in lacking)]
        self.eos_token_id = size
        self.bos_token_id = None
        self.special_token_ids = [*(i for i in spec.special_tokens.values() if i < size), size]
        self._bytes = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}
        if spec.add_prefix_space:  # a forced text goes on inside another one
            tokenizer = Tokenizer(replace(spec, add_prefix_space=False))
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar forces."""
        try:
            return self._tokenizer.encode(text)
        except TokenizeError:
            if len(text) > 1:
                return [token for character in text for token in self(character)]
            return [self._bytes[bytes([byte])] for byte in text.encode()]


_vocabularies: weakref.WeakKeyDictionary[Model, _Vocabulary] = weakref.WeakKeyDictionary()


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("gptx.guided", "llguidance", "guided") from None
    return llguidance


def _source(guide: Guide) -> str:
    """The guide as llguidance writes a grammar."""
    matcher = _llguidance().LLMatcher
    if guide.kind == "json":
        try:
            return matcher.grammar_from_json_schema(guide.text, defaults=_JSON_DEFAULTS)
        except ValueError as error:
            allowed = f"what llguidance accepts ({_line(str(error))})"
            raise ParameterError("guide", guide, allowed) from None
    if guide.kind == "grammar":
        return matcher.grammar_from_lark(guide.text)
    if guide.kind == "choices":
        return matcher.grammar_from_regex("|".join(map(re.escape, json.loads(guide.text))))
    return matcher.grammar_from_regex(guide.text)


def _line(message: str) -> str:
    """A message of llguidance as one line that is not long."""
    line = " ".join(message.split())
    return line if len(line) <= _MAX_MESSAGE else line[: _MAX_MESSAGE - 3] + "..."


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ParameterError(name, value, "a str")
    return value
