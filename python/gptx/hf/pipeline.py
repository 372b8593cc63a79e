"""``pipeline("text-generation")``: texts in, texts out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from types import GeneratorType
from typing import Any

import numpy as np

from gptx.errors import ParameterError, UnsupportedError
from gptx.hf import loading
from gptx.hf.arrays import to_numpy
from gptx.hf.generation_config import NAMES, GenerationConfig
from gptx.hf.modeling import GPT2LMHeadModel
from gptx.hf.tokenizer import GPT2Tokenizer

_DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
"""What stands where neither the call nor the model's generation_config.json says anything."""
_SAMPLING = ("temperature",)
_NAMES = {None, "text-generation"}


def pipeline(
    task: str | None = None,
    model: str | os.PathLike[str] | GPT2LMHeadModel | None = None,
    config: Any = None,
    tokenizer: str | os.PathLike[str] | GPT2Tokenizer | None = None,
    *,
    revision: str | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = "auto",
    torch_dtype: Any = None,
    model_kwargs: dict[str, Any] | None = None,
    use_fast: bool = True,
    trust_remote_code: bool | None = None,
    token: Any = None,
    **kwargs: Any,
) -> TextGenerationPipeline:
    """A function from texts to continued texts.

    Args:
        task: "text-generation".
        model: as for `GPT2LMHeadModel.from_pretrained`, or such a model; default "gpt2".
        tokenizer: default that of the model's path.
        device, device_map: as ``device_map`` of `from_pretrained`.
        dtype, torch_dtype: as there.
        **kwargs: defaults of the calls.

    Raises:
        ParameterError, UnsupportedError: naming the argument.
    """
    if task not in _NAMES:
        raise ParameterError("task", task, "'text-generation'")
    if model is None:
        model = "gpt2"
    if not isinstance(model, GPT2LMHeadModel):
        where = device_map if device_map is not None else device
        tokenizer = model if tokenizer is None else tokenizer
        model = GPT2LMHeadModel.from_pretrained(
            model,
            config=config,
            revision=revision,
            device_map=where,
            dtype=dtype if torch_dtype is None else torch_dtype,
            **(model_kwargs or {}),
        )
    elif device is not None:
        model.to(loading.device_of(device, "device"))
    if tokenizer is None:
        tokenizer = model.gptx.path
    if not isinstance(tokenizer, GPT2Tokenizer):
        tokenizer = GPT2Tokenizer.from_pretrained(tokenizer, revision=revision)
    return TextGenerationPipeline(model=model, tokenizer=tokenizer, **kwargs)


class TextGenerationPipeline:
    """Made by `pipeline`; samples up to 256 tokens at temperature 0.7 unless it is told otherwise.

    Attributes:
        model, tokenizer: its parts; the tokenizer pads on the left from now on.
    """

    task = "text-generation"

    def __init__(
        self,
        model: GPT2LMHeadModel,
        tokenizer: GPT2Tokenizer,
        *,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"
        self._batch_size = batch_size
        self._kwargs = kwargs

    @property
    def device(self) -> Any:
        return self.model.device

    def __call__(self, text_inputs: Any, *, batch_size: int | None = None, **kwargs: Any) -> Any:
        """Continues a text, or each of a list or generator of texts.

        Args:
            text_inputs: a str, a list of str, or a generator of str, which is read as needed.
            batch_size: how many to continue together; default all of a list, which changes no
                token of greedy texts.
            return_full_text: put the prompt in front; default True.
            return_tensors: return ids instead, prompt included.
            prefix: what stands in front of every prompt, for the model alone.
            stop_sequence: as ``stop_strings`` of `generate`.
            handle_long_generation: "hole" cuts the beginning of prompts that leave no room.
            clean_up_tokenization_spaces, skip_special_tokens: of decoding; the latter is True by
                default.
            truncation, padding, add_special_tokens, tokenizer_encode_kwargs: of encoding.
            **kwargs: of `GPT2LMHeadModel.generate`.

        Returns:
            ``[{"generated_text": ...}]``, one for each of ``num_return_sequences``; of a list or a
            generator one such list for each text.

        Raises:
            ParameterError, UnsupportedError: naming the argument.
        """
        options = _Options(self.model, self.tokenizer, self._kwargs | kwargs, kwargs)
        if isinstance(text_inputs, str):
            return self._continued([text_inputs], options)[0]
        if isinstance(text_inputs, GeneratorType):
            return self._lazily(text_inputs, options)
        if not isinstance(text_inputs, Iterable):
            raise ParameterError("text_inputs", text_inputs, "a str or a list of str")
        texts = list(text_inputs)
        for text in texts:
            if isinstance(text, dict) or (isinstance(text, list | tuple) and text):
                raise UnsupportedError("text_inputs: gptx runs no chats; give texts")
            if not isinstance(text, str):
                raise ParameterError("text_inputs", text, "a str or a list of str")
        size = batch_size or self._batch_size or len(texts) or 1
        parts = [texts[i : i + size] for i in range(0, len(texts), size)]
        return [records for part in parts for records in self._continued(part, options)]

    def _lazily(self, texts: Iterable[str], options: _Options) -> Iterator[Any]:
        for text in texts:
            yield self._continued([text], options)[0]

    def _continued(self, texts: list[str], options: _Options) -> list[list[dict[str, Any]]]:
        prompts = [options.encoded(text) for text in texts]
        if len(prompts) > 1 and not options.counts_padding and all(prompts):
            rows = self._generated(prompts, options)
        else:
            rows = [self._generated([prompt], options)[0] for prompt in prompts]
        return [
            [options.record(text, prompt, ids) for ids in found]
            for text, prompt, found in zip(texts, prompts, rows, strict=True)
        ]

    def _generated(self, prompts: list[list[int]], options: _Options) -> list[list[list[int]]]:
        """For each prompt its continuations."""
        length = max(map(len, prompts))
        ids = np.zeros((len(prompts), length), np.int64)
        mask = np.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, length - len(prompt) :] = prompt
            mask[i, length - len(prompt) :] = 1
        given = {"input_ids": ids, "attention_mask": mask} if length else {}
        found = self.model.generate(**given, **options.generate)
        new = to_numpy(found)[:, length or 0 :]
        count = len(new) // len(prompts)
        rows = [options.without_padding(row.tolist(), length == 0) for row in new]
        return [rows[i : i + count] for i in range(0, len(rows), count)]


class _Options:
    """The arguments of a call, sorted."""

    def __init__(
        self,
        model: GPT2LMHeadModel,
        tokenizer: GPT2Tokenizer,
        values: dict[str, Any],
        of_call: dict[str, Any],
    ) -> None:
        values = dict(values)
        self._tokenizer = tokenizer
        self._returns = _returns(values)
        self._prefix = values.pop("prefix", None) or ""
        self._hole = values.pop("handle_long_generation", None)
        if self._hole not in (None, "hole"):
            raise ParameterError("handle_long_generation", self._hole, "None or 'hole'")
        skip = values.pop("skip_special_tokens", None)
        self._skip_special = True if skip is None else skip
        values.pop("clean_up_tokenization_spaces", None)
        encode = {n: values.pop(n, None) for n in ("truncation", "padding", "add_special_tokens")}
        encode["max_length"] = values.get("max_length")
        self._encode = {n: v for n, v in encode.items() if v is not None}
        self._encode |= values.pop("tokenizer_encode_kwargs", None) or {}
        for name in ("tools", "documents", "continue_final_message"):
            if values.pop(name, None) is not None:
                raise UnsupportedError(f"{name}: gptx runs no chats")
        stop = values.pop("stop_sequence", None)
        if stop is not None:
            values |= {"stop_strings": [stop] if isinstance(stop, str) else stop}
            values |= {"tokenizer": tokenizer}
        if values.get("return_dict_in_generate"):
            raise UnsupportedError("return_dict_in_generate: not in a pipeline; call generate")
        self.generate = _with_defaults(model, tokenizer, values, of_call)
        settings = self._settings(model)
        self._prefix_length = len(tokenizer(self._prefix)["input_ids"]) if self._prefix else 0
        for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if self._prefix_length and settings.get(total) and settings.get(new) is None:
                self.generate[total] = settings[total] + self._prefix_length
        self._new = settings.get("max_new_tokens")
        self._most = settings.get("max_length") or 0
        self.counts_padding = self._new is None or bool(settings.get("min_length"))
        eos = settings.get("eos_token_id")
        self._ends = [] if eos is None else np.atleast_1d(eos).tolist()
        self._pad = settings.get("pad_token_id")

    def encoded(self, text: str) -> list[int]:
        ids = self._tokenizer(self._prefix + text, **self._encode)["input_ids"]
        if self._hole is None:
            return ids
        new = self._most - len(ids) if self._new is None else self._new
        size = self._tokenizer.model_max_length
        if new < 0 or size - new <= 0:
            allowed = f"one that leaves room for {new} tokens in {size}"
            raise ParameterError("handle_long_generation", self._hole, allowed)
        return ids[-(size - new) :] if len(ids) + new > size else ids

    def record(self, text: str, prompt: list[int], ids: list[int]) -> dict[str, Any]:
        if self._returns == "ids":
            return {"generated_token_ids": prompt + ids}
        new = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)
        return {"generated_text": text + new if self._returns == "all" else new}

    def without_padding(self, new: list[int], whole: bool) -> list[int]:
        """New ids up to the first end token. Of an empty prompt transformers decodes the token with
        which it begins, too."""
        start = 1 if whole else 0
        for i in range(start, len(new)):
            if new[i] in self._ends:
                return new[: i + 1]
        return new

    def _settings(self, model: GPT2LMHeadModel) -> dict[str, Any]:
        config = self.generate.get("generation_config")
        base = model.generation_config.to_diff_dict()
        return base | ({} if config is None else config.to_diff_dict()) | self.generate


def _returns(values: dict[str, Any]) -> str:
    """What records hold: "all", "new" text, or "ids"."""
    full, tensors, text = (
        values.pop(name, None) for name in ("return_full_text", "return_tensors", "return_text")
    )
    if full is not None and (tensors is not None or text is not None):
        raise ParameterError("return_full_text", full, "None beside return_text or return_tensors")
    if tensors is not None:
        if text is not None:
            raise ParameterError("return_text", text, "None beside return_tensors")
        return "ids"
    return "new" if full is False else "all"


def _with_defaults(
    model: GPT2LMHeadModel,
    tokenizer: GPT2Tokenizer,
    values: dict[str, Any],
    of_call: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of `generate`, with the pipeline's defaults for what is not set."""
    given: GenerationConfig | None = values.get("generation_config")
    if given is not None and "generation_config" in of_call:
        values = {n: v for n, v in values.items() if n not in NAMES or n in of_call}
    set_ = model.generation_config.to_diff_dict()
    set_ |= {} if given is None else given.to_diff_dict()
    set_ |= values
    added: dict[str, Any] = {n: v for n, v in _DEFAULTS.items() if n not in set_}
    if "max_length" in set_:
        added.pop("max_new_tokens", None)
    if tokenizer.pad_token_id is not None and "pad_token_id" not in set_:
        added["pad_token_id"] = tokenizer.pad_token_id
    if not (set_ | added).get("do_sample"):
        added = {n: v for n, v in added.items() if n not in _SAMPLING}
    if given is None:
        return values | added
    given = copy.deepcopy(given)
    given.update(**added)
    return values | {"generation_config": given}
