"""gptx as a model of the lm-evaluation-harness (Gao et al., 2024), registered there as "gptx".

>>> import lm_eval
>>> from gptx.integrations.lm_eval import GptxLM
>>> lm_eval.simple_evaluate(model=GptxLM("gpt2.gptx"), tasks=["lambada_openai"])

Tokens, windows and truncation are those of the harness's own adapter for transformers, so that the
same weights have the same figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gptx import requests, scoring
from gptx.errors import ContextLengthError, MissingExtraError, ParameterError
from gptx.loading import load
from gptx.model import Model
from gptx.sampling import SamplingParams

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] not in ("lm_eval", "tqdm"):
        raise
    raise MissingExtraError("evaluation by tasks", "lm-eval", "eval") from None

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_MAX_GEN_TOKS = 256
_WINDOW = 256  # requests between two steps of the progress bar
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_PASSED_ON = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "early_stopping",
)

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls it by, its context, and the ids to score behind that."""


@register_model("gptx")
class GptxLM(TemplateLM):
    """A gptx model for ``lm_eval.simple_evaluate(model=GptxLM(...))``; once this module has been
    imported, ``model="gptx", model_args="model=gpt2.gptx"`` is the same.

    Args:
        model: a `gptx.Model`, or what `gptx.load` takes: a path, or None for the built-in demo.
        batch_size, max_batch_size: accepted from the harness and not needed; the engine batches.
        max_length: tokens of context, at most and by default ``block_size``.
        max_gen_toks: tokens to generate where a task does not say; default 256, at most half of
            ``max_length``.
        seed: of tasks that sample, 0 to 2**64 - 1.
        **options: further arguments of `gptx.load`: ``device``, ``threads``, ``precision``, ...

    Raises:
        MissingExtraError: on import, where lm-eval is not installed.
        ParameterError: an argument is out of range, or the model has no end-of-text token.
        TokenizeError: the model has no tokenizer.
    """

    def __init__(
        self,
        model: Model | str | os.PathLike[str] | None = None,
        *,
        batch_size: int | str | None = None,  # noqa: ARG002
        max_batch_size: int | None = None,  # noqa: ARG002
        max_length: int | None = None,
        max_gen_toks: int | None = None,
        seed: int = 1234,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, Model) and options:
            name = next(iter(options))
            raise ParameterError(name, options[name], "no option of load with a model that is")
        self.model = model if isinstance(model, Model) else load(model, **options)
        size = self.model.config.block_size
        self.max_length = _count("max_length", max_length, size, size)
        default = max(1, min(_MAX_GEN_TOKS, self.max_length // 2))
        self.max_gen_toks = _count("max_gen_toks", max_gen_toks, default, max(1, size - 1))
        self._seed = seed
        self._encode = self.model.tokenizer.encode
        ends = requests.eos_token_ids(self.model)
        if not ends:
            raise ParameterError("model", str(self.model.path), "one with an end-of-text token")
        self._end = ends[0]
        start = self.model._source.generation.get("bos_token_id")
        self._start = start if type(start) is int else self._end
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without a context."""
        return self._start

    @property
    def tokenizer_name(self) -> str:
        """Names the cache of requests of the harness."""
        return f"gptx-{self.model._source.checksums.get('__metadata__.tokenizer', 'unknown')}"

    def get_model_info(self) -> dict[str, object]:
        """What the harness writes into its report."""
        return {
            "model_num_parameters": self.model.config.n_params,
            "model_dtype": self.model.dtype,
            "model_precision": self.model.precision,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; text that spells a special token is that token, as in transformers."""
        ids = self._encode(string, allow_special=True)
        return [self._start, *ids] if add_special_tokens else ids

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-probability of each text of any length; each token counts once, with as much
        context as disjoint windows of the harness give it.
        """
        texts = [request.args[0] for request in requests]
        windows: list[Scored] = []
        owners: list[int] = []
        for i, text in enumerate(texts):
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in parts:
                windows.append((None, *make_disjoint_window(part)))
                owners.append(i)
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for i, (score, _) in zip(owners, scores, strict=True):
            totals[i] += score
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each request; the requests with
        the same context compute it once. A context too long is cut from the left.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, rest) in enumerate(requests):
            if len(rest) == 0 or len(context) == 0:
                raise ParameterError("request", requests[i][0], "a token before and one to score")
            if len(rest) > self.max_length:
                raise ContextLengthError(len(rest), self.max_length, "shorten the continuation")
            room = self.max_length + 1 - len(rest)
            groups.setdefault(tuple(context[-room:]), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # Sorted, so that contexts that begin alike follow each other and find it in the cache.
        order = sorted(groups)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="gptx: log-probabilities")
        with bar:
            for part in _windows(order):
                texts = [
                    ([np.array([*key, *requests[i][2]], np.int32) for i in groups[key]], len(key))
                    for key in part
                ]
                found = scoring.behind(self.model, texts)
                for key, scores in zip(part, found, strict=True):
                    for i, scored in zip(groups[key], scores, strict=True):
                        total = float(scored.logprobs.sum(dtype=np.float64))
                        answers[i] = (total, bool((scored.ranks == 0).all()))
                        if requests[i][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
                bar.update(sum(len(groups[key]) for key in part))
        return answers

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to a stop string. A context is cut from the left, so that
        ``max_gen_toks`` tokens fit behind it.
        """
        contexts = [request.args[0] for request in requests]
        settings: list[Mapping[str, Any]] = [request.args[1] for request in requests]
        kinds: dict[str, list[int]] = {}
        for i, values in enumerate(settings):
            kinds.setdefault(repr(sorted(values.items())), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="gptx: texts") as bar:
            for members in kinds.values():
                params = self._params(settings[members[0]])
                room = self.max_length - params.max_new_tokens
                for part in _windows(members):
                    prompts = [
                        (self.tok_encode(contexts[i]) or [self.prefix_token_id])[-room:]
                        for i in part
                    ]
                    for i, result in zip(part, self.model.generate(prompts, params), strict=True):
                        if result.error is not None:
                            raise result.error
                        answers[i] = result.text
                        request = (contexts[i], settings[i])
                        self.cache_hook.add_partial("generate_until", request, result.text)
                    bar.update(len(part))
        return answers

    def _params(self, settings: Mapping[str, Any]) -> SamplingParams:
        """A task's ``generation_kwargs``; what they leave out has transformers' default."""
        values = dict(settings)
        stop = values.pop("until", None) or []
        stops = [stop] if isinstance(stop, str) else [text for text in stop if text]
        end = self.model._decode([self._end])
        lengths = [values.pop(name, None) for name in _LENGTHS]
        length = next((int(n) for n in lengths if n is not None), self.max_gen_toks)
        if not 1 <= length < self.max_length:
            allowed = f"an integer from 1 to {self.max_length - 1}, to leave room for the context"
            raise ParameterError("max_gen_toks", length, allowed)
        temperature = values.pop("temperature", None)
        sampled = values.pop("do_sample", None)
        if sampled is None:
            sampled = bool(temperature)
        for name in values:
            if name not in _PASSED_ON:
                known = ", ".join(("until", "do_sample", "temperature", *_LENGTHS, *_PASSED_ON))
                raise ParameterError(name, values[name], f"one of the generation_kwargs {known}")
        return SamplingParams(
            max_new_tokens=length,
            temperature=(1.0 if temperature is None else float(temperature)) if sampled else 0.0,
            stop=[*stops, *([end] if end and end not in stops else [])],
            seed=self._seed,
            **({"top_k": 50, "top_p": 1.0} | values),
        )


def _count(name: str, value: int | None, default: int, limit: int) -> int:
    if value is None:
        return default
    if type(value) is not int or not 1 <= value <= limit:
        raise ParameterError(name, value, f"an integer from 1 to {limit}")
    return value


def _windows(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    for begin in range(0, len(items), _WINDOW):
        yield items[begin : begin + _WINDOW]
