"""Every flipped bit and every cut of a small file is found, and the right field is named."""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from pathlib import Path

import pytest
from modelfile_samples import TINY, weights

from gptx import modelfile
from gptx.errors import ModelFileError


@pytest.fixture(scope="module", params=modelfile.DTYPES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("damage") / "m.gptx"
    modelfile.write(
        path, TINY, weights(TINY), dtype=request.param, source="test", generation={"top_k": 4}
    )
    modelfile.update(path, parity={"kl": 0.5})
    return path.read_bytes()


def _error(data: bytes) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        modelfile.read_buffer(data)
    return caught.value


class Fields:
    """Which field each byte of a file belongs to, found without the reader under test."""

    def __init__(self, data: bytes) -> None:
        self.begins: list[int] = [0]
        self.names: list[str] = ["header_length"]
        text = data[: 8 + int.from_bytes(data[:8], "little")].decode("latin-1")
        entries = json.loads(text[8:])
        metadata = entries.pop("__metadata__")
        at = 8
        self._add(at, "__metadata__")
        for key, value in metadata.items():
            at = text.index(f'"{key}":', at)
            self._add(at, f"__metadata__.{key}")
            end = text.index(json.dumps(value), at) + len(json.dumps(value))
            if key in ("config", "checksums"):
                for name in json.loads(value):
                    at = text.index(f'\\"{name}\\":', at)
                    self._add(at, f"__metadata__.{key}.{name}")
            at = end
        for name in entries:
            at = text.index(f'"{name}":{{', at)
            self._add(at, name)
            for part in ("dtype", "shape", "data_offsets"):
                at = text.index(f'"{part}":', at)
                self._add(at, f"{name}.{part}")
        self._add(len(text.rstrip(" ")) - 1, "header")
        self._add(len(text.rstrip(" ")), "header padding")
        for name, entry in entries.items():
            self._add(len(text) + entry["data_offsets"][0], f"checksum of {name}")

    def _add(self, begin: int, name: str) -> None:
        assert begin >= self.begins[-1]
        self.begins.append(begin)
        self.names.append(name)

    def at(self, byte: int) -> str:
        return self.names[bisect_right(self.begins, byte) - 1]

    def around(self, byte: int) -> set[str]:
        """The field of a byte, and for one on a border (a comma, a quote) its neighbour's."""
        return {self.at(max(b, 0)) for b in range(byte - 4, byte + 2)}


def _check_flips(data: bytes, bits: list[int]) -> None:
    fields = Fields(data)
    damaged = bytearray(data)
    for bit in bits:
        byte = bit // 8
        damaged[byte] ^= 1 << bit % 8
        error = _error(bytes(damaged))
        known = fields.around(byte)
        if damaged[byte] in b'"\\' or data[byte] in b'"\\,':
            # A quote or comma lost or gained ends a JSON text: the text as a whole is named.
            known |= {".".join(name.split(".")[:2]) for name in known}
        damaged[byte] ^= 1 << bit % 8
        assert error.field in known, (byte, bit % 8)


def _step(data: bytes) -> int:
    """1 for the int8 file, all of which is tried; the others share its code and get a sample."""
    return 1 if modelfile.read_buffer(data).dtype == "int8" else 23


@pytest.mark.slow
def test_every_flipped_bit_of_the_header_names_its_field(data: bytes) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    _check_flips(data, list(range(0, 8 * start, _step(data))))


@pytest.mark.slow
def test_every_flipped_bit_of_the_tensors_names_the_tensor(data: bytes) -> None:
    start = 8 + int.from_bytes(data[:8], "little")
    _check_flips(data, list(range(8 * start, 8 * len(data), _step(data))))


def test_every_cut_is_a_wrong_file_size(data: bytes) -> None:
    for size in range(0, len(data), _step(data)):
        error = _error(data[:size])
        assert error.field == "file size"
        assert error.offset == size
        assert error.found == size


def test_added_bytes_are_a_wrong_file_size(data: bytes) -> None:
    for extra in (b"\0", b" ", b"\0" * 64, data):
        assert _error(data + extra).field == "file size"


def test_random_bursts_are_found(data: bytes) -> None:
    rng = random.Random(1)
    for _ in range(2000):
        damaged = bytearray(data)
        begin = rng.randrange(len(data))
        damaged[begin : begin + rng.randint(1, 200)] = rng.randbytes(rng.randint(1, 200))
        if damaged != data:
            assert _error(bytes(damaged)).field


def test_damage_is_found_through_the_file_system_too(data: bytes, tmp_path: Path) -> None:
    rng = random.Random(2)
    path = tmp_path / "m.gptx"
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cut = len(data) if rng.random() < 0.5 else rng.randrange(len(data))
        path.write_bytes(damaged[:cut])
        in_memory = _error(bytes(damaged[:cut]))
        with pytest.raises(ModelFileError) as caught:
            modelfile.read(path)
        assert (caught.value.field, caught.value.offset) == (in_memory.field, in_memory.offset)
        assert str(path) in str(caught.value)
