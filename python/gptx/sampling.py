"""How a text goes on: the parameters of a request."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptx.errors import ParameterError

if TYPE_CHECKING:
    from gptx.guided import Guide
    from gptx.model import Model

MAX_SEED = 2**64 - 1
_MAX_COUNT = 2**31 - 1
_MAX_STOPS = 64
_MAX_BEAMS = 64
_MAX_CANDIDATES = 64
_MAX_SAMPLES = 128
MAX_LOGPROBS = 100
MAX_DRAFT = 16

LogitsProcessor = Callable[[NDArray[np.int32], NDArray[np.float32]], NDArray[np.float32]]
"""``f(ids [T], logits [V]) -> logits [V]``; it may change its ``logits`` and return them."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of generation. What changes logits acts first, then the filters, both in the order
    given here, which is transformers'.

    How much:
        max_new_tokens: tokens to generate at most, from 1; the context may end it earlier.
        min_new_tokens: the end tokens cannot be chosen before this many.
        max_time: seconds after which the text ends as it is; None: no limit.
        context: what happens where the context is full: "stop" ends the text, "slide" reads its
            last ``context_keep`` tokens again from position 0 and goes on. Prompts may then be of
            any length.
        context_keep: 1 to ``block_size``; None: half of it. With ``block_size`` each further token
            is computed from the last ``block_size`` ones, as nanoGPT crops its input.

    Where it ends:
        stop: a string or several; the text ends before the first of them.
        stop_token_ids: further ids that end the text, besides the model's end token.
        ignore_eos: the model's end token does not end the text.

    What changes the logits:
        logit_bias: numbers to add to the logits of ids; -inf bans an id.
        repetition_penalty: above 0; logits of tokens already in the sequence are divided by it if
            positive, multiplied if negative (Keskar et al., 2019). 1 is off.
        presence_penalty: -2 to 2, subtracted from the logits of generated tokens.
        frequency_penalty: -2 to 2, subtracted as often as a token was generated.
        dry_multiplier: 0 (off) to 100; "don't repeat yourself": a token that would make a
            repetition longer than ``dry_allowed_length`` loses ``dry_multiplier * dry_base **
            (length - dry_allowed_length)``.
        dry_base, dry_allowed_length, dry_range: see above; the last is how many tokens to look
            back, 0 for all.
        dry_breakers: strings that no repetition reaches across.
        no_repeat_ngram_size: no n-gram of this length comes twice; 0 is off.
        bad_words: texts or sequences of ids that are never completed.
        suppress_tokens: ids that are never chosen.
        forced_tokens: ids with which the continuation begins.
        forced_eos_token_id: the id that is chosen last where ``max_new_tokens`` ends the text.

    What filters them:
        temperature: divides the logits, from 0 to 100; 0 is greedy: the most likely token, ties to
            the lowest id.
        top_n_sigma: keep logits within so many standard deviations of the largest; 0 keeps all
            (Tang et al., 2024).
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that reach this probability, in (0, 1] (Holtzman
            et al., 2020).
        min_p: keep tokens at least this share of the most likely one's probability, in [0, 1].
        typical_p: keep the tokens whose surprise is nearest to the expected one, up to this
            probability, in (0, 1] (Meister et al., 2023).
        seed: 0 to 2**64 - 1; None draws one, which the result reports. A request with the same
            seed gives the same tokens, whatever else runs beside it.

    Several texts:
        n: how many continuations of a prompt; those behind the first are the result's ``others``.
        best_of: so many are generated, and the ``n`` of the largest mean log-probability returned.
        num_beams: above 1: beam search, which maximizes the probability of the whole text; it is
            deterministic, and filters and ``seed`` do not matter.
        num_beam_groups, diversity_penalty: groups of beams, each penalized for the tokens that
            earlier groups choose at the same step (Vijayakumar et al., 2018).
        length_penalty: the score of a beam is its log-probability divided by length ** this.
        early_stopping: True ends with as many finished beams as ``num_beams``, False where no
            better one is likely, "never" where none is possible.
        penalty_alpha: above 0, up to 1: contrastive search among the ``top_k`` most likely tokens
            (Su et al., 2022); deterministic too.

    What is reported:
        logprobs: report the log-probability of each token and of so many of the most likely ones, 0
            to 100; None reports nothing. They are the model's, before anything above.

    Speculation, which changes no token:
        prompt_lookup: the longest draft, up to 16 tokens, that is taken from the text itself; 0 is
            off.
        draft: a smaller model with the same tokenizer that drafts.

    The slow path, in Python for each token; what a guide forces is drafted by itself:
        logits_processors: functions ``f(ids [T], logits [V]) -> logits [V]`` that act first of all,
            in this order; -inf bans a token.
        guide: what the text must match: see `gptx.guided`.

    Raises:
        ParameterError: a value is outside its range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    max_time: float | None = None
    context: str = "stop"
    context_keep: int | None = None

    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_range: int = 0
    dry_breakers: Sequence[str] = ("\n", ":", '"', "*")
    no_repeat_ngram_size: int = 0
    bad_words: Sequence[str | Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    forced_tokens: Sequence[int] = ()
    forced_eos_token_id: int | None = None

    temperature: float = 0.8
    top_n_sigma: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None

    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    penalty_alpha: float = 0.0

    logprobs: int | None = None

    prompt_lookup: int = 0
    draft: Model | None = None

    logits_processors: Sequence[LogitsProcessor] = ()
    guide: Guide | None = None

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, _MAX_COUNT)
        _integer("min_new_tokens", self.min_new_tokens, 0, _MAX_COUNT)
        if self.min_new_tokens > self.max_new_tokens:
            allowed = f"at most max_new_tokens = {self.max_new_tokens}"
            raise ParameterError("min_new_tokens", self.min_new_tokens, allowed)
        if self.max_time is not None:
            _real("max_time", self.max_time, 0, 1e9)
        _one_of("context", self.context, ("stop", "slide"))
        if self.context_keep is not None:
            _integer("context_keep", self.context_keep, 1, _MAX_COUNT)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _ids("stop_token_ids", self.stop_token_ids))
        if type(self.ignore_eos) is not bool:
            raise ParameterError("ignore_eos", self.ignore_eos, "True or False")
        self._check_what_changes_logits()
        self._check_filters()
        self._check_several()
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _integer("prompt_lookup", self.prompt_lookup, 0, MAX_DRAFT)
        self._check_slow_path()

    def _check_what_changes_logits(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ParameterError("logit_bias", self.logit_bias, "a mapping of ids to numbers")
        for bias in self.logit_bias.values():
            if not isinstance(bias, numbers.Real) or not bias < math.inf:
                raise ParameterError("logit_bias", bias, "finite numbers or -inf")
        _real("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _real("dry_multiplier", self.dry_multiplier, 0, 100)
        _real("dry_base", self.dry_base, 1, 100)
        _integer("dry_allowed_length", self.dry_allowed_length, 1, _MAX_COUNT)
        _integer("dry_range", self.dry_range, 0, _MAX_COUNT)
        object.__setattr__(self, "dry_breakers", _texts("dry_breakers", self.dry_breakers))
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0, _MAX_COUNT)
        object.__setattr__(self, "suppress_tokens", _ids("suppress_tokens", self.suppress_tokens))
        object.__setattr__(self, "forced_tokens", _ids("forced_tokens", self.forced_tokens))
        object.__setattr__(self, "bad_words", _words("bad_words", self.bad_words))

    def _check_filters(self) -> None:
        _real("temperature", self.temperature, 0, 100)
        _real("top_n_sigma", self.top_n_sigma, 0, 1000)
        _integer("top_k", self.top_k, 0, _MAX_COUNT)
        _real("top_p", self.top_p, 0, 1, open_low=True)
        _real("min_p", self.min_p, 0, 1)
        _real("typical_p", self.typical_p, 0, 1, open_low=True)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)

    def _check_several(self) -> None:
        _integer("n", self.n, 1, _MAX_SAMPLES)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, _MAX_SAMPLES)
        _integer("num_beams", self.num_beams, 1, _MAX_BEAMS)
        _integer("num_beam_groups", self.num_beam_groups, 1, self.num_beams)
        if self.num_beams % self.num_beam_groups:
            allowed = f"a divisor of num_beams = {self.num_beams}"
            raise ParameterError("num_beam_groups", self.num_beam_groups, allowed)
        _real("diversity_penalty", self.diversity_penalty, 0, 1000)
        _real("length_penalty", self.length_penalty, -100, 100)
        if self.early_stopping not in (True, False, "never"):
            raise ParameterError("early_stopping", self.early_stopping, 'True, False or "never"')
        _real("penalty_alpha", self.penalty_alpha, 0, 1)
        if (self.num_beams > 1 or self.penalty_alpha > 0) and self.context != "stop":
            allowed = '"stop" with num_beams above 1 or penalty_alpha above 0'
            raise ParameterError("context", self.context, allowed)
        if self.num_beams > 1:
            if self.n > self.num_beams:
                raise ParameterError("n", self.n, f"at most num_beams = {self.num_beams}")
            for name in ("best_of", "draft"):
                if getattr(self, name) is not None:
                    raise ParameterError(name, getattr(self, name), "None with num_beams above 1")
            if self.penalty_alpha > 0:
                raise ParameterError(
                    "penalty_alpha", self.penalty_alpha, "0 with num_beams above 1"
                )
        if self.penalty_alpha > 0:
            if not 2 <= self.top_k <= _MAX_CANDIDATES:
                allowed = f"an integer from 2 to {_MAX_CANDIDATES} with penalty_alpha above 0"
                raise ParameterError("top_k", self.top_k, allowed)
            for name, only in (("n", 1), ("best_of", None), ("draft", None)):
                if getattr(self, name) != only:
                    allowed = f"{only} with penalty_alpha above 0"
                    raise ParameterError(name, getattr(self, name), allowed)

    def _check_slow_path(self) -> None:
        from gptx.guided import Guide

        processors = self.logits_processors
        if not isinstance(processors, Sequence) or not all(map(callable, processors)):
            allowed = "a sequence of functions f(ids, logits)"
            raise ParameterError("logits_processors", processors, allowed)
        object.__setattr__(self, "logits_processors", tuple(processors))
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise ParameterError("guide", self.guide, "a guide that gptx.guided makes, or None")


def with_changes(params: SamplingParams | None, changes: Mapping[str, object]) -> SamplingParams:
    """The parameters, by default `SamplingParams()`, with some of them replaced.

    Raises:
        ParameterError: a name is none of them, or a value is not allowed.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise ParameterError("params", params, "a SamplingParams")
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name, value in changes.items():
        if name not in known:
            from difflib import get_close_matches

            similar = get_close_matches(name, known, n=3)
            hint = f", such as {' or '.join(similar)}" if similar else ""
            raise ParameterError(name, value, "a parameter of gptx.SamplingParams" + hint)
    return dataclasses.replace(params or SamplingParams(), **changes)  # type: ignore[arg-type]


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise ParameterError(name, value, f"an integer from {low} to {high}")
    if not low <= value <= high:
        raise ParameterError(name, value, f"an integer from {low} to {high}")


def _real(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    allowed = f"a number above {low}, at most {high}" if open_low else f"a number {low} to {high}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or math.isnan(value):
        raise ParameterError(name, value, allowed)
    if not low <= value <= high or (open_low and value == low):
        raise ParameterError(name, value, allowed)


def _one_of(name: str, value: object, names: Sequence[Any]) -> None:
    if value not in names:
        raise ParameterError(name, value, "one of " + ", ".join(map(repr, names)))


def _texts(name: str, value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(t, str) and t for t in texts):
        raise ParameterError(name, value, "non-empty strings")
    return tuple(texts)


def _ids(name: str, value: object) -> tuple[Any, ...]:
    """A sequence whose ids are checked against a model later."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str | bytes):
        raise ParameterError(name, value, "a sequence of token ids")
    return tuple(value)


def _words(name: str, value: object) -> tuple[Any, ...]:
    words = (value,) if isinstance(value, str) else value
    if not isinstance(words, Sequence | np.ndarray) or isinstance(words, bytes):
        raise ParameterError(name, value, "a sequence of texts or of sequences of ids")
    for word in words:
        if not isinstance(word, Sequence | np.ndarray) or len(word) == 0:
            raise ParameterError(name, word, "texts or ids of at least one token")
    return tuple(words)


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    allowed = f"at most {_MAX_STOPS} non-empty strings"
    if stop is None:
        return ()
    if not isinstance(stop, str | Sequence):
        raise ParameterError("stop", stop, allowed)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > _MAX_STOPS:
        raise ParameterError("stop", f"{len(stops)} strings", allowed)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ParameterError("stop", text, allowed)
    return stops
