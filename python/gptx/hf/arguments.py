"""The arguments of a `generate` call, checked, and what they are for the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptx.errors import ParameterError, UnsupportedError
from gptx.hf import processors as p
from gptx.hf.arrays import Array
from gptx.hf.generation_config import GenerationConfig
from gptx.hf.prompts import Batch
from gptx.sampling import MAX_DRAFT, SamplingParams


@dataclass
class Arguments:
    """One call.

    Attributes:
        config: the values of all arguments.
        batch: the prompts.
        vocab_size: V.
        max_length: tokens of a row at most, its padding and the prompt included.
        ends: the end tokens, some of which the model may not have.
        pad: what fills rows that have ended; None where no end token is set.
        processors, prefix_allowed, criteria: functions of the script.
        draft: a smaller model.
        seed: of the first row.
    """

    config: GenerationConfig
    batch: Batch
    vocab_size: int
    max_length: int
    min_length: int
    ends: tuple[int, ...]
    pad: int | None
    processors: Sequence[Callable[..., Array]] = ()
    prefix_allowed: Callable[..., Any] | None = None
    criteria: Sequence[Callable[..., Any]] = ()
    draft: Any = None
    seed: int = 0
    stops: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        stops = self.config.stop_strings
        self.stops = () if stops is None else (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(text, str) and text for text in self.stops):
            raise ParameterError("stop_strings", stops, "non-empty strings")
        self._check()

    @property
    def count(self) -> int:
        """Rows for each prompt."""
        return self.config.num_return_sequences or 1

    @property
    def beams(self) -> int:
        return self.config.num_beams or 1

    @property
    def contrasts(self) -> bool:
        c = self.config
        penalized = (c.penalty_alpha or 0) > 0 and (c.top_k or 0) > 1
        return self.beams == 1 and not c.do_sample and penalized

    @property
    def possible_ends(self) -> list[int]:
        """The end tokens that the model has."""
        return [i for i in self.ends if 0 <= i < self.vocab_size]

    @property
    def changes(self) -> bool:
        """Whether scores are changed by more than the engine changes by itself."""
        c = self.config
        several = any(len(ids) > 1 for ids in self._biases)
        forced_ends = c.forced_eos_token_id is not None and not isinstance(
            c.forced_eos_token_id, int | np.integer
        )
        # transformers counts padding as tokens; it tells on those that may come again.
        padding = set(self.batch.ids[~self.batch.mask].tolist())
        n = c.no_repeat_ngram_size or 0
        padded = padding and (n == 1 or (n > 1 and not padding <= set(self.ends)))
        return (
            bool(self.processors)
            or self.prefix_allowed is not None
            or several
            or forced_ends
            or bool(padded)
            or c.begin_suppress_tokens is not None
            or c.exponential_decay_length_penalty is not None
        )

    @property
    def filters_more(self) -> bool:
        """Whether a filter is asked for that the engine does not have."""
        c = self.config
        return bool(c.do_sample and (c.epsilon_cutoff or c.eta_cutoff))

    def params(self, *, filters: bool = True, changes: bool = True, row: int = 0) -> SamplingParams:
        """The engine's parameters for a prompt.

        Args:
            filters: temperature and what filters.
            changes: what changes logits.
        """
        c = self.config
        values: dict[str, Any] = {"max_new_tokens": self.max_length - self.batch.length}
        values |= {"ignore_eos": True, "stop_token_ids": self.possible_ends, "temperature": 0.0}
        values |= {"top_k": 0, "top_p": 1.0, "seed": self.seed_of(row)}
        if c.do_sample:
            values["temperature"] = 1.0
            if filters:
                values |= self._filters()
        if c.max_time is not None:
            values["max_time"] = c.max_time
        if changes:
            values |= self._changes(values["max_new_tokens"])
        return SamplingParams(**values)

    def search_params(self, *, changes: bool) -> SamplingParams:
        """Those of beam search and contrastive search."""
        c = self.config
        values: dict[str, Any] = {"max_new_tokens": self.max_length - self.batch.length}
        values |= {"ignore_eos": True, "stop_token_ids": self.possible_ends, "seed": 0}
        values |= {"stop": self.stops, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
        if c.max_time is not None:
            values["max_time"] = c.max_time
        if changes:
            values |= self._changes(values["max_new_tokens"])
        if self.contrasts:
            return SamplingParams(**values | {"penalty_alpha": c.penalty_alpha, "top_k": c.top_k})
        values |= {
            "n": self.count,
            "num_beams": self.beams,
            "num_beam_groups": c.num_beam_groups or 1,
            "diversity_penalty": c.diversity_penalty or 0.0,
            "length_penalty": 1.0 if c.length_penalty is None else c.length_penalty,
            "early_stopping": c.early_stopping or False,
        }
        return SamplingParams(**values)

    def seed_of(self, row: int) -> int:
        return (self.seed + row * 0x9E3779B97F4A7C15) % 2**64

    def chain(self, row: int | None = None, *, scale: bool = False) -> list[Callable[..., Array]]:
        """transformers' processors of this call, in its order. They see padding too.

        Args:
            row: the prompt that they will be used for alone; None: for all rows.
            scale: the sampling filters too.
        """
        length = self.batch.length
        starts = self.batch.starts
        padding = np.repeat(starts, self.count) if row is None else starts[row : row + 1]
        c, ends = self.config, self.ends
        out: list[Callable[..., Array]] = []
        if c.sequence_bias is not None:
            out.append(p.SequenceBiasLogitsProcessor(c.sequence_bias))
        if c.repetition_penalty not in (None, 1.0):
            out.append(p.RepetitionPenaltyLogitsProcessor(c.repetition_penalty, padding))
        if c.no_repeat_ngram_size:
            out.append(p.NoRepeatNGramLogitsProcessor(c.no_repeat_ngram_size))
        # End tokens are no bad words, as in transformers.
        alone = [[end] for end in ends]
        if c.bad_words_ids is not None and any(list(w) not in alone for w in c.bad_words_ids):
            out.append(p.NoBadWordsLogitsProcessor(c.bad_words_ids, ends))
        if self.min_length > length and ends:
            out.append(p.MinLengthLogitsProcessor(self.min_length, ends))
        if self.prefix_allowed is not None:
            function, device = self.prefix_allowed, self.batch.device
            rows, first = (self.count, 0) if row is None else (1, row)
            out.append(p.PrefixConstrainedLogitsProcessor(function, rows, device, first))
        if c.forced_bos_token_id is not None:
            out.append(p.ForcedBOSTokenLogitsProcessor(c.forced_bos_token_id))
        if c.forced_eos_token_id is not None:
            forced = np.atleast_1d(c.forced_eos_token_id).tolist()
            out.append(p.ForcedEOSTokenLogitsProcessor(self.max_length, forced))
        if c.exponential_decay_length_penalty is not None:
            decay = c.exponential_decay_length_penalty
            out.append(p.ExponentialDecayLengthPenalty(decay, ends, length))
        if c.suppress_tokens is not None:
            out.append(p.SuppressTokensLogitsProcessor(c.suppress_tokens))
        if c.begin_suppress_tokens is not None:
            begin = length + (length == 1 and c.forced_bos_token_id is not None)
            out.append(p.SuppressTokensAtBeginLogitsProcessor(c.begin_suppress_tokens, begin))
        own = {type(processor): processor for processor in reversed(self.processors)}
        out = [own.get(type(processor), processor) for processor in out]
        out += [processor for processor in self.processors if processor not in out]
        return out + (self._warpers() if scale else [])

    @property
    def _biases(self) -> dict[tuple[int, ...], float]:
        return {} if self.config.sequence_bias is None else p.biases(self.config.sequence_bias)

    def _filters(self) -> dict[str, Any]:
        c = self.config
        values = {
            "temperature": 1.0 if c.temperature is None else c.temperature,
            "top_k": c.top_k or 0,
            "top_p": 1.0 if c.top_p is None else c.top_p,
            "min_p": c.min_p or 0.0,
            "typical_p": 1.0 if c.typical_p is None else c.typical_p,
        }
        # transformers keeps a token where top_p = 0.
        return values if values["top_p"] != 0 else values | {"top_k": 1, "top_p": 1.0}

    def _warpers(self) -> list[Callable[..., Array]]:
        c = self.config
        out: list[Callable[..., Array]] = []
        if c.do_sample:
            if c.temperature not in (None, 1.0):
                out.append(p.TemperatureLogitsWarper(c.temperature))
            if c.top_k:
                out.append(p.TopKLogitsWarper(c.top_k))
            if c.top_p is not None and c.top_p < 1:
                out.append(p.TopPLogitsWarper(c.top_p))
            if c.min_p is not None:
                out.append(p.MinPLogitsWarper(c.min_p))
            if c.typical_p is not None and c.typical_p < 1:
                out.append(p.TypicalLogitsWarper(c.typical_p))
            if c.epsilon_cutoff:
                out.append(p.EpsilonLogitsWarper(c.epsilon_cutoff))
            if c.eta_cutoff:
                out.append(p.EtaLogitsWarper(c.eta_cutoff))
        if c.renormalize_logits:
            out.append(p.LogitNormalization())
        return out

    def _changes(self, new: int) -> dict[str, Any]:
        c = self.config
        values: dict[str, Any] = {
            # float32, as transformers adds it.
            "logit_bias": {i[0]: float(np.float32(b)) for i, b in self._biases.items()},
            "repetition_penalty": c.repetition_penalty or 1.0,
            "no_repeat_ngram_size": c.no_repeat_ngram_size or 0,
            "min_new_tokens": min(new, max(0, self.min_length - self.batch.length)),
        }
        ends = [[i] for i in self.ends]
        values["bad_words"] = [word for word in c.bad_words_ids or () if list(word) not in ends]
        if c.suppress_tokens is not None:
            inside = [i for i in c.suppress_tokens if 0 <= i < self.vocab_size]
            values["suppress_tokens"] = inside
        if c.forced_bos_token_id is not None and self.batch.length == 1:
            values["forced_tokens"] = [c.forced_bos_token_id]
        if c.forced_eos_token_id is not None:
            values["forced_eos_token_id"] = c.forced_eos_token_id
        if c.prompt_lookup_num_tokens:
            values["prompt_lookup"] = min(MAX_DRAFT, c.prompt_lookup_num_tokens)
        if self.draft is not None:
            values["draft"] = self.draft
        return values

    def _check(self) -> None:
        c = self.config
        if self.max_length <= self.batch.length:
            allowed = f"more than the {self.batch.length} tokens of the prompt, or max_new_tokens"
            raise ParameterError("max_length", self.max_length, allowed)
        if c.do_sample and self.beams > 1:
            raise UnsupportedError("do_sample: beam search is deterministic here; set it to False")
        if self.count > 1 and self.beams == 1 and not c.do_sample:
            allowed = "1 without do_sample=True or num_beams above 1"
            raise ParameterError("num_return_sequences", self.count, allowed)
        if self.count > self.beams > 1:
            allowed = f"at most num_beams = {self.beams}"
            raise ParameterError("num_return_sequences", self.count, allowed)
        if c.do_sample and c.temperature is not None and not c.temperature > 0:
            allowed = "a number above 0; do_sample=False is greedy"
            raise ParameterError("temperature", c.temperature, allowed)
        for name in ("epsilon_cutoff", "eta_cutoff"):
            value = getattr(c, name)
            if value is not None and not 0 <= value < 1:
                raise ParameterError(name, value, "a number in [0, 1)")
        self._check_ids()
        self._check_speculation()
        self.params() if self.beams == 1 else self.search_params(changes=True)

    def _check_ids(self) -> None:
        c, size = self.config, self.vocab_size
        words = c.bad_words_ids
        if words is not None and (not isinstance(words, list | tuple) or not len(words)):
            raise ParameterError("bad_words_ids", words, "a list of lists of ids")
        forced = {n: getattr(c, n) for n in ("forced_bos_token_id", "forced_eos_token_id")}
        lists = {
            "bad_words_ids": [i for word in words or () for i in _listed("bad_words_ids", word)],
            "sequence_bias": [i for ids in self._biases for i in ids],
        } | {n: np.atleast_1d(v).tolist() for n, v in forced.items() if v is not None}
        for name, ids in lists.items():
            for i in ids:
                if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < size:
                    raise ParameterError(name, i, f"ids from 0 to {size - 1}")
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            if getattr(c, name) is not None:
                _listed(name, getattr(c, name))

    def _check_speculation(self) -> None:
        asked = {
            "assistant_model": self.draft,
            "prompt_lookup_num_tokens": self.config.prompt_lookup_num_tokens,
        }
        for name, value in asked.items():
            if value and (self.beams > 1 or self.contrasts):
                raise UnsupportedError(f"{name}: not with beam search or contrastive search")
            if value and self.count > 1:
                raise ParameterError("num_return_sequences", self.count, f"1 with {name}")


def _listed(name: str, ids: Any) -> list[Any]:
    if not isinstance(ids, list | tuple | np.ndarray):
        raise ParameterError(name, ids, "a list of ids")
    return list(ids)
