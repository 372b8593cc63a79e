"""The tokenizer of a model with the methods of transformers' ``GPT2Tokenizer``."""

from __future__ import annotations

import dataclasses
import operator
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from gptx.checkpoints.vocabulary import alphabet, read_json
from gptx.errors import ParameterError, TokenizeError, UnsupportedError
from gptx.hf.arrays import is_torch
from gptx.hf.encoding import BatchEncoding
from gptx.hf.locate import locate
from gptx.hf.special_tokens import ROLES, SpecialTokens, text_of
from gptx.tokenizer import END_OF_TEXT, Tokenizer, TokenizerSpec

NO_MAX_LENGTH = int(1e30)
"""``model_max_length`` where nothing limits it."""

_CHARACTERS = {byte: character for character, byte in alphabet().items()}
_SIDES = ("right", "left")
_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "add_bos_token")
_WITHOUT_EFFECT = (
    "use_fast",
    "trust_remote_code",
    "token",
    "local_files_only",
    "legacy",
    "clean_up_tokenization_spaces",
    "_from_auto",
)
# Of `__call__`, with the values that ask for nothing.
_UNSUPPORTED_CALLS: dict[str, tuple[Any, ...]] = {
    "text_pair": (None,),
    "text_target": (None,),
    "text_pair_target": (None,),
    "stride": (0,),
    "is_split_into_words": (False,),
    "return_token_type_ids": (None, False),
    "return_overflowing_tokens": (False,),
    "return_special_tokens_mask": (False,),
    "return_offsets_mapping": (False,),
}


class GPT2Tokenizer(SpecialTokens):
    """Made by `from_pretrained`. Encodes and decodes as `gptx.Tokenizer`, but for what transformers
    does otherwise: text that spells a special token becomes that token.

    Attributes:
        padding_side, truncation_side: "right" or "left".
        model_max_length: to which ``truncation=True`` cuts.
        name_or_path: as given to `from_pretrained`.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]
    is_fast = True
    clean_up_tokenization_spaces = False

    def __init__(
        self,
        spec: TokenizerSpec,
        *,
        vocab_size: int | None = None,
        name_or_path: str = "",
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int = NO_MAX_LENGTH,
        add_bos_token: bool = False,
        **tokens: Any,
    ) -> None:
        """
        Args:
            spec: the vocabulary.
            vocab_size: tokens that were not added to it; default all.
            **tokens: ``eos_token`` and other roles; bos, eos and unk are ``<|endoftext|>`` where
                the vocabulary has it and nothing else is said.
        """
        super().__init__()
        for name, side in (("padding_side", padding_side), ("truncation_side", truncation_side)):
            if side not in _SIDES:
                raise ParameterError(name, side, "'right' or 'left'")
        self._spec = spec
        self.vocab_size = spec.n_vocab if vocab_size is None else vocab_size
        self.name_or_path = name_or_path
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = model_max_length
        self.add_bos_token = add_bos_token
        end = END_OF_TEXT if END_OF_TEXT in spec.special_tokens | spec.added_tokens else None
        defaults = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
        for role, token in (defaults | tokens).items():
            self._give_role(role, token)
        self._first_roles = set(self.all_special_ids)  # those of later ones are ordinary tokens

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        subfolder: str = "",
        add_prefix_space: bool | None = None,
        **kwargs: Any,
    ) -> GPT2Tokenizer:
        """The tokenizer of a Hugging Face folder, a ``.gptx`` file, or a checkpoint.

        Args:
            pretrained_model_name_or_path: as `gptx.hf.locate.locate` takes it.
            add_prefix_space: put a space in front of texts; default as the folder says.
            **kwargs: ``padding_side``, ``truncation_side``, ``model_max_length``,
                ``add_bos_token``, ``pad_token`` and other roles, instead of what
                tokenizer_config.json says.

        Raises:
            ParameterError: there is no such model, or another argument.
            TokenizeError: it has no tokenizer, or one that gptx does not run.
        """
        for name in _WITHOUT_EFFECT:
            kwargs.pop(name, None)
        for name in kwargs:
            if name not in (*_SETTINGS, *ROLES):
                allowed = ", ".join((*_SETTINGS, *ROLES))
                raise ParameterError(name, kwargs[name], f"one of the arguments {allowed}")
        path = locate(
            pretrained_model_name_or_path,
            cache_dir=cache_dir,
            revision=revision,
            subfolder=subfolder,
        )
        spec, settings = _read(path)
        if add_prefix_space is not None:
            spec = dataclasses.replace(spec, add_prefix_space=bool(add_prefix_space))
        settings["name_or_path"] = os.fspath(pretrained_model_name_or_path)
        return cls(spec, **(settings | kwargs))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name_or_path={self.name_or_path!r}, "
            f"vocab_size={self.vocab_size}, padding_side={self.padding_side!r}, "
            f"special_tokens={self.special_tokens_map})"
        )

    def __len__(self) -> int:
        """Tokens, the added ones included."""
        return len(self.get_vocab())

    def __bool__(self) -> bool:
        return True

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        text_pair: Any = None,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_length: bool = False,
        split_special_tokens: bool = False,
        verbose: bool = True,
        **others: Any,
    ) -> BatchEncoding:
        """Encodes a text, or each of a list of texts.

        Args:
            add_special_tokens: put ``bos_token`` in front, where ``add_bos_token`` is set.
            padding: True or "longest", "max_length", or False.
            truncation: True (or "longest_first", "only_first") cuts to ``max_length``; so does
                ``max_length`` alone where ``padding`` is False.
            max_length: default ``model_max_length``.
            return_tensors: "np"; "pt", which gives numpy arrays where the script has not imported
                torch; or None for lists.
            split_special_tokens: encode the text of a special token as ordinary text.

        Returns:
            ``input_ids`` and ``attention_mask``, of a list or as arrays ``[B, T]``.

        Raises:
            ParameterError: a value that is not possible, or padding without a ``pad_token``.
        """
        others["text_pair"] = text_pair
        _refuse(others, _UNSUPPORTED_CALLS)
        single = isinstance(text, str)
        texts = [text] if single else text
        if not isinstance(texts, Sequence) or not all(isinstance(t, str) for t in texts):
            raise ParameterError("text", text, "a str or a list of str")
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        limit = self._limit(truncation, max_length)
        prefix = [self.bos_token_id] if add_special_tokens and self.add_bos_token else []
        rows = []
        for one in texts:
            ids = prefix + self._tokenizer.encode(one, allow_special=not split_special_tokens)
            more = max(0, len(ids) - limit)
            rows.append(ids[: len(ids) - more] if self.truncation_side == "right" else ids[more:])
        out = self.pad(
            {"input_ids": rows},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
        )
        if return_length:
            out["length"] = [len(row) for row in out["input_ids"]]
        if single and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in out.items()})
        return out.convert_to_tensors(return_tensors)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Gives lists of ids one length; arguments as for `__call__`."""
        if not isinstance(encoded_inputs, Mapping):
            names = encoded_inputs[0].keys()
            encoded_inputs = {name: [part[name] for part in encoded_inputs] for name in names}
        first = encoded_inputs["input_ids"]
        single = len(first) > 0 and isinstance(first[0], int)
        if single:
            encoded_inputs = {name: [value] for name, value in encoded_inputs.items()}
        rows = [_ids(row) for row in encoded_inputs["input_ids"]]
        masks = encoded_inputs.get("attention_mask")
        masks = [[1] * len(r) for r in rows] if masks is None else [_ids(m) for m in masks]
        length = self._padded_length(rows, padding, max_length, pad_to_multiple_of)
        side = self.padding_side if padding_side is None else padding_side
        if side not in _SIDES:
            raise ParameterError("padding_side", side, "'right' or 'left'")
        if length is not None:
            pad = self.pad_token_id
            rows = [_filled(row, length, pad, side) for row in rows]
            masks = [_filled(mask, length, 0, side) for mask in masks]
        out = BatchEncoding({**encoded_inputs, "input_ids": rows})
        out.pop("attention_mask", None)
        if return_attention_mask is not False:
            out["attention_mask"] = masks
        if single and return_tensors is None:
            return BatchEncoding({name: value[0] for name, value in out.items()})
        return out.convert_to_tensors(return_tensors)

    def encode(self, text: str, text_pair: Any = None, **kwargs: Any) -> Any:
        """The ids of a text: a list, or an array ``[1, T]``. Arguments as for `__call__`."""
        return self(text, text_pair, **kwargs)["input_ids"]

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """The tokens of a text, spelled as in `convert_ids_to_tokens`."""
        return self.convert_ids_to_tokens(self.encode(text, add_special_tokens=add_special_tokens))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """The text of ids, or a list of texts of rows of ids.

        Args:
            token_ids: an id, a list, an array, or rows of those. Ids that no token has are passed
                over, as transformers does.
            skip_special_tokens: leave out special tokens, such as ``<|endoftext|>``.
            clean_up_tokenization_spaces: passed over for byte-level BPE, as in transformers.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, Mapping):
            ids = ids["input_ids"]
        if isinstance(ids, int):
            ids = [ids]
        if len(ids) and (isinstance(ids[0], list | tuple) or getattr(ids[0], "ndim", 0)):
            return [self.decode(row, skip_special_tokens) for row in ids]
        special: set[int] = set()
        if skip_special_tokens:
            special = {*self._first_roles, *self._spec.special_tokens.values()}
        whole = [operator.index(i) for i in ids]
        n = self._tokenizer.n_vocab
        return self._tokenizer.decode([i for i in whole if i < n and i not in special])

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """The texts of rows of ids; arguments as for `decode`."""
        texts = self.decode(sequences, skip_special_tokens, **kwargs) if len(sequences) else []
        return [texts] if isinstance(texts, str) else texts

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """The token of an id, or of each of a list: bytes as printable characters, "Ġ" a space."""
        if isinstance(ids, int):
            return self._spelling.get(ids)
        skipped: set[int] = set()
        if skip_special_tokens:
            skipped = {*self.all_special_ids, *self._spec.special_tokens.values()}
        return [self._spelling.get(int(i)) for i in ids if int(i) not in skipped]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, or of each of a list; that of ``unk_token`` where there is none."""
        if isinstance(tokens, str):
            vocabulary = self.get_vocab()
            unknown = vocabulary.get(self.unk_token) if self.unk_token else None
            return vocabulary.get(tokens, unknown)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self._tokenizer.decode([self.get_vocab()[token] for token in tokens])

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, the added ones included."""
        return self._vocabulary

    def get_added_vocab(self) -> dict[str, int]:
        return self._spec.special_tokens | self._spec.added_tokens

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return int(self.add_bos_token)

    def add_special_tokens(self, special_tokens_dict: Mapping[str, Any]) -> int:
        """Gives roles to tokens; those that are new get the next ids, which no model knows: they
        may stand in padding.

        Returns:
            How many are new.
        """
        before = self._spec.n_vocab
        for role, token in special_tokens_dict.items():
            if role not in ROLES:
                raise ParameterError("special_tokens_dict", role, "one of " + ", ".join(ROLES))
            self._give_role(role, token)
        return self._spec.n_vocab - before

    def apply_chat_template(self, *_: Any, **__: Any) -> Any:
        raise UnsupportedError("apply_chat_template: gptx runs no chat templates; give texts")

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._spec)

    @cached_property
    def _spelling(self) -> dict[int, str]:
        named = {i: text for text, i in self.get_added_vocab().items()}
        plain = {i: t for i, t in enumerate(self._spec.tokens) if t is not None}
        if self._spec.kind == "chars":
            return {i: t.decode() for i, t in plain.items()} | named
        return {i: "".join(map(_CHARACTERS.__getitem__, t)) for i, t in plain.items()} | named

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        return {token: i for i, token in self._spelling.items()}

    def _give_role(self, role: str, token: Any) -> None:
        if role not in ROLES:
            raise ParameterError(role, token, "one of the roles " + ", ".join(ROLES))
        text = text_of(token)
        if text is not None and text not in self.get_vocab():
            new = self._spec.special_tokens | {text: self._spec.n_vocab}
            self._spec = dataclasses.replace(self._spec, special_tokens=new)
            for name in ("_tokenizer", "_spelling", "_vocabulary"):
                self.__dict__.pop(name, None)
        setattr(self, role, text)

    def _limit(self, truncation: bool | str | None, max_length: int | None) -> int:
        """The most tokens of a text."""
        if truncation in (None, False, "do_not_truncate"):
            return NO_MAX_LENGTH
        if truncation not in (True, "longest_first", "only_first"):
            allowed = "True, False, 'longest_first', 'only_first' or 'do_not_truncate'"
            raise ParameterError("truncation", truncation, allowed)
        limit = self.model_max_length if max_length is None else max_length
        if limit < 0:
            raise ParameterError("max_length", limit, "at least 0")
        return limit

    def _padded_length(
        self,
        rows: Sequence[Sequence[int]],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
    ) -> int | None:
        """None: no padding."""
        padding = getattr(padding, "value", padding)
        if padding not in (True, False, "longest", "max_length", "do_not_pad"):
            allowed = "True, False, 'longest', 'max_length' or 'do_not_pad'"
            raise ParameterError("padding", padding, allowed)
        limit = self.model_max_length if max_length is None else max_length
        if padding in (False, "do_not_pad") or (padding == "max_length" and limit >= NO_MAX_LENGTH):
            return None
        if self.pad_token is None:
            allowed = "False without a pad_token: tokenizer.pad_token = tokenizer.eos_token"
            raise ParameterError("padding", padding, allowed)
        length = limit if padding == "max_length" else max(map(len, rows), default=0)
        return -(-length // multiple) * multiple if multiple else length


GPT2TokenizerFast = GPT2Tokenizer


class AutoTokenizer:
    """``AutoTokenizer.from_pretrained`` is that of `GPT2Tokenizer`."""

    from_pretrained = GPT2Tokenizer.from_pretrained


def _read(path: Path) -> tuple[TokenizerSpec, dict[str, Any]]:
    """The vocabulary of a folder or file, and what is said beside it."""
    if path.is_dir():
        from gptx.checkpoints.tokenizer_files import from_folder

        spec = from_folder(path)
        if spec is not None:
            return spec, _settings(path)
    if path.is_file():
        from gptx import modelfile

        if modelfile.is_model_file(path):
            file = modelfile.read(path, verify=False)
            if file.tokenizer is not None:
                return file.tokenizer, {"model_max_length": file.config.block_size}
    from gptx import convert

    checkpoint = convert._read(path, None, None, None)
    if checkpoint.tokenizer is None:
        raise TokenizeError(f"{path}: this model has no tokenizer; give it token ids")
    return checkpoint.tokenizer, {"model_max_length": checkpoint.config.block_size}


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, special_tokens_map.json, and the size of the vocabulary."""
    config = read_json(folder / "tokenizer_config.json", optional=True)
    roles = read_json(folder / "special_tokens_map.json", optional=True)
    values = {k: v for k, v in (roles | config).items() if k in ROLES and v is not None}
    values |= {name: config[name] for name in _SETTINGS if config.get(name) is not None}
    whole = read_json(folder / "tokenizer.json", optional=True)
    if whole:  # it says itself what stands in front of a text
        values["add_bos_token"] = _begins_with_bos(whole.get("post_processor"))
    base = whole.get("model", {}).get("vocab") or read_json(folder / "vocab.json", optional=True)
    if base:
        values["vocab_size"] = len(base)
    return values


def _begins_with_bos(processor: dict[str, Any] | None) -> bool:
    """Whether a post_processor of tokenizer.json puts one token in front of a text.

    Raises:
        UnsupportedError: it does something else with texts.
    """
    if processor is None or processor.get("type") == "ByteLevel":
        return False
    if processor.get("type") == "Sequence":
        return any(_begins_with_bos(part) for part in processor.get("processors", ()))
    parts = [next(iter(part)) for part in processor.get("single", ())]
    known = (["Sequence"], ["SpecialToken", "Sequence"])
    if processor.get("type") == "TemplateProcessing" and parts in known:
        return len(parts) == 2
    raise UnsupportedError("tokenizer.json: post_processor: only one token in front of a text")


def _refuse(values: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    for name, value in values.items():
        if name not in known:
            raise ParameterError(name, value, "an argument of the tokenizer")
        if value not in known[name]:
            raise ParameterError(name, value, f"{known[name][0]}; gptx does nothing else")


def _ids(row: Any) -> list[int]:
    return row.tolist() if is_torch(row) or hasattr(row, "tolist") else list(row)


def _filled(row: list[int], length: int, value: Any, side: str) -> list[int]:
    padding = [value] * (length - len(row))
    return row + padding if side == "right" else padding + row
