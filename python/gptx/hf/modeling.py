"""A model with the methods of transformers' ``GPT2LMHeadModel``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptx.errors import ContextLengthError, ParameterError, UnsupportedError
from gptx.hf import decoding, forward, generation_config, loading, prompts, seed
from gptx.hf.arguments import Arguments
from gptx.hf.arrays import Array, given, loaded_torch
from gptx.hf.cache import Cache
from gptx.hf.config import GPT2Config, config_of, read_config
from gptx.hf.generation_config import DEFAULTS, NAMES, GenerationConfig
from gptx.hf.locate import locate
from gptx.hf.outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from gptx.hf.prompts import Batch
from gptx.hf.stopping import MaxLengthCriteria, StopStrings
from gptx.hf.streamers import BaseStreamer
from gptx.model import Model

# Of `forward` and `generate`: what must stay as it is.
_UNSUPPORTED = (
    "past_key_values",
    "cache",
    "inputs_embeds",
    "token_type_ids",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "output_attentions",
    "head_mask",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
    "synced_gpus",
    "assistant_tokenizer",
)


class Device(str):
    """A device where the script has not imported torch: "cpu" or "cuda:0"."""

    @property
    def type(self) -> str:
        return self.partition(":")[0]

    @property
    def index(self) -> int | None:
        number = self.partition(":")[2]
        return int(number) if number else None


class GPT2LMHeadModel:
    """Made by `from_pretrained`.

    Attributes:
        config: the shape.
        generation_config: the defaults of `generate`.
        gptx: the `gptx.Model` behind it.
        name_or_path: as given to `from_pretrained`.
    """

    main_input_name = "input_ids"
    base_model_prefix = "transformer"
    training = False

    def __init__(
        self,
        model: Model,
        config: GPT2Config | None = None,
        generation_config: GenerationConfig | None = None,
        name_or_path: str = "",
    ) -> None:
        if not isinstance(model, Model):
            allowed = "a gptx.Model; from_pretrained loads one"
            raise ParameterError("model", model, allowed)
        stored = model._source.generation
        self.gptx = model
        self.config = config or config_of(model.config, stored)
        self.generation_config = generation_config or _defaults(model.path, self.config, stored)
        self.name_or_path = name_or_path or str(model.path)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        config: GPT2Config | None = None,
        generation_config: GenerationConfig | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> GPT2LMHeadModel:
        """Loads a model.

        Args:
            pretrained_model_name_or_path: a Hugging Face folder, a ``.gptx`` file, another
                checkpoint that `gptx.load` takes, or the name of a model on the hub that is in the
                cache of this machine.
            dtype, torch_dtype: float32, bfloat16, "int8" or "int8-fast": what is computed in;
                "auto" or None: what the file is stored as, float32 for checkpoints.
            device_map: "cpu", "cuda", "cuda:1", a number of a GPU, or "auto".
            config: must have the shape of the model.
            **kwargs: ``low_cpu_mem_usage``, ``attn_implementation`` and others that say how to
                load or compute have no effect.

        Raises:
            ParameterError: a value that is not possible; there is no such model.
            UnsupportedError: an argument that gptx does not honour.
            ConvertError, ModelFileError, UnsafeCheckpointError, DeviceError: as `gptx.load`.
        """
        loading.checked(kwargs)
        precision = loading.precision_of(dtype if dtype is not None else torch_dtype)
        device = loading.device_of(device_map)
        path = locate(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            revision=revision,
            subfolder=subfolder,
        )
        model = loading.load(path, device=device, precision=precision)
        has_config = (path / "config.json").is_file()
        own = read_config(path) if has_config else config_of(model.config, model._source.generation)
        own.vocab_size = model.config.vocab_size  # without the rows that pad an embedding
        if config is not None:
            for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
                if getattr(config, name) != getattr(own, name):
                    raise ParameterError(
                        f"config.{name}", getattr(config, name), getattr(own, name)
                    )
        name = os.fspath(pretrained_model_name_or_path)
        return cls(model, config or own, generation_config, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.gptx!r})"

    @property
    def device(self) -> Any:
        """A torch.device where the script has imported torch, else a `Device`."""
        torch = loaded_torch()
        name = self.gptx.device
        return Device(name) if torch is None else torch.device(name)

    @property
    def dtype(self) -> Any:
        """What is computed in: a torch.dtype where the script has imported torch, else its name."""
        torch = loaded_torch()
        name = self.gptx.precision
        return name if torch is None else getattr(torch, name.removesuffix("-fast"))

    def num_parameters(self, only_trainable: bool = False, **_: object) -> int:
        return self.gptx.config.n_params

    def can_generate(self) -> bool:
        return True

    def eval(self) -> GPT2LMHeadModel:
        return self

    def train(self, mode: bool = True) -> GPT2LMHeadModel:
        if mode:
            raise UnsupportedError("train: gptx.hf runs models; gptx train trains them")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> GPT2LMHeadModel:
        return self.train(requires_grad)

    def to(self, *args: Any, **kwargs: Any) -> GPT2LMHeadModel:
        """Moves the model to a device, or computes in another precision: it is loaded again, into
        this object.

        Raises:
            ParameterError, DeviceError: neither a device that is there nor a precision of gptx.
        """
        device, precision = self.gptx.device, None
        for value in (*args, *kwargs.values()):
            if "dtype" in type(value).__name__ or str(value) in ("float32", "bfloat16", "int8"):
                precision = loading.precision_of(value)
            elif value is not None and not isinstance(value, bool):
                device = loading.device_of(value, "device")
        same = device == self.gptx.device or (device == "cuda" and self.gptx.device == "cuda:0")
        if not same or precision not in (None, self.gptx.precision):
            precision = precision or (self.gptx.precision if self.gptx.dtype != "float32" else None)
            self.gptx = loading.load(self.gptx.path, device=device, precision=precision)
        return self

    def cuda(self, device: int | None = None) -> GPT2LMHeadModel:
        return self.to("cuda" if device is None else device)

    def cpu(self) -> GPT2LMHeadModel:
        return self.to("cpu")

    def float(self) -> GPT2LMHeadModel:
        return self.to("float32")

    def bfloat16(self) -> GPT2LMHeadModel:
        return self.to("bfloat16")

    def half(self) -> GPT2LMHeadModel:
        raise UnsupportedError("half: gptx computes in float32, bfloat16 or int8, not in float16")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, **_: object) -> None:
        """Raises ParameterError for another size than it has: new rows would be untrained."""
        size = self.gptx.config.vocab_size
        if new_num_tokens not in (None, size):
            allowed = f"{size}; tokens that were added may stand in padding alone"
            raise ParameterError("new_num_tokens", new_num_tokens, allowed)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Array | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        *,
        labels: Array | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: Cache | None = None,
        **others: Any,
    ) -> Any:
        """The logits of a batch, and its loss.

        Args:
            input_ids: ``[B, T]``.
            past_key_values, cache: what ``past_key_values`` of an earlier call was; ``input_ids``
                then follow what it holds.
            attention_mask: ``[B, T]``, 0 at padding, on the left or the right. The mask of a call
                with a cache is not looked at.
            position_ids: none but those that count each row's own tokens from 0, which gptx counts
                where transformers counts the padding too unless it is given them.
            labels: ``[B, T]``, usually the ids; -100 is not scored.
            output_hidden_states: give ``hidden_states`` too, which takes a forward pass of its own;
                not with a cache.
            use_cache: give ``past_key_values``, which is computed when it is looked at; default
                that of the config.
            logits_to_keep: of so many of the last places alone; 0: all.
            return_dict: False for a tuple.

        Returns:
            ``logits`` float32 ``[B, T, V]``, zeros at padding; ``loss``, the mean of the cross
            entropies of ``labels[:, 1:]``; ``hidden_states``, ``n_layer + 1`` times ``[B, T, C]``.

        Raises:
            ParameterError, TokenIdError, ContextLengthError: naming the argument.
            UnsupportedError: an argument that gptx does not have.
        """
        _refuse(others)
        past = past_key_values if past_key_values is not None else cache
        if input_ids is None:
            raise ParameterError("input_ids", None, "integers of the shape [batch, length]")
        if past is not None and not isinstance(past, Cache):
            raise ParameterError("past_key_values", past, "what an earlier call returned")
        mask = attention_mask if past is None else None
        batch = prompts.batch(input_ids, mask, self.gptx.config.vocab_size)
        if past is not None and output_hidden_states:
            raise UnsupportedError("output_hidden_states: not with past_key_values")
        if past is None:
            prompts.check_positions(position_ids, batch)
            logits = forward.logits(self.gptx, batch)
        else:
            logits = past.feed(batch.ids)
        loss = None if labels is None else forward.loss(logits, batch, labels)
        if logits_to_keep:
            logits = logits[:, -logits_to_keep:]
        states = None
        if output_hidden_states:
            found = forward.hidden_states(self.gptx, batch)
            states = tuple(given(state, batch.device) for state in found)
        out = forward.Output(
            hidden_states=states,
            loss=loss if loss is None else given(loss, batch.device),
            logits=given(logits, batch.device),
        )
        keep = self.config.use_cache if use_cache is None else use_cache
        if keep:
            out.remember(past or (lambda: self._cache(batch)))
        return out if return_dict else out.to_tuple()

    def generate(
        self,
        inputs: Array | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence[Callable[..., Array]] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Array], Any] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: GPT2LMHeadModel | None = None,
        streamer: BaseStreamer | None = None,
        *,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        tokenizer: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continues a batch of prompts.

        Args:
            inputs, input_ids: ``[B, T]``; None: one row of ``bos_token_id``.
            generation_config: arguments by default; those of the call come first, those of the
                model and of transformers after it.
            logits_processor: functions ``f(input_ids [B, T], scores [B, V]) -> scores``.
            stopping_criteria: functions ``f(input_ids, scores) -> bool [B]``.
            prefix_allowed_tokens_fn: ``f(batch_id, ids [T])`` returns the ids that may follow.
            assistant_model: a smaller model that drafts; no token changes.
            streamer: told the prompt and each token.
            attention_mask: ``[B, T]``, 0 at padding. Rows that are padded on the right go on from
                their last token, where transformers goes on from the padding.
            tokenizer: for ``stop_strings``; default the model's.
            seed: of ``do_sample``; default one from the generators that `set_seed` seeds.
            **kwargs: arguments of `GenerationConfig`.

        Returns:
            Ids int64 ``[B * num_return_sequences, T + new]``: prompts, continuations, and
            ``pad_token_id`` behind those that ended before others; where the context of a row is
            full, it ends. A `ModelOutput` where ``return_dict_in_generate`` is set.

        Raises:
            ParameterError, TokenIdError, ContextLengthError: naming the argument.
            UnsupportedError: an argument that gptx does not have.
        """
        others = {name: value for name, value in kwargs.items() if name not in NAMES}
        _refuse(others | {"synced_gpus": synced_gpus})
        call = {name: value for name, value in kwargs.items() if name in NAMES}
        config = _merged(call, generation_config, self.generation_config)
        ends = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
        pad = config.pad_token_id
        if input_ids is not None and inputs is not None:
            raise ParameterError("input_ids", input_ids, "None beside inputs")
        ids = inputs if inputs is not None else input_ids
        if ids is None:
            if config.bos_token_id is None:
                raise ParameterError("inputs", None, "input_ids, for there is no bos_token_id")
            device = None if loaded_torch() is None else "cpu"
            ids = given(np.array([[config.bos_token_id]]), device)
        if attention_mask is None:
            attention_mask = prompts.without_padding(ids, pad, ends)
        batch = prompts.batch(ids, attention_mask, self.gptx.config.vocab_size)
        prompts.check_positions(position_ids, batch)
        longest = max(int(n) for n in batch.mask.sum(axis=1))
        if longest >= self.gptx.config.block_size:
            raise ContextLengthError(longest, self.gptx.config.block_size - 1)
        draft = None
        if assistant_model is not None:
            if not isinstance(assistant_model, GPT2LMHeadModel):
                raise ParameterError("assistant_model", assistant_model, "a model of gptx.hf")
            draft = assistant_model.gptx
        default_length = all(
            getattr(c, "max_length", None) is None
            for c in (generation_config, self.generation_config)
        )
        default_length &= call.get("max_length") is None
        criteria = _functions("stopping_criteria", stopping_criteria)
        max_length = self._max_length(config, batch, default=default_length)
        for own in [c for c in criteria if type(c) is MaxLengthCriteria]:  # it replaces the default
            max_length = own.max_length
        arguments = Arguments(
            config=config,
            batch=batch,
            vocab_size=self.gptx.config.vocab_size,
            max_length=max_length,
            min_length=(config.min_length or 0)
            if config.min_new_tokens is None
            else batch.length + config.min_new_tokens,
            ends=tuple(ends),
            pad=ends[0] if pad is None and ends else pad,
            processors=_functions("logits_processor", logits_processor),
            prefix_allowed=prefix_allowed_tokens_fn,
            criteria=tuple(c for c in criteria if type(c) is not MaxLengthCriteria),
            draft=draft,
            seed=_seed(seed, config, batch),
        )
        stops = self._stop_strings(arguments, tokenizer)
        if streamer is not None:
            if arguments.beams > 1:
                raise ParameterError("streamer", type(streamer).__name__, "None with num_beams")
            streamer.put(given(np.repeat(batch.ids, arguments.count, axis=0), batch.device))
        found = self._continue(arguments, stops, streamer)
        if streamer is not None:
            streamer.end()
        return _output(arguments, found)

    def _continue(
        self, call: Arguments, stops: StopStrings | None, streamer: BaseStreamer | None
    ) -> decoding.Continued:
        config, rows = call.config, len(call.batch.ids) * call.count
        reports = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        if call.beams > 1 or call.contrasts:
            for name, value in (("stopping_criteria", call.criteria), ("streamer", streamer)):
                if value:
                    raise UnsupportedError(f"{name}: not with beam search or contrastive search")
            if call.contrasts and (reports or len(call.possible_ends) > 1):
                name = "output_scores" if reports else "eos_token_id"
                raise UnsupportedError(f"{name}: contrastive search reports one end and no scores")
            return decoding.by_search(self.gptx, call, stops)
        stepwise = (
            call.changes
            or call.filters_more
            or bool(call.criteria)
            or bool(reports)
            or len(call.possible_ends) > 1
            or (streamer is not None and rows > 1)
            # Rows that have ended go on beside others then, as in transformers.
            or (not call.ends and rows > 1 and (stops is not None or config.max_time is not None))
        )
        if stepwise:
            criteria = [*call.criteria, *([stops] if stops is not None else [])]
            return decoding.in_step(self.gptx, call, criteria, streamer)
        return decoding.by_engine(self.gptx, call, stops, streamer)

    def _max_length(self, config: GenerationConfig, batch: Batch, *, default: bool) -> int:
        if config.max_new_tokens is not None:
            if type(config.max_new_tokens) is bool or config.max_new_tokens < 1:
                raise ParameterError("max_new_tokens", config.max_new_tokens, "at least 1")
            return batch.length + int(config.max_new_tokens)
        length = DEFAULTS["max_length"] if config.max_length is None else config.max_length
        return min(batch.length + length, self.config.n_positions) if default else int(length)

    def _stop_strings(self, call: Arguments, tokenizer: Any) -> StopStrings | None:
        if not call.stops:
            return None
        inner = getattr(tokenizer, "_tokenizer", None) or self.gptx._tokenizer
        if inner is None:
            allowed = "None without a tokenizer: generate(..., tokenizer=tokenizer)"
            raise ParameterError("stop_strings", call.stops, allowed)
        return StopStrings(inner, call.stops)

    def _cache(self, batch: Batch) -> Cache:
        return Cache([self.gptx.branch(batch.row(i)) for i in range(len(batch.ids))])


class AutoModelForCausalLM:
    """``AutoModelForCausalLM.from_pretrained`` is that of `GPT2LMHeadModel`."""

    from_pretrained = GPT2LMHeadModel.from_pretrained


def _defaults(path: Path, config: GPT2Config, stored: Any) -> GenerationConfig:
    return generation_config.of_model(path, config, stored)


def _merged(
    call: dict[str, Any], given: GenerationConfig | None, model: GenerationConfig
) -> GenerationConfig:
    return generation_config.merged(call, generation_config.of_call(given), model)


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in _UNSUPPORTED:
            raise ParameterError(name, value, "an argument of transformers")
        if value is not None and value is not False:
            raise UnsupportedError(f"{name}: gptx does not have it")


def _functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    functions = () if value is None else value
    if not isinstance(functions, Sequence) or not all(map(callable, functions)):
        raise ParameterError(name, value, "a list of functions")
    return tuple(functions)


def _seed(given_seed: int | None, config: GenerationConfig, batch: Batch) -> int:
    if given_seed is not None:
        if type(given_seed) is not int or not 0 <= given_seed < 2**64:
            raise ParameterError("seed", given_seed, "an integer from 0 to 2**64 - 1")
        return given_seed
    return seed.draw(batch.device) if config.do_sample else 0


def _output(call: Arguments, found: decoding.Continued) -> Any:
    prompt = np.repeat(call.batch.ids, call.count, axis=0)
    longest = max(map(len, found.rows))
    pad = 0 if call.pad is None else call.pad
    new = np.full((len(prompt), longest), pad, np.int64)
    for i, row in enumerate(found.rows):
        new[i, : len(row)] = row
    device = call.batch.device
    sequences = given(np.concatenate([prompt, new], axis=1), device)
    if not call.config.return_dict_in_generate:
        return sequences
    if found.totals is not None:
        totals = given(np.array(found.totals, np.float32), device)
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=totals)
    steps: dict[str, Any] = {}
    for name, values in (("scores", found.scores), ("logits", found.logits)):
        steps[name] = None if values is None else tuple(given(v, device) for v in values)
    return GenerateDecoderOnlyOutput(sequences=sequences, **steps)
