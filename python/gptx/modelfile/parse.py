"""Reads the header of a model file strictly, and names what is wrong with it.

There is one spelling per header, so reading is: take the metadata apart, build the header that
they demand, and compare bytes. Everything after that is about naming the field at fault: the one
that was damaged rather than the one where reading came to a stop.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import zip_longest
from typing import NamedTuple, NoReturn

from gptx.config import HEAD_FIELDS, GPTConfig
from gptx.errors import ModelFileError, ParameterError, shown
from gptx.modelfile import header as spec
from gptx.modelfile.header import METADATA_KEYS, Header, dump
from gptx.modelfile.layout import DTYPES, StoredTensor, max_layers, stored_tensors

NOT_GPTX = "gptx reads .gptx files; gptx-convert makes one from a checkpoint"

_HEAD_KEYS = tuple(sorted(field.name for field in fields(GPTConfig)))
_CONFIG_KEYS = tuple(name for name in _HEAD_KEYS if name not in HEAD_FIELDS)
_MAX_KEYS = 64
_METADATA = "__metadata__"
_PREFIX = '{"__metadata__":'
_PARTS = ("dtype", "shape", "data_offsets")
_SEAL = rb'"header_checksum":"[0-9a-f]{16}"'
_TENSOR = (
    r',"([^"\\]{1,256})":\{"dtype":"([^"\\]{0,16})","shape":\[([0-9,]{0,256})\],'
    r'"data_offsets":\[([0-9,]{0,256})\]\}'
)
_DECODER = json.JSONDecoder(strict=False)

Fail = Callable[[str, int, object, object], NoReturn]


class _Pair(NamedTuple):
    key: str
    key_at: int
    value: object
    value_at: int
    end: int


def parse_header(head: bytes, size: int, path: object) -> Header:
    """Checks everything about a file but the bytes of its tensors and the seal of its header.

    Args:
        head: the first ``min(size, 8 + MAX_HEADER)`` bytes.
        size: of the whole file.
        path: for messages.

    Raises:
        ModelFileError: the header is not the one spelling of a GPT-2 that fits the size.
    """
    return _HeaderReader(head, size, path).read()


class _HeaderReader:
    def __init__(self, head: bytes, size: int, path: object) -> None:
        self.head = head
        self.size = size
        self.path = path
        self.text = head[8:].decode("latin-1")
        self.length = 0

    def read(self) -> Header:
        self.length = self._read_length()
        pairs, end = self._read_metadata()
        metadata = {pair.key: str(pair.value) for pair in pairs}
        at = {pair.key: pair.value_at for pair in pairs}
        values = self._read_config(metadata["config"], at["config"])
        names = self._check_values(metadata, values, at)
        config, dtype = self._check_meaning(metadata, values, at)
        tensors = stored_tensors(config, dtype)
        names += [tensor.name for tensor in tensors]
        checksums = self._read_checksums(metadata["checksums"], at["checksums"], sorted(names))
        # Not earlier: an odd spelling inside the checksums or the config has a more exact name.
        _check_spelling(self.text, pairs, self._fail, _METADATA)
        self._check_tensors(end, spec.encode(metadata, tensors), tensors)
        start = 8 + self.length
        self._check_size(start + tensors[-1].end)
        return Header(
            config=config,
            dtype=dtype,
            metadata=metadata,
            tensors=tensors,
            checksums=checksums,
            data_start=start,
            sealed=header_digest(self.head[:start]) == metadata["header_checksum"],
        )

    def _fail(
        self, field: str, at: int, expected: object, found: object, remedy: str = ""
    ) -> NoReturn:
        """Raises for a place in the text, or for the size of the file where the text is cut."""
        if self.size < 8 + self.length and field != "header_length":
            self._check_size(8 + self.length)
        if not re.fullmatch("[A-Za-z0-9_. ]{1,300}", field):
            field = shown(field)
        raise ModelFileError(self.path, field, 8 + at, expected, found, remedy)

    def _check_size(self, expected: int) -> None:
        if self.size != expected:
            offset = min(self.size, expected)
            remedy = "the file is cut" if self.size < expected else "bytes were added to the file"
            raise ModelFileError(
                self.path, "file size", offset, f"{expected} bytes", self.size, remedy
            )

    def _read_length(self) -> int:
        if self.size < 8 + len(_PREFIX):
            raise ModelFileError(
                self.path, "file size", self.size, "a header", self.size, "the file is cut"
            )
        (length,) = struct.unpack_from("<Q", self.head)
        if length > spec.MAX_HEADER or (8 + length) % spec.ALIGNMENT:
            allowed = f"8 less than a multiple of {spec.ALIGNMENT}, at most {spec.MAX_HEADER}"
            raise ModelFileError(self.path, "header_length", 0, allowed, length, NOT_GPTX)
        return length

    # Metadata

    def _read_metadata(self) -> tuple[list[_Pair], int]:
        if not self.text.startswith(_PREFIX):
            self._fail(_METADATA, 0, _PREFIX, self.text[: len(_PREFIX)], NOT_GPTX)
        pairs, end = _scan_object(
            self.text, len(_PREFIX), METADATA_KEYS, self._fail, _METADATA, strings=True
        )
        self._check_version({pair.key: pair for pair in reversed(pairs)})
        if self.text[end : end + 1] not in ",}":
            self._fail(f"{_METADATA}.{pairs[-1].key}", end, "','", self.text[end : end + 80])
        _check_keys(pairs, METADATA_KEYS, self._fail, _METADATA)
        for pair in pairs:
            large = pair.key in ("tokenizer", "checksums")
            if not large and len(str(pair.value)) > spec.MAX_SMALL_VALUE:
                allowed = f"at most {spec.MAX_SMALL_VALUE} characters"
                self._fail(f"{_METADATA}.{pair.key}", pair.value_at, allowed, pair.value)
        return pairs, end

    def _check_version(self, pairs: dict[str, _Pair]) -> None:
        """First of all, since a future version may have other keys."""
        for key, expected in (("format", spec.FORMAT), ("version", spec.VERSION)):
            pair = pairs.get(key)
            if pair is None or pair.value == expected:
                continue
            remedy = NOT_GPTX
            if key == "version":
                remedy = "a newer gptx may read this file"
            self._fail(f"{_METADATA}.{key}", pair.value_at, repr(expected), pair.value, remedy)

    def _read_checksums(self, text: str, at: int, names: list[str]) -> dict[str, str]:
        checksums: dict[str, str] = {}
        index = 0
        for name in names:
            begin = f'{"," if checksums else "{"}"{name}":"'
            value = text[index + len(begin) : index + len(begin) + 17]
            if not text.startswith(begin, index) or not re.fullmatch('[0-9a-f]{16}"', value):
                break
            checksums[name] = value[:16]
            index += len(begin) + 17
        if len(checksums) < len(names) or text[index:] != "}":
            found = re.findall(r'"([^"]*)":', text)
            wrong = _first_difference(found, names)
            name = names[min(len(checksums), len(names) - 1)]
            name = name if wrong is None else _at_fault(found, names, wrong)
            place = at + len(dump(text[:index])) - 1
            expected = "16 hex digits for each value and tensor"
            self._fail(f"{_METADATA}.checksums.{name}", place, expected, text[index : index + 80])
        return checksums

    def _read_config(self, text: str, at: int) -> dict[str, object]:
        def fail(field: str, index: int, expected: object, found: object) -> NoReturn:
            # The text stands escaped in the file.
            self._fail(field, at + len(dump(text[:index])) - 1, expected, found)

        prefix = f"{_METADATA}.config"
        if not text.startswith("{"):
            fail(prefix, 0, "an object", text)
        # One of the two is enough, so that damage to the other is named.
        head = any(f'"{name}":' in text for name in HEAD_FIELDS)
        keys = _HEAD_KEYS if head else _CONFIG_KEYS
        pairs, end = _scan_object(text, 0, keys, fail, prefix)
        _check_keys(pairs, keys, fail, prefix)
        _check_spelling(text, pairs, fail, prefix)
        if end != len(text):
            fail(prefix, end, "nothing after the object", text[end:])
        return {pair.key: pair.value for pair in pairs}

    def _check_values(
        self, metadata: dict[str, str], config: dict[str, object], at: dict[str, int]
    ) -> list[str]:
        """Checksum of each value; where one differs, the header's tells which side is damaged.

        Returns the names of the values. A missing entry is left to `_read_checksums`.
        """
        digests = spec.value_digests(metadata, config)
        for name, value in digests.items():
            entry = re.search(rf'"{re.escape(name)}":"(.{{16}})"', metadata["checksums"])
            if entry is None or entry[1] == value:
                continue
            if entry_is_damaged(self.head[: 8 + self.length], name, value, metadata):
                field = f"{_METADATA}.checksums.{name}"
                self._fail(field, at["checksums"], value, entry[1])
            self._fail(name, at[name.split(".")[1]], f"a value with checksum {entry[1]!r}", value)
        return list(digests)

    def _check_meaning(
        self, metadata: dict[str, str], values: dict[str, object], at: dict[str, int]
    ) -> tuple[GPTConfig, str]:
        try:
            config = GPTConfig.from_dict(values)
        except ParameterError as error:
            field = f"{_METADATA}.config.{error.param}"
            self._fail(field, at["config"], error.allowed, error.value)
        dtype = metadata["dtype"]
        if dtype not in DTYPES:
            self._fail(f"{_METADATA}.dtype", at["dtype"], "one of " + ", ".join(DTYPES), dtype)
        if config.n_layer > max_layers(dtype):
            field = f"{_METADATA}.config.n_layer"
            self._fail(field, at["config"], f"at most {max_layers(dtype)}", config.n_layer)
        for key, parse in (("generation", spec.parse_generation), ("parity", spec.parse_parity)):
            try:
                parse(metadata[key])
            except ValueError as error:
                self._fail(f"{_METADATA}.{key}", at[key], error, metadata[key])
        return config, dtype

    # Tensors

    def _check_tensors(self, at: int, header: bytes, tensors: tuple[StoredTensor, ...]) -> None:
        """Compares the rest of the text with the header that the metadata demand."""
        expected = header[8:].decode("ascii")
        if not self.text.startswith(expected):
            self._fail_tensor(at, tensors)
        if self.length != len(expected):
            self._fail("header_length", -8, len(expected), self.length)

    def _fail_tensor(self, at: int, tensors: tuple[StoredTensor, ...]) -> NoReturn:
        pattern = re.compile(_TENSOR)
        found_names = [match[1] for match in pattern.finditer(self.text, at, self.length)]
        for index, tensor in enumerate(tensors):
            entry = "," + spec.tensor_entry(tensor)
            if self.text.startswith(entry, at):
                at += len(entry)
                continue
            match = pattern.match(self.text, at)
            if match is None:
                self._fail_entry(at, entry, tensor)
            names = [t.name for t in tensors]
            if match[1] != tensor.name:
                name = _at_fault(found_names, names, index)
                self._fail(name, at, tensor.name, match[1])
            found = (match[2], f"[{match[3]}]", f"[{match[4]}]")
            for part, wanted, got in zip(_PARTS, _parts(tensor), found, strict=True):
                if wanted != got:
                    self._fail(f"{tensor.name}.{part}", at, wanted, got)
        if self.text[at : at + 1] != "}":
            match = pattern.match(self.text, at)
            field = match[1] if match else "header"
            self._fail(field, at, "no more tensors", self.text[at : at + 80])
        while self.text[at + 1 : at + 2] == " ":
            at += 1
        self._fail("header padding", at + 1, "spaces", self.text[at + 1 : at + 2])

    def _fail_entry(self, at: int, entry: str, tensor: StoredTensor) -> NoReturn:
        """An entry that cannot be read: names the part in which the first wrong byte lies."""
        found = self.text[at : at + len(entry)]
        index = next((i for i, c in enumerate(found) if c != entry[i]), len(found))
        begins = [entry.index(f'"{part}"') - 1 for part in _PARTS]
        field = tensor.name
        part = sum(begin <= index for begin in begins) - 1
        if part > 0 and index == begins[part] and found[index : index + 1] not in ",}":
            part -= 1  # the value before goes on
        if part >= 0:
            name = _PARTS[part]
            more = index == len(entry) - 1 and found.endswith(",")
            if more or index < begins[part] + len(name) + 4:
                text = self.text[at : at + 512].partition("}")[0]
                keys = re.findall(r'[,{]"([A-Za-z0-9_]{1,32})":', text)
                wrong = _first_difference(keys, _PARTS)
                name = name if wrong is None else _at_fault(keys, _PARTS, wrong)
            field += f".{name}"
        self._fail(field, at + index, entry[index : index + 80], found[index : index + 80])


def _parts(tensor: StoredTensor) -> tuple[str, str, str]:
    shape = ",".join(map(str, tensor.shape))
    return tensor.dtype, f"[{shape}]", f"[{tensor.begin},{tensor.end}]"


def header_digest(head: bytes) -> str:
    """The checksum of a header: over length, JSON and padding, with itself as zeros."""
    unsealed = f'"header_checksum":"{spec.UNSEALED}"'.encode()
    return spec.digest(re.sub(_SEAL, unsealed, head, count=1))


def entry_is_damaged(head: bytes, name: str, value: str, metadata: dict[str, str]) -> bool:
    """Whether the header's checksum matches once the entry of one value is set right."""
    entry = rb'\\"' + re.escape(name).encode() + rb'\\":\\".{16}\\"'
    repaired = re.sub(entry, f'\\\\"{name}\\\\":\\\\"{value}\\\\"'.encode(), head, count=1)
    return header_digest(repaired) == metadata["header_checksum"]


def _scan_object(
    text: str, at: int, keys: Sequence[str], fail: Fail, prefix: str, *, strings: bool = False
) -> tuple[list[_Pair], int]:
    """Takes one object apart; which keys there are and how they are spelled is not its business.

    Returns the pairs in their order and the index after the closing brace.
    """
    pairs: list[_Pair] = []
    closing = ","
    while closing == ",":
        field = f"{prefix}.{keys[len(pairs)]}" if len(pairs) < len(keys) else prefix
        if len(pairs) == _MAX_KEYS or (not pairs and text[at : at + 1] != "{"):
            fail(prefix, at, f"an object of at most {_MAX_KEYS} keys", text[at : at + 80])
        key_at = at + 1
        if pairs and text[key_at : key_at + 1] == "\\":
            # An escaped quote can only be the rest of the value before, which ended too early.
            field = f"{prefix}.{pairs[-1].key}"
        key, at = _scan_value(text, key_at, fail, field, strings=True)
        if str(key) in keys:
            field = f"{prefix}.{key}"
        if text[at : at + 1] != ":":
            fail(field, at, "':'", text[at : at + 80])
        value_at = at + 1
        value, at = _scan_value(text, value_at, fail, field, strings=strings)
        pairs.append(_Pair(str(key), key_at, value, value_at, at))
        closing = text[at : at + 1]
        if closing not in (",", "}"):
            fail(field, at, "',' or '}'", text[at : at + 80])
    return pairs, at + 1


def _scan_value(text: str, at: int, fail: Fail, field: str, *, strings: bool) -> tuple[object, int]:
    if strings and text[at : at + 1] != '"':
        fail(field, at, "a string", text[at : at + 80])
    try:
        value, end = _DECODER.raw_decode(text, at)
        if strings:
            value.encode()
    except (ValueError, RecursionError):
        fail(field, at, "JSON", text[at : at + 80])
    return value, end


def _check_keys(pairs: list[_Pair], keys: Sequence[str], fail: Fail, prefix: str) -> None:
    found = [pair.key for pair in pairs]
    index = _first_difference(found, keys)
    if index is None:
        return
    at = pairs[min(index, len(pairs) - 1)].key_at
    name = _at_fault(found, keys, index)
    fail(f"{prefix}.{name}", at, _item(keys, index), _item(found, index))


def _check_spelling(text: str, pairs: list[_Pair], fail: Fail, prefix: str) -> None:
    for pair in pairs:
        try:
            expected = f"{dump(pair.key)}:{dump(pair.value)}"
        except (ValueError, RecursionError):
            expected = "a finite value"
        found = text[pair.key_at : pair.end]
        if found != expected:
            fail(f"{prefix}.{pair.key}", pair.key_at, expected[:80], found[:80])


def _first_difference(found: Sequence[str], expected: Sequence[str]) -> int | None:
    pairs = enumerate(zip_longest(found, expected))
    return next((index for index, (a, b) in pairs if a != b), None)


def _item(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else "nothing"


def _at_fault(found: Sequence[str], expected: Sequence[str], index: int) -> str:
    """Which name is wrong where two lists first differ: a doubled, an added or a missing one."""
    if index >= len(expected):
        return found[index]
    too_many = len(found) > len(expected)
    if too_many and (found[index] in expected[:index] or found[index] not in expected):
        return found[index]
    return expected[index]
