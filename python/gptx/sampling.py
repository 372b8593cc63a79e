"""How the next token is chosen: the parameters of a request."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

from gptx.errors import ParameterError

MAX_SEED = 2**64 - 1
_MAX_COUNT = 2**31 - 1
_MAX_STOPS = 64


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Parameters of generation. The filters act in the order given here, as in transformers.

    Attributes:
        max_new_tokens: tokens to generate at most, from 1; the context may end it earlier.
        min_new_tokens: the end tokens cannot be chosen before this many.
        repetition_penalty: above 0; logits of tokens already in the sequence are divided by it if
            positive, multiplied if negative (Keskar et al., 2019). 1 is off.
        temperature: divides the logits, from 0 to 100; 0 is greedy: the most likely token, ties to
            the lowest id.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens that reach this probability, in (0, 1] (Holtzman
            et al., 2020).
        min_p: keep tokens at least this share of the most likely one's probability, in [0, 1].
        seed: 0 to 2**64 - 1; None draws one, which the result reports. A request with the same
            seed gives the same tokens, whatever else runs beside it.
        stop: a string or several; the text ends before the first of them.
        stop_token_ids: further ids that end the text, besides the model's end token.
        ignore_eos: the model's end token does not end the text.

    Raises:
        ParameterError: a value is outside its range.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1, _MAX_COUNT)
        _integer("min_new_tokens", self.min_new_tokens, 0, _MAX_COUNT)
        if self.min_new_tokens > self.max_new_tokens:
            allowed = f"at most max_new_tokens = {self.max_new_tokens}"
            raise ParameterError("min_new_tokens", self.min_new_tokens, allowed)
        _real("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _real("temperature", self.temperature, 0, 100)
        _integer("top_k", self.top_k, 0, _MAX_COUNT)
        _real("top_p", self.top_p, 0, 1, open_low=True)
        _real("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        if type(self.ignore_eos) is not bool:
            raise ParameterError("ignore_eos", self.ignore_eos, "True or False")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


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


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    allowed = f"at most {_MAX_STOPS} non-empty strings"
    if len(stops) > _MAX_STOPS:
        raise ParameterError("stop", f"{len(stops)} strings", allowed)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ParameterError("stop", text, allowed)
    return stops
