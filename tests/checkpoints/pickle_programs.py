"""Hand-written pickles and torch archives for the tests."""

from __future__ import annotations

import io
import struct
import zipfile

PROTO = b"\x80\x02"
STOP = b"."


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def short_text(value):
    raw = value.encode()
    return b"\x8c" + bytes([len(raw)]) + raw


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def storage(key="0", kind="FloatStorage", numel=6, location="cpu"):
    """A persistent id as torch writes it."""
    parts = text("storage"), name("torch", kind), text(key), text(location), number(numel)
    return tuple_of(*parts) + b"Q"


def tensor(of=None, offset=0, shape=(2, 3), stride=(3, 1), grad=b"\x89", hooks=None):
    """A call of _rebuild_tensor_v2."""
    no_hooks = name("collections", "OrderedDict") + b")R"
    parts = (
        of or storage(),
        number(offset),
        tuple_of(*map(number, shape)),
        tuple_of(*map(number, stride)),
        grad,
        no_hooks if hooks is None else hooks,
    )
    return name("torch._utils", "_rebuild_tensor_v2") + tuple_of(*parts) + b"R"


def state_dict(value, key="w"):
    return PROTO + b"}" + text(key) + value + b"s" + STOP


def archive(path, pickle, records=None, folder="archive", **options):
    """A zip file with the records of torch.save; ``options`` go to zipfile.ZipFile."""
    all_records = {
        "data.pkl": pickle,
        "byteorder": b"little",
        "data/0": struct.pack("<6f", *range(6)),
        "version": b"3\n",
        **(records or {}),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as zip_file:
        for record, data in all_records.items():
            if data is not None:
                zip_file.writestr(f"{folder}/{record}", data)
    path.write_bytes(buffer.getvalue())
    return path
