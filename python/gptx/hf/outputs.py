"""What calls return: dictionaries whose entries are attributes and may be counted, as in
transformers."""

from __future__ import annotations

from typing import Any

from gptx.errors import UnsupportedError


class ModelOutput(dict[str, Any]):
    """Entries by name, by attribute, or by index among those that are there.

    Attributes:
        fields: the names that are attributes; None where there is no such entry.
    """

    fields: tuple[str, ...] = ()

    def __init__(self, **entries: Any) -> None:
        super().__init__({k: entries[k] for k in self.fields if entries.get(k) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in self.fields:
            return self.get(name)
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class CausalLMOutput(ModelOutput):
    """``loss`` (a number), ``logits`` float32 ``[B, T, V]``, ``past_key_values``."""

    fields = ("loss", "logits", "past_key_values", "cache", "hidden_states", "attentions")


class GenerateDecoderOnlyOutput(ModelOutput):
    """``sequences`` ``[B, T]``; of each new token ``scores`` (processed) and ``logits`` (the
    model's), float32 ``[B, V]``."""

    fields = ("sequences", "scores", "logits", "attentions", "hidden_states", "past_key_values")


class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """``sequences`` ``[B, T]`` and ``sequences_scores`` ``[B]``."""

    fields = ("sequences", "sequences_scores")

    def __getattr__(self, name: str) -> Any:
        if name in ("scores", "logits", "beam_indices"):
            raise UnsupportedError(f"{name}: beam search reports sequences_scores alone")
        return super().__getattr__(name)
