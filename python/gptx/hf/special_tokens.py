"""Tokens with a role: ``eos_token``, ``pad_token`` and so on, and their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptx.errors import ParameterError

ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def text_of(token: object) -> str | None:
    """The text of a token that is given as a str, or as an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    token = getattr(token, "content", token)
    if token is not None and not isinstance(token, str):
        raise ParameterError("token", token, "a str or None")
    return token


class SpecialTokens:
    """Roles as attributes: ``tokenizer.pad_token = tokenizer.eos_token`` sets one, and
    ``pad_token_id`` with it. A role that no token has is None."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    unk_token: str | None
    unk_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None

    def __init__(self) -> None:
        object.__setattr__(self, "_roles", dict.fromkeys(ROLES))

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        raise NotImplementedError

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in ROLES:
            return self._roles[name]
        if name.removesuffix("_id") in ROLES:
            token = self._roles[name.removesuffix("_id")]
            return None if token is None else self.convert_tokens_to_ids(token)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ROLES:
            self._roles[name] = text_of(value)
        elif name.removesuffix("_id") in ROLES:
            token = None if value is None else self.convert_ids_to_tokens(int(value))
            self._roles[name.removesuffix("_id")] = token
        else:
            object.__setattr__(self, name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {role: token for role, token in self._roles.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Each once, in the order of the roles."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        return [self.convert_tokens_to_ids(token) for token in self.all_special_tokens]
