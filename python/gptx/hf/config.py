"""The shape of a model under transformers' names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gptx.config import GPTConfig
from gptx.errors import ConvertError, ParameterError
from gptx.hf.locate import locate

_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "use_cache": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "pad_token_id": None,
    "tie_word_embeddings": True,
}


class GPT2Config:
    """The values of config.json as attributes; defaults as in transformers."""

    model_type: ClassVar[str] = "gpt2"
    is_encoder_decoder: ClassVar[bool] = False

    def __init__(self, **values: Any) -> None:
        renamed = {_ALIASES.get(name, name): value for name, value in values.items()}
        self.__dict__.update(_DEFAULTS | renamed)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> GPT2Config:
        """The config of a Hugging Face folder, a ``.gptx`` file or a checkpoint.

        Args:
            pretrained_model_name_or_path: as `gptx.hf.locate.locate` takes it.
            **kwargs: ``cache_dir``, ``revision``, ``subfolder``.

        Raises:
            ParameterError: there is no such model, or another argument.
        """
        for name in ("trust_remote_code", "token", "local_files_only"):
            kwargs.pop(name, None)
        for name in kwargs:
            if name not in ("cache_dir", "revision", "subfolder"):
                raise ParameterError(name, kwargs[name], "an argument of from_pretrained")
        path = locate(pretrained_model_name_or_path, **kwargs)
        if (path / "config.json").is_file():
            return read_config(path)
        from gptx import convert, modelfile

        if path.is_file() and modelfile.is_model_file(path):
            file = modelfile.read(path, verify=False)
            return config_of(file.config, file.generation)
        checkpoint = convert._read(path, None, None, None)
        return config_of(checkpoint.config, checkpoint.generation)

    def __getattr__(self, name: str) -> Any:
        if name in _ALIASES:
            return self.__dict__[_ALIASES[name]]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[_ALIASES.get(name, name)] = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GPT2Config) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"

    def get_text_config(self, **_: object) -> GPT2Config:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "model_type": self.model_type}

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=str) + "\n"


class AutoConfig:
    """``AutoConfig.from_pretrained`` is that of `GPT2Config`."""

    from_pretrained = GPT2Config.from_pretrained


def read_config(folder: Path) -> GPT2Config:
    """That of config.json.

    Raises:
        ConvertError: it is no JSON object.
    """
    return GPT2Config(**read_object(folder / "config.json"))


def config_of(shape: GPTConfig, generation: Mapping[str, Any]) -> GPT2Config:
    """That of a model which has no config.json."""
    values = shape.to_dict()
    values["n_positions"] = values.pop("block_size")
    values["activation_function"] = values.pop("activation")
    ids = {name: generation.get(name) for name in ("bos_token_id", "eos_token_id")}
    return GPT2Config(**values, **ids)


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        ConvertError: it is something else.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConvertError(f"{path}: expected JSON, got an error: {error}") from None
    if not isinstance(values, dict):
        raise ConvertError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
