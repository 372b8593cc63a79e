"""More than 9,000 headers with one field changed: each is refused, and the field is named."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from modelfile_samples import TINY, rebuild, weights

from gptx import modelfile
from gptx.errors import ModelFileError
from gptx.modelfile.header import UNSEALED, digest
from gptx.modelfile.parse import header_digest

Pairs = list[tuple[str, str]]
"""Keys and values as they stand in a JSON text, quotes included."""


@dataclass
class Parts:
    """A header taken apart into texts, so that each can be changed alone."""

    metadata: Pairs
    config: Pairs
    checksums: Pairs
    tensors: list[tuple[str, Pairs]]

    def encode(self) -> bytes:
        texts = {_CONFIG: _object(self.config), _CHECKSUMS: _object(self.checksums)}
        metadata = [
            (key, json.dumps(texts[value]) if value in texts else value)
            for key, value in self.metadata
        ]
        entries = [("__metadata__", _object(metadata))]
        entries += [(name, _object(parts)) for name, parts in self.tensors]
        text = _object([(_quoted(name), value) for name, value in entries])
        return with_length(text.encode("utf-8"))


_CONFIG, _CHECKSUMS = "the text of config", "the text of checksums"


def _object(pairs: Pairs) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def _quoted(name: str) -> str:
    return name if name.startswith('"') else f'"{name}"'


def with_length(text: bytes) -> bytes:
    length = -(-(8 + len(text)) // 64) * 64 - 8
    return struct.pack("<Q", length) + text.ljust(length)


def take_apart(data: bytes) -> tuple[Parts, bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    metadata = entries.pop("__metadata__")

    def pairs(values: dict) -> Pairs:
        return [(json.dumps(k), json.dumps(v, separators=(",", ":"))) for k, v in values.items()]

    parts = Parts(
        metadata=[
            (key, {'"config"': _CONFIG, '"checksums"': _CHECKSUMS}.get(key, value))
            for key, value in pairs(metadata)
        ],
        config=pairs(json.loads(metadata["config"])),
        checksums=pairs(json.loads(metadata["checksums"])),
        tensors=[(name, pairs(entry)) for name, entry in entries.items()],
    )
    assert parts.encode() == data[:start]
    return parts, data[start:]


STRANGE = ["null", "true", "[]", "{}", '"x"', "NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000]


def numbers_like(text: str) -> list[str]:
    """Other values and other spellings of a number."""
    value = int(text)
    limits = [0, 1, -1, value + 1, value - 1, -value]
    limits += [2**31 - 1, 2**31, 2**32 + value, 2**63, 2**64 - 1, 2**64 + value]
    spellings = [f"{text}.0", f"{text}e0", f"0{text}", f"+{text}", f" {text}", f'"{text}"', "-0"]
    return [str(number) for number in limits] + spellings


def strings_like(text: str) -> list[str]:
    """Other values and other spellings of a string."""
    inner = text[1:-1]
    changed = ["", inner + " ", inner[:-1], inner.swapcase(), inner + "\\u0000", inner + "\\ud800"]
    changed += [inner * 2, "0" * 16, "x" * 70_000, "é"]
    spelled = [f'"\\u{ord(inner[0]):04x}{inner[1:]}"', f' "{inner}"'] if inner else ['" "']
    return [f'"{value}"' for value in changed] + spelled + ["0", "12"]


def values_like(text: str) -> list[str]:
    if text.startswith('"'):
        found = strings_like(text)
    elif text.startswith("["):
        items = text[1:-1].split(",")
        found = ["[]", f"[{text}]", text.replace(",", ", "), f"[{text[1:-1]},1]", text + "]"]
        found.append("[" + ",".join(items[:-1]) + "]")
        for i, item in enumerate(items):
            for other in numbers_like(item) + STRANGE:
                found.append("[" + ",".join([*items[:i], other, *items[i + 1 :]]) + "]")
    elif text.lstrip("-").isdigit():
        found = numbers_like(text)
    else:
        found = ["true", "false", "0", "1", "1.0", "0.5", "1e-05", "1E-5", "0.00001", "-1e-05"]
    return [value for value in [*found, *STRANGE] if value != text]


def list_changes(pairs: list) -> Iterator[tuple[list, set[int], str]]:
    """Lists with one entry deleted, doubled, renamed, added or moved: which, or the new name."""
    for i, (key, value) in enumerate(pairs):
        name = key.strip('"')
        rest = pairs[i + 1 :]
        yield pairs[:i] + rest, {i}, ""
        yield pairs[: i + 1] + pairs[i:], {i}, ""
        yield (
            [*pairs[:i], (key, value), ("zz_new".join(key.split(name)), value), *rest],
            set(),
            "zz_new",
        )
        yield [*pairs[:i], (_quoted(name + "x"), value), *rest], {i}, ""
        if rest:
            yield [*pairs[:i], rest[0], (key, value), *rest[1:]], {i, i + 1}, ""


def mutants(parts: Parts) -> Iterator[tuple[Parts, set[str]]]:
    """Each with the names of the fields that may be blamed."""
    for group, prefix in (
        ("metadata", "__metadata__."),
        ("config", "__metadata__.config."),
        ("checksums", "__metadata__.checksums."),
        ("tensors", ""),
    ):
        pairs = getattr(parts, group)
        for changed, indices, new in list_changes(pairs):
            names = {prefix + pairs[i][0].strip('"') for i in indices} | (
                {prefix + new} if new else set()
            )
            yield _replace(parts, group, changed), names
        if group == "tensors":
            continue
        for i, (key, value) in enumerate(pairs):
            name = {prefix + key.strip('"')}
            for other in STRANGE if value in (_CONFIG, _CHECKSUMS) else values_like(value):
                if group != "config" or len(other) < 60_000:
                    yield _replace(parts, group, [*pairs[:i], (key, other), *pairs[i + 1 :]]), name
    for i, (tensor, inner) in enumerate(parts.tensors):

        def with_inner(changed: Pairs, i: int = i, tensor: str = tensor) -> Parts:
            tensors = [*parts.tensors[:i], (tensor, changed), *parts.tensors[i + 1 :]]
            return _replace(parts, "tensors", tensors)

        for changed, indices, new in list_changes(inner):
            names = {f"{tensor}." + inner[j][0].strip('"') for j in indices}
            yield with_inner(changed), names | ({f"{tensor}.{new}"} if new else set())
        for j, (key, value) in enumerate(inner):
            for other in values_like(value):
                changed = [*inner[:j], (key, other), *inner[j + 1 :]]
                yield with_inner(changed), {f"{tensor}." + key.strip('"')}


def _replace(parts: Parts, group: str, value: list) -> Parts:
    changed = copy.copy(parts)
    setattr(changed, group, value)
    return changed


@pytest.fixture(scope="module", params=["float32", "int8"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("mutants") / "m.gptx"
    modelfile.write(
        path, TINY, weights(TINY), dtype=request.param, source="test", generation={"top_k": 4}
    )
    modelfile.update(path, parity={"kl": 0.5})
    return path.read_bytes()


def test_every_mutated_header_is_refused_and_names_the_field(data: bytes) -> None:
    parts, tensors = take_apart(data)
    count = 0
    for changed, names in mutants(parts):
        damaged = changed.encode() + tensors
        with pytest.raises(ModelFileError) as caught:
            modelfile.read_buffer(damaged)
        assert _named(caught.value.field, names), (names, str(caught.value))
        count += 1
    assert count >= 4_000


def _named(field: str, names: set[str]) -> bool:
    """Whether one of the names is the field, or the object that the field is part of."""
    return any(field == name or field.startswith(name + ".") for name in names)


def _error(data: bytes) -> ModelFileError | None:
    try:
        assert modelfile.read_buffer(data).tokenizer is None
    except ModelFileError as error:
        return error
    return None


def _seal(parts: Parts) -> bytes:
    """The header with every checksum in it made to fit, as far as it can be read."""
    entries = dict(parts.checksums)

    def set_entry(name: str, text: str) -> None:
        if _quoted(name) in entries:
            entries[_quoted(name)] = _quoted(digest(text.encode()))

    for key, value in parts.config:
        set_entry(f"__metadata__.config.{key[1:-1]}", value)
    for key, value in parts.metadata:
        try:
            set_entry(f"__metadata__.{key[1:-1]}", json.loads(value))
        except (ValueError, AttributeError, RecursionError):
            continue
    found = [(key, entries[key]) for key, _ in parts.checksums]
    metadata = [
        (key, f'"{UNSEALED}"' if key == '"header_checksum"' else value)
        for key, value in parts.metadata
    ]
    unsealed = Parts(metadata, parts.config, found, parts.tensors).encode()
    return unsealed.replace(
        f'"header_checksum":"{UNSEALED}"'.encode(),
        f'"header_checksum":"{header_digest(unsealed)}"'.encode(),
    )


def test_a_mutated_header_with_fitting_checksums_is_refused_or_another_model(data: bytes) -> None:
    parts, tensors = take_apart(data)
    assert _seal(parts) + tensors == data
    others = 0
    for changed, names in mutants(parts):
        if changed.checksums is not parts.checksums:
            continue
        sealed = _seal(changed) + tensors
        if sealed == data:
            continue
        error = _error(sealed)
        if error is not None:
            # A config of another shape is as well a list of wrong tensors.
            other_shape = any(name.startswith("__metadata__.config") for name in names)
            assert other_shape or _named(error.field, names), error
            continue
        assert rebuild(sealed) == sealed
        assert names & OPEN_FIELDS
        others += 1
    assert others < 100


OPEN_FIELDS = {
    "__metadata__.config.activation",
    "__metadata__.config.layer_norm_epsilon",
    "__metadata__.config.n_embd",
    "__metadata__.config.n_head",
    "__metadata__.config.n_inner",
    "__metadata__.config.scale_attn_by_inverse_layer_idx",
    "__metadata__.config.scale_attn_weights",
    "__metadata__.config.vocab_size",
    "__metadata__.license",
    "__metadata__.source",
    "__metadata__.parity",
}
"""Fields that may have another value, at least another that fills the same panels."""


@pytest.mark.parametrize("length", [0, 1, 56, 64, 120, 2**22 - 8, 2**22 + 56, 2**63, 2**64 - 8])
def test_a_wrong_header_length_is_named(data: bytes, length: int) -> None:
    with pytest.raises(ModelFileError) as caught:
        modelfile.read_buffer(struct.pack("<Q", length) + data[8:])
    assert caught.value.field == "header_length"


@pytest.mark.parametrize("name", ["nothing", "None", "", "zzz"])
@pytest.mark.parametrize("group", ["metadata", "config", "checksums", "tensors"])
def test_an_entry_more_at_the_end_is_refused(data: bytes, group: str, name: str) -> None:
    parts, tensors = take_apart(data)
    pairs = getattr(parts, group)
    changed = _replace(parts, group, [*pairs, (f'"{name}"', pairs[-1][1])])
    for head in (changed.encode(), _seal(changed)):
        with pytest.raises(ModelFileError):
            modelfile.read_buffer(head + tensors)


def test_a_newer_version_says_so_whatever_else_it_has(data: bytes) -> None:
    parts, tensors = take_apart(data)
    metadata = [('"aaa"', '"new"'), *parts.metadata[:-1], ('"version"', '"2"')]
    with pytest.raises(ModelFileError, match="'1', got '2'; a newer gptx may read") as caught:
        modelfile.read_buffer(_replace(parts, "metadata", metadata).encode() + tensors)
    assert caught.value.field == "__metadata__.version"


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + b"\0" * 100,
        with_length(b'{"wte.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}') + b"\0" * 4,
        with_length(b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32"}}'),
        b"Once upon a time there was a text file that is longer than a header.",
    ],
)
def test_other_files_are_told_how_to_become_model_files(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ModelFileError, match="gptx-convert"):
        modelfile.read(tmp_path / "other")


def test_hostile_names_cannot_forge_a_message(data: bytes) -> None:
    parts, tensors = take_apart(data)
    evil = "a\\u001b[2J\\n" + "b" * 5000
    for group in ("metadata", "tensors"):
        pairs = getattr(parts, group)
        changed = _replace(parts, group, [*pairs[:3], (_quoted(evil), pairs[0][1]), *pairs[3:]])
        with pytest.raises(ModelFileError) as caught:
            modelfile.read_buffer(changed.encode() + tensors)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize("filler", ["[", "{", '"', "\\", '{"a":', ","])
def test_a_hostile_header_of_4_mib_is_refused_quickly(filler: str) -> None:
    text = ('{"__metadata__":{' + filler * (2**22)).encode()[: 2**22 - 8]
    with pytest.raises(ModelFileError):
        modelfile.read_buffer(struct.pack("<Q", 2**22 - 8) + text)
    text = ('{"__metadata__":{"checksums":"' + filler * (2**22)).encode()[: 2**22 - 8]
    with pytest.raises(ModelFileError):
        modelfile.read_buffer(struct.pack("<Q", 2**22 - 8) + text)
