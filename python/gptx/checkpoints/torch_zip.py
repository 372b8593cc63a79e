"""The zip container of ``torch.save``, read strictly.

Only what torch writes is accepted: stored entries of one folder, no name twice, no overlap, the
central directory at the end, no comment. Entries are never extracted; names only select records.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from gptx.checkpoints.source import TRUNCATED, SourceFile
from gptx.errors import ModelFileError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MAX_ENTRIES = 65_536
_MAX_DIRECTORY = 16 << 20
_CHUNK = 16 << 20
_FLAG_DESCRIPTOR, _FLAG_UTF8 = 0x0008, 0x0800
_RECORD = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.\-]*(/[A-Za-z0-9_.][A-Za-z0-9_.\-]*)*")


@dataclass(frozen=True)
class Entry:
    """A record of the archive: where its bytes are, how many, and their CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


class TorchZip:
    """The records of a torch file by name, without the name of the archive's folder.

    Raises:
        ModelFileError: truncated, damaged, or a zip file that torch does not write.
    """

    def __init__(self, path: Path) -> None:
        self.file = SourceFile(path)
        self.path = path
        self._verified: set[str] = set()
        directory, start, count = self._directory()
        found = self._central(directory, start, count)
        self.entries = self._strip_folder(self._locate(found, start))

    def read(self, name: str, limit: int) -> bytes:
        """A whole record of at most ``limit`` bytes, its CRC checked."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._fail("zip directory", 0, f"a record {name}", "none", _FOREIGN)
        if entry.size > limit:
            expected = f"at most {limit} bytes"
            raise ModelFileError(self.path, f"record {name}", entry.offset, expected, entry.size)
        return self.read_range(entry, 0, entry.size).tobytes()

    def read_range(self, entry: Entry, start: int, size: int) -> np.ndarray:
        """Bytes of a record as a new uint8 array. The first call checks the record's CRC."""
        field = f"record {entry.name}"
        whole = start == 0 and size == entry.size
        if entry.name not in self._verified and not whole:
            crc = 0
            for at in range(0, entry.size, _CHUNK):
                count = min(_CHUNK, entry.size - at)
                crc = zlib.crc32(self.file.read(entry.offset + at, count, field).data, crc)
            self._check_crc(entry, crc)
        data = self.file.read(entry.offset + start, size, field)
        if entry.name not in self._verified and whole:
            self._check_crc(entry, zlib.crc32(data.data))
        return data

    def _check_crc(self, entry: Entry, crc: int) -> None:
        if crc != entry.crc:
            field = f"record {entry.name}"
            expected = f"CRC-32 {entry.crc:08x}"
            raise ModelFileError(self.path, field, entry.offset, expected, f"{crc:08x}", TRUNCATED)
        self._verified.add(entry.name)

    def _fail(
        self, field: str, offset: int, expected: object, found: object, remedy: str = TRUNCATED
    ) -> ModelFileError:
        return ModelFileError(self.path, field, offset, expected, found, remedy)

    def _directory(self) -> tuple[bytes, int, int]:
        """The central directory: its bytes, its offset and its number of entries."""
        at = self.file.size - _END.size
        if at < 0:
            raise self._fail("zip end record", 0, f"{_END.size} bytes", f"{self.file.size} bytes")
        raw = self.file.read(at, _END.size, "zip end record").tobytes()
        magic, disk, start_disk, here, count, size, start, comment = _END.unpack(raw)
        if magic != b"PK\5\6" or disk or start_disk or here != count or comment:
            raise self._fail("zip end record", at, "one at the end of the file", raw)
        narrow, end = (count, size, start), at
        if at >= _END64_LOCATOR.size:
            back = at - _END64_LOCATOR.size
            locator = self.file.read(back, _END64_LOCATOR.size, "zip64 locator").tobytes()
            if locator[:4] == b"PK\6\7":
                end, count, size, start = self._directory64(back, locator)
                wide = (min(count, 0xFFFF), min(size, 0xFFFFFFFF), min(start, 0xFFFFFFFF))
                if any(a != b and a != m for a, b, m in zip(narrow, wide, _SATURATED, strict=True)):
                    raise self._fail("zip end record", at, wide, narrow)
        if start + size != end:
            raise self._fail("zip directory", start, f"{end - start} bytes", size)
        if size > _MAX_DIRECTORY or count > _MAX_ENTRIES:
            limit = f"at most {_MAX_ENTRIES} records in {_MAX_DIRECTORY} bytes"
            raise self._fail("zip directory", start, limit, (count, size))
        return self.file.read(start, size, "zip directory").tobytes(), start, count

    def _directory64(self, back: int, locator: bytes) -> tuple[int, int, int, int]:
        """The zip64 end record: its offset, then count, size and offset of the directory."""
        _, disk, end, disks = _END64_LOCATOR.unpack(locator)
        if disk or disks > 1 or end + _END64.size != back:
            raise self._fail("zip64 locator", back, f"offset {back - _END64.size}", end)
        raw = self.file.read(end, _END64.size, "zip64 end record").tobytes()
        magic, length, _, _, disk, start_disk, here, count, size, start = _END64.unpack(raw)
        fine = magic == b"PK\6\6" and length == _END64.size - 12 and here == count
        if not fine or disk or start_disk:
            raise self._fail("zip64 end record", end, "one of one disk", raw)
        return end, count, size, start

    def _central(self, data: bytes, start: int, count: int) -> list[tuple[Entry, int]]:
        """Entries with the offset of the local header, and the flags, from the directory."""
        found: list[tuple[Entry, int]] = []
        at = 0
        for _ in range(count):
            if at + _CENTRAL.size > len(data):
                raise self._fail("zip directory", start + at, f"{count} entries", len(found))
            head = _CENTRAL.unpack_from(data, at)
            magic, _, _, flags, method, _, _, crc, packed, size = head[:10]
            name_len, extra_len, comment_len, disk, _, _, local = head[10:]
            next_at = at + _CENTRAL.size + name_len + extra_len + comment_len
            if magic != b"PK\1\2" or next_at > len(data) or comment_len or disk not in (0, 0xFFFF):
                expected = "an entry as torch writes it"
                raise self._fail("zip directory entry", start + at, expected, magic)
            name = self._name(data[at + _CENTRAL.size :][:name_len], start + at)
            extra = data[at + _CENTRAL.size + name_len :][:extra_len]
            size, packed, local = self._zip64_extra(name, extra, (size, packed, local), start + at)
            field = f"record {name}"
            if method != 0 or packed != size:
                expected = "method 0 (stored), sizes that agree"
                actual = f"method {method}, sizes {packed} and {size}"
                raise self._fail(field, start + at, expected, actual, _FOREIGN)
            if flags & ~(_FLAG_DESCRIPTOR | _FLAG_UTF8):
                raise self._fail(
                    field, start + at, "no other flags than 0x808", hex(flags), _FOREIGN
                )
            found.append((Entry(name, 0, size, crc), local))
            at = next_at
        if at != len(data):
            raise self._fail("zip directory", start + at, "its end", f"{len(data) - at} more bytes")
        return found

    def _name(self, raw: bytes, at: int) -> str:
        """A record's name: one folder of any printable name, then plain parts."""
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail("zip directory entry", at, "a name in UTF-8", raw, _FOREIGN) from None
        folder, _, record = name.partition("/")
        plain = folder.isprintable() and folder not in ("", ".", "..") and "\\" not in folder
        if not plain or not _RECORD.fullmatch(record) or ".." in record.split("/"):
            expected = "a name like archive/data/0"
            raise self._fail("zip directory entry", at, expected, name, _FOREIGN)
        return name

    def _zip64_extra(
        self, name: str, extra: bytes, sizes: tuple[int, int, int], at: int
    ) -> tuple[int, int, int]:
        """(size, packed, local offset) with the saturated ones replaced by their 64-bit values."""
        wanted = [i for i, value in enumerate(sizes) if value == 0xFFFFFFFF]
        pos, result, done = 0, list(sizes), False
        while pos + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, pos)
            whole = 8 * len(wanted) <= length <= len(extra) - pos - 4
            if kind == 1 and not done and whole:
                values = struct.unpack_from(f"<{len(wanted)}Q", extra, pos + 4)
                for i, value in zip(wanted, values, strict=True):
                    result[i] = value
                done = True
            pos += 4 + length
        if pos != len(extra) or (wanted and not done):
            raise self._fail(f"record {name}", at, "a whole zip64 field", extra)
        return result[0], result[1], result[2]

    def _locate(self, found: list[tuple[Entry, int]], limit: int) -> list[Entry]:
        """Entries with the offset of their data; local headers agree and nothing overlaps."""
        located: list[Entry] = []
        spans: list[tuple[int, int, str]] = []
        for entry, local in found:
            field = f"record {entry.name}"
            name = entry.name.encode()
            if local + _LOCAL.size + len(name) > limit:
                raise self._fail(field, local, f"a header before byte {limit}", local)
            raw = self.file.read(local, _LOCAL.size + len(name), field).tobytes()
            head = _LOCAL.unpack_from(raw)
            magic, _, flags, method, _, _, crc, packed, size, name_len, extra_len = head
            same_name = name_len == len(name) and raw[_LOCAL.size :] == name
            if magic != b"PK\3\4" or method != 0 or not same_name:
                raise self._fail(field, local, "a local header like the directory's", raw)
            begin = local + _LOCAL.size + name_len + extra_len
            if begin + entry.size > limit:
                raise self._fail(field, begin, f"{entry.size} bytes before byte {limit}", begin)
            if not flags & _FLAG_DESCRIPTOR:
                saturated = 0xFFFFFFFF in (packed, size)
                if crc != entry.crc or not (saturated or packed == size == entry.size):
                    raise self._fail(field, local, "sizes like the directory's", (packed, size))
            located.append(Entry(entry.name, begin, entry.size, entry.crc))
            spans.append((local, begin + entry.size, entry.name))
        spans.sort()
        for (_, end, _), (begin, _, later) in pairwise(spans):
            if begin < end:
                field = f"record {later}"
                raise self._fail(field, begin, f"a record from byte {end} on", begin, _FOREIGN)
        return located

    def _strip_folder(self, located: list[Entry]) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        folders = {entry.name.partition("/")[0] for entry in located}
        if len(folders) != 1:
            raise self._fail("zip directory", 0, "one folder", f"{len(folders)} folders", _FOREIGN)
        for entry in located:
            record = entry.name.partition("/")[2]
            if record in entries:
                field = f"record {entry.name}"
                raise self._fail(field, entry.offset, "a name used once", "twice", _FOREIGN)
            entries[record] = entry
        return entries


_FOREIGN = "only zip files as torch.save writes them are read"
_SATURATED = (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
