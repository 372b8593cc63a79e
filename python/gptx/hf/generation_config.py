"""How `generate` goes on: the arguments of transformers, with its defaults."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptx.errors import ParameterError, UnsupportedError
from gptx.hf.config import GPT2Config, read_object
from gptx.hf.locate import locate

DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}
"""What stands where neither the call nor the model says anything; of other names it is None."""

_HONOURED = (
    "max_new_tokens",
    "min_new_tokens",
    "max_time",
    "stop_strings",
    "min_p",
    "bad_words_ids",
    "renormalize_logits",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "prompt_lookup_num_tokens",
    "penalty_alpha",
)
# They say how tokens are computed, not which; gptx has its own ways.
_WITHOUT_EFFECT = (
    "use_cache",
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "low_memory",
    "prefill_chunk_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "is_assistant",
    "decoder_start_token_id",
    "transformers_version",
)
# With the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_mtp": (None, False),
    "top_h": (None,),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "remove_invalid_values": (None, False),
    "token_healing": (None, False),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
    "continuous_batching_config": (None,),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
}
NAMES = frozenset((*DEFAULTS, *_HONOURED, *_WITHOUT_EFFECT, *_UNSUPPORTED))


class GenerationConfig:
    """Arguments of `generate` as attributes; None leaves one to the model and to `DEFAULTS`.

    Raises:
        ParameterError: transformers has no such argument.
    """

    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in NAMES:
                raise ParameterError(name, values[name], "an argument of generate")
        self.__dict__.update(dict.fromkeys(sorted(NAMES)) | values)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any
    ) -> GenerationConfig:
        """That of generation_config.json in the folder of a model; ``kwargs`` replace its values.

        Raises:
            ParameterError: there is no such model, or an unknown argument.
        """
        values = read_object(locate(pretrained_model_name) / "generation_config.json")
        known = {name: value for name, value in values.items() if name in NAMES}
        return cls(**(known | kwargs))

    @classmethod
    def from_model_config(cls, config: GPT2Config) -> GenerationConfig:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return cls(**{name: getattr(config, name) for name in names})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        text = json.dumps(self.to_diff_dict(), indent=2, sort_keys=True, default=str)
        return f"{type(self).__name__} {text}"

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """What was set."""
        return {name: value for name, value in self.__dict__.items() if value is not None}

    def update(self, **values: Any) -> dict[str, Any]:
        """Sets what is an argument of `generate`, and returns the rest."""
        known = {name: value for name, value in values.items() if name in NAMES}
        self.__dict__.update(known)
        return {name: value for name, value in values.items() if name not in NAMES}


def of_model(folder: Path, config: GPT2Config, stored: Mapping[str, Any]) -> GenerationConfig:
    """The defaults of a model.

    Args:
        folder: where generation_config.json may lie.
        stored: what a ``.gptx`` file keeps of it: sampling only where it is the default.
    """
    path = folder / "generation_config.json"
    if path.is_file():
        values = read_object(path)
        return GenerationConfig(**{n: v for n, v in values.items() if n in NAMES})
    found = GenerationConfig.from_model_config(config)
    found.update(**stored)
    if {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"} & stored.keys():
        found.do_sample = True
    return found


def of_call(given: Any) -> GenerationConfig | None:
    """The config that a call was given: one of these, or what is set in one of transformers.

    Raises:
        ParameterError: it is something else.
    """
    if given is None or isinstance(given, GenerationConfig):
        return given
    if not hasattr(given, "to_diff_dict"):
        raise ParameterError("generation_config", given, "a gptx.hf.GenerationConfig")
    values = given.to_diff_dict()
    return GenerationConfig(**{name: value for name, value in values.items() if name in NAMES})


def merged(
    call: Mapping[str, Any], given: GenerationConfig | None, model: GenerationConfig
) -> GenerationConfig:
    """The arguments of a call before those of its config before the model's before the defaults.

    Raises:
        UnsupportedError: one that gptx does not have asks for something.
    """
    config = GenerationConfig() if given is None else copy.deepcopy(given)
    for name, value in config.to_diff_dict().items():
        if name not in NAMES:
            raise ParameterError(name, value, "an argument of generate")
    for source in (model.to_dict(), DEFAULTS):
        for name, value in source.items():
            if getattr(config, name, None) is None:
                setattr(config, name, value)
    config.update(**call)
    for name, off in _UNSUPPORTED.items():
        value = getattr(config, name)
        if not any(value is o or value == o for o in off):
            raise UnsupportedError(f"{name}: gptx has no such generation, got {value!r:.80}")
    return config
