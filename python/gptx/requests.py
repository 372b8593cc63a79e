"""The parameters of a text as a request of the engine, checked against its model."""

from __future__ import annotations

import numbers
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptx.errors import ParameterError, TokenIdError
from gptx.sampling import SamplingParams

if TYPE_CHECKING:
    from gptx.model import Model

# Those that the engine takes as they are.
_SAMPLING_FIELDS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "no_repeat_ngram_size",
    "temperature",
    "top_n_sigma",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)


def fields(model: Model, params: SamplingParams, seed: int) -> dict[str, Any]:
    """What `_core.Engine.submit` takes besides the ids.

    Raises:
        ParameterError, TokenIdError, TokenizeError: a parameter does not fit the model.
    """
    sampling: dict[str, Any] = {name: getattr(params, name) for name in _SAMPLING_FIELDS}
    bias_ids = checked_ids(model, "logit_bias", list(params.logit_bias))
    sampling["logit_bias"] = list(zip(bias_ids, params.logit_bias.values(), strict=True))
    suppressed = checked_ids(model, "suppress_tokens", params.suppress_tokens)
    sampling["bad_words"] = [[i] for i in suppressed] + [
        model.tokenizer.encode(word)
        if isinstance(word, str)
        else checked_ids(model, "bad_words", word)
        for word in params.bad_words
    ]
    if params.dry_multiplier > 0:
        sampling["dry_breakers"] = _ids_that_contain(model, tuple(params.dry_breakers))
    sampling["seed"] = seed
    sampling["logprobs"] = -1 if params.logprobs is None else params.logprobs
    end = params.forced_eos_token_id
    return {
        "sampling": sampling,
        "max_new_tokens": params.max_new_tokens,
        "min_new_tokens": params.min_new_tokens,
        "end_tokens": end_tokens(model, params),
        "forced_tokens": checked_ids(model, "forced_tokens", params.forced_tokens),
        "forced_end": -1 if end is None else checked_ids(model, "forced_eos_token_id", [end])[0],
        "slide": _slide(model, params),
        "lookup": params.prompt_lookup,
        "seconds": params.max_time,
    }


def end_tokens(model: Model, params: SamplingParams) -> list[int]:
    """The ids that end a text."""
    ends = checked_ids(model, "stop_token_ids", params.stop_token_ids)
    if not params.ignore_eos:
        ends += eos_token_ids(model)
    return ends


def eos_token_ids(model: Model) -> list[int]:
    """The end tokens of the model itself."""
    eos = model._source.generation.get("eos_token_id")
    if eos is None and model._tokenizer is not None:
        eos = model._tokenizer.eos_token_id
    if eos is None:
        return []
    return [i for i in np.atleast_1d(eos).tolist() if i < model.config.vocab_size]


def checked_ids(model: Model, name: str, ids: Sequence[int]) -> list[int]:
    """The ids of an argument as ints.

    Raises:
        TokenIdError: one is not an integer, or not in the vocabulary.
    """
    size = model.config.vocab_size
    for index, token in enumerate(ids):
        integral = isinstance(token, numbers.Integral) and not isinstance(token, bool)
        if not integral or not 0 <= token < size:
            raise TokenIdError(name, index, token, size)
    return [int(token) for token in ids]


def _slide(model: Model, params: SamplingParams) -> int:
    """Tokens to read again where the context is full; 0: none."""
    if params.context == "stop":
        return 0
    size = model.config.block_size
    keep = max(1, size // 2) if params.context_keep is None else params.context_keep
    if keep > size:
        raise ParameterError("context_keep", keep, f"at most block_size = {size}")
    return keep


_containing: weakref.WeakKeyDictionary[Model, dict[tuple[str, ...], list[int]]]
_containing = weakref.WeakKeyDictionary()


def _ids_that_contain(model: Model, texts: tuple[str, ...]) -> list[int]:
    """The tokens in which one of the texts occurs."""
    known = _containing.setdefault(model, {})
    if texts not in known:
        parts = [text.encode() for text in texts]
        tokens = [model.tokenizer.token_bytes(i) for i in range(model.config.vocab_size)]
        known[texts] = [i for i, token in enumerate(tokens) if any(part in token for part in parts)]
    return known[texts]
