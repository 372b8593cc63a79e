"""Files of torch.save read without torch: equal to torch's own reading, or refused."""

import io
import random
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from pickle_programs import PROTO, STOP, archive, name, number, state_dict, storage, tensor, text
from pickle_programs import tuple_of as group

from gptx.checkpoints.source import SourceTensor
from gptx.checkpoints.torch_file import read_plain_pickle, read_torch_file
from gptx.errors import ConvertError, GptxError, ModelFileError, UnsafeCheckpointError


def as_numpy(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def assert_same(found, expected):
    """Equal values; tensors equal in shape, type and every bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, SourceTensor)
        assert found.shape == tuple(expected.shape)
        assert found.dtype == str(expected.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.load(), as_numpy(expected))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
        assert type(found) is type(expected)


def small_module():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))


def training_checkpoint():
    model = small_module()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "model_args": {"n_layer": 2, "bias": False, "dropout": 0.0},
        "iter_num": 5000,
        "best_val_loss": torch.tensor(1.47),
        "config": {"dataset": "x", "betas": (0.9, 0.95), "none": None, "big": 2**40, "neg": -7},
        "rng": torch.get_rng_state(),
    }


OBJECTS = {
    "state_dict": lambda: small_module().state_dict(),
    "parameters": lambda: dict(small_module().named_parameters()),
    "a training checkpoint": training_checkpoint,
    "every dtype": lambda: {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
            torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    },
    "views": lambda: {
        "transposed": torch.arange(12.0).reshape(3, 4).T,
        "sliced": torch.arange(20.0).reshape(4, 5)[1:3, ::2],
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    },
    "one storage twice": lambda: dict.fromkeys(("wte", "lm_head"), torch.arange(6.0)),
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("case", OBJECTS, ids=lambda case: case.replace(" ", "-"))
def test_a_file_reads_as_what_was_saved(tmp_path, case, protocol):
    path = tmp_path / "文件 1.pt"
    value = OBJECTS[case]()
    torch.save(value, path, pickle_protocol=protocol)
    assert_same(read_torch_file(path), value)


def test_torch_types_become_plain_values(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(
        {"device": torch.device("cuda", 1), "dtype": torch.bfloat16, "size": torch.Size([2, 3])},
        path,
    )
    assert read_torch_file(path) == {"device": "cuda", "dtype": "torch.bfloat16", "size": (2, 3)}


def test_one_storage_twice_has_one_place(tmp_path):
    path = tmp_path / "x.pt"
    shared = torch.arange(6.0)
    torch.save({"a": shared, "b": shared, "c": shared.clone()}, path)
    found = read_torch_file(path)
    assert found["a"].place == found["b"].place != found["c"].place


REFUSED_OBJECTS = {
    "module": (small_module, "torch.nn.modules.container Sequential"),
    "complex": (lambda: {"x": torch.zeros(2, dtype=torch.complex64)}, "torch ComplexFloatStorage"),
    "float8": (
        lambda: {"x": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        "torch._utils _rebuild_tensor_v3",
    ),
    "sparse": (lambda: {"x": torch.eye(2).to_sparse()}, "torch._utils _rebuild_sparse_tensor"),
    "set": (lambda: {"x": {1}}, "__builtin__ set"),
    "expanded": (lambda: {"x": torch.zeros(1).expand(9)}, "torch._utils._rebuild_tensor_v2"),
}


@pytest.mark.parametrize("case", REFUSED_OBJECTS)
def test_what_is_not_a_dense_real_tensor_is_refused_by_name(tmp_path, case):
    make, refused = REFUSED_OBJECTS[case]
    path = tmp_path / "x.pt"
    torch.save(make(), path)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_torch_file(path)
    assert caught.value.name == refused
    assert "torch.save(model.state_dict()" in str(caught.value)


STORAGE_TRICKS = {
    "offset past the end": tensor(offset=1),
    "offset far past the end": tensor(offset=2**31 - 1),
    "negative offset": tensor(offset=-1),
    "stride past the end": tensor(stride=(4, 1)),
    "negative stride": tensor(stride=(-3, 1)),
    "huge stride": tensor(shape=(2, 1), stride=(2**31 - 1, 1)),
    "zero stride": tensor(shape=(2**31 - 1, 2**31 - 1), stride=(0, 0)),
    "huge shape": tensor(shape=(2**31 - 1,) * 8, stride=(1,) * 8),
    "negative shape": tensor(shape=(-2, 3)),
    "many dimensions": tensor(shape=(1,) * 9, stride=(1,) * 9),
    "shape without stride": tensor(shape=(2, 3), stride=(1,)),
    "requires_grad of a number": tensor(grad=b"K\x01"),
    "hooks": tensor(hooks=b"}" + text("a") + text("b") + b"s"),
    "numel above the record": tensor(storage(numel=7)),
    "numel below the record": tensor(storage(numel=5)),
    "negative numel": tensor(storage(numel=-1)),
    "numel of text": tensor(
        group(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), text("6"))
        + b"Q"
    ),
    "another type": tensor(storage(kind="DoubleStorage")),
    "a record that is not there": tensor(storage(key="1")),
    "a path as the key": tensor(storage(key="../data.pkl")),
    "a long key": tensor(storage(key="0" * 10)),
    "a module as the storage": tensor(name("torch", "FloatStorage")),
    "four parts": tensor(group(text("storage"), name("torch", "FloatStorage")) + b"Q"),
    "not a storage": tensor(
        group(text("module"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(6))
        + b"Q"
    ),
    "a list as the id": tensor(b"]Q"),
    "too few arguments": name("torch._utils", "_rebuild_tensor_v2") + group(storage()) + b"R",
    "a parameter of nothing": name("torch._utils", "_rebuild_parameter") + group(number(1)) + b"R",
}


@pytest.mark.parametrize("case", STORAGE_TRICKS, ids=lambda case: case.replace(" ", "-"))
def test_a_storage_trick_is_refused_before_memory_is_asked_for(tmp_path, case):
    path = archive(tmp_path / "x.pt", state_dict(STORAGE_TRICKS[case]))
    with pytest.raises((UnsafeCheckpointError, ModelFileError)) as caught:
        read_torch_file(path)
    assert len(str(caught.value)) < 600


def test_one_storage_read_in_two_types_is_refused(tmp_path):
    both = PROTO + b"(" + storage() + storage(kind="IntStorage") + b"t" + STOP
    with pytest.raises(UnsafeCheckpointError, match="storage 0 is float32 and int32"):
        read_torch_file(archive(tmp_path / "x.pt", both))


def test_the_hand_written_archive_is_right_without_a_trick(tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    np.testing.assert_array_equal(read_torch_file(path)["w"].load(), np.arange(6.0).reshape(2, 3))


def rewritten(path, target, change):
    """Copies a zip file record by record through ``change(zip_file, info, data)``."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as zip_file:
        for info in source.infolist():
            change(zip_file, info, source.read(info))
    return target


def compressed(zip_file, info, data):
    zip_file.writestr(info.filename, data, zipfile.ZIP_DEFLATED)


def two_folders(zip_file, info, data):
    zip_file.writestr(info.filename, data)
    zip_file.writestr("other/" + info.filename.partition("/")[2], data)


def renamed(record):
    def change(zip_file, info, data):
        zip_file.writestr(info.filename, data)
        if info.filename.endswith("byteorder"):
            zip_file.writestr(record, data)

    return change


ZIP_TRICKS = {
    "compressed": compressed,
    "two folders": two_folders,
    "path upwards": renamed("archive/../../evil"),
    "absolute path": renamed("/etc/passwd"),
    "backslash": renamed("archive/a\\b"),
    "no folder": renamed("data.pkl"),
    "a control character": renamed("archive/a\x1b[2J"),
    "an empty part": renamed("archive//data.pkl"),
}


@pytest.mark.parametrize("case", ZIP_TRICKS, ids=lambda case: case.replace(" ", "-"))
def test_a_zip_file_that_torch_does_not_write_is_refused(tmp_path, case):
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    target = rewritten(path, tmp_path / "y.pt", ZIP_TRICKS[case])
    with pytest.raises(ModelFileError, match="only zip files as torch"):
        read_torch_file(target)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_used_twice_is_refused(tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    with zipfile.ZipFile(path, "a") as zip_file:
        zip_file.writestr("archive/data.pkl", state_dict(tensor(shape=(6,), stride=(1,))))
    with pytest.raises(ModelFileError, match="a name used once"):
        read_torch_file(path)


def edited(path, **fields):
    """Changes fields of the central entry of archive/data/0 (offsets as in the zip format)."""
    offsets = {"flags": (8, "<H"), "crc": (16, "<L"), "packed": (20, "<L"), "size": (24, "<L")}
    offsets |= {"comment": (32, "<H"), "local": (42, "<L"), "method": (10, "<H")}
    data = bytearray(path.read_bytes())
    at = data.rindex(b"archive/data/0") - 46
    assert data[at : at + 4] == b"PK\1\2"
    for field, value in fields.items():
        offset, kind = offsets[field]
        struct.pack_into(kind, data, at + offset, value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 2**31, "packed": 2**31},
        {"size": 2**31},
        {"size": 23, "packed": 23},
        {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF},
        {"local": 0},
        {"local": 2**31},
        {"flags": 1},
        {"flags": 0x40},
        {"method": 8},
        {"comment": 5},
    ],
    ids=str,
)
def test_a_directory_that_lies_is_refused(tmp_path, fields):
    path = edited(archive(tmp_path / "x.pt", state_dict(tensor())), **fields)
    with pytest.raises(ModelFileError):
        read_torch_file(path)


def test_overlapping_records_are_refused(tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(tensor()), {"data/1": b"\0" * 24})
    data = bytearray(path.read_bytes())
    # data/0 claims to reach into data/1, in both of its headers.
    for signature, field in ((b"PK\3\4", 18), (b"PK\1\2", 20)):
        at = 0
        while (at := data.find(signature, at)) >= 0:
            header = 30 if signature == b"PK\3\4" else 46
            if data[at + header :].startswith(b"archive/data/0"):
                struct.pack_into("<2L", data, at + field, 32, 32)
            at += 4
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=r"archive/version .*a record from byte"):
        read_torch_file(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"#!/bin/sh\n" + data,
        lambda data: data + b"\0",
        lambda data: data[:-2] + struct.pack("<H", 3) + b"abc",
        lambda data: data + data[data.rindex(b"PK\5\6") :],
    ],
    ids=["prefix", "suffix", "comment", "two-ends"],
)
def test_an_archive_with_anything_around_it_is_refused(tmp_path, change):
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelFileError):
        read_torch_file(path)


def test_a_wide_zip64_record_is_read(tmp_path):
    """Sizes of 0xFFFFFFFF in the directory stand for 64-bit values in the extra field."""
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    data = path.read_bytes()
    end = data.rindex(b"PK\5\6")
    entries = struct.unpack_from("<H", data, end + 10)[0]
    size, start = struct.unpack_from("<2L", data, end + 12)
    at = data.rindex(b"archive/data/0") - 46
    entry = bytearray(data[at : at + 46])
    real = struct.unpack_from("<2L", entry, 24)[0], struct.unpack_from("<L", entry, 20)[0]
    struct.pack_into("<2L", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, 20)
    extra = struct.pack("<2H2Q", 1, 16, *real)
    directory = data[start:at] + entry + b"archive/data/0" + extra + data[at + 60 : start + size]
    end64 = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(directory), start
    )
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 2**32 - 1, 2**32 - 1, 0)
    path.write_bytes(data[:start] + directory + end64 + locator + tail)
    np.testing.assert_array_equal(read_torch_file(path)["w"].load(), np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize("case", ["state_dict", "a training checkpoint"])
def test_a_truncated_file_is_an_error_at_every_length(tmp_path, case):
    path, cut = tmp_path / "x.pt", tmp_path / "cut.pt"
    torch.save(OBJECTS[case](), path)
    data = path.read_bytes()
    for length in [len(data) * i // 50 for i in range(50)] + [len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            read_torch_file(cut)


def test_a_flipped_bit_in_a_tensor_is_found_when_it_is_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(1000.0), "v": torch.arange(1000.0)[10:20]}, path)
    data = path.read_bytes()
    at = data.index(struct.pack("<3f", 500.0, 501.0, 502.0))
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    found = read_torch_file(path)
    with pytest.raises(ModelFileError, match=r"record x/data/0 .*CRC-32"):
        found["w"].load()
    found["v"].load()  # another record


def test_a_part_of_a_damaged_record_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"v": torch.arange(1000.0)[10:20]}, path)
    data = path.read_bytes()
    at = data.index(struct.pack("<3f", 500.0, 501.0, 502.0))
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ModelFileError, match="CRC-32"):
        read_torch_file(path)["v"].load()


def test_flipped_bytes_give_an_error_or_the_same_values(tmp_path):
    path, broken = tmp_path / "x.pt", tmp_path / "broken.pt"
    torch.save({"w": torch.arange(30.0)}, path)
    data = path.read_bytes()
    rng = random.Random(0)
    for at in rng.sample(range(len(data)), 400):
        value = bytes([data[at] ^ (1 << rng.randrange(8))])
        broken.write_bytes(data[:at] + value + data[at + 1 :])
        try:
            found = read_torch_file(broken)["w"].load()
        except (GptxError, KeyError):
            continue
        np.testing.assert_array_equal(found, np.arange(30.0, dtype=np.float32))


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(30.0)}, path)
    found = read_torch_file(path)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ConvertError, match="changed while it was read"):
        found["w"].load()


def test_torchscript_and_big_endian_files_are_refused_with_the_way_out(tmp_path):
    script = archive(tmp_path / "x.pt", state_dict(tensor()), {"constants.pkl": b"\x80\x02)."})
    with pytest.raises(ConvertError, match="TorchScript archive; save its weights"):
        read_torch_file(script)
    big = archive(tmp_path / "y.pt", state_dict(tensor()), {"byteorder": b"big"})
    with pytest.raises(ConvertError, match="big-endian"):
        read_torch_file(big)


def test_an_archive_without_a_pickle_is_refused(tmp_path):
    with pytest.raises(ModelFileError, match=r"a record data\.pkl"):
        read_torch_file(archive(tmp_path / "x.pt", None))
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    (tmp_path / "x.npz").write_bytes(buffer.getvalue())
    with pytest.raises(ModelFileError, match="only zip files as torch"):
        read_torch_file(tmp_path / "x.npz")


def test_a_plain_pickle_has_no_tensors(tmp_path):
    path = tmp_path / "meta.pkl"
    path.write_bytes(PROTO + name("torch", "FloatStorage") + STOP)
    with pytest.raises(UnsafeCheckpointError, match="torch FloatStorage"):
        read_plain_pickle(path)
    path.write_bytes(PROTO + tensor() + STOP)
    with pytest.raises(UnsafeCheckpointError, match="_rebuild_tensor_v2"):
        read_plain_pickle(path)


READ_AND_LIST = """
import sys
events = []
sys.addaudithook(lambda e, a: events.append((e, a)))
from pathlib import Path
import numpy as np
from gptx.checkpoints.torch_file import read_torch_file
from gptx.errors import UnsafeCheckpointError
events.clear()
found = read_torch_file(Path(sys.argv[1]))
total = sum(t.read().sum() for t in found.values())
try:
    read_torch_file(Path(sys.argv[2]))
except UnsafeCheckpointError as error:
    assert error.name == "posix system", error
else:
    raise SystemExit("not refused")
allowed = {"open", "object.__getattr__", "sys._getframe"}
assert {e for e, _ in events} <= allowed, {e for e, _ in events} - allowed
assert {str(a[0]) for e, a in events if e == "open"} <= set(sys.argv[1:])
for module in ("torch", "transformers", "safetensors", "pickle" + "tools"):
    assert module not in sys.modules, module
print(float(total))
"""


def test_reading_imports_no_torch_opens_no_other_file_and_executes_nothing(tmp_path):
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    torch.save({"w": torch.arange(30.0)}, good)
    archive(bad, PROTO + name("posix", "system") + text(f"touch {tmp_path}/pwned") + b"\x85R.")
    result = subprocess.run(
        [sys.executable, "-c", READ_AND_LIST, str(good), str(bad)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 435.0
    assert not (tmp_path / "pwned").exists()


def test_crc_is_that_of_the_zip_format(tmp_path):
    path = archive(tmp_path / "x.pt", state_dict(tensor()))
    with zipfile.ZipFile(path) as zip_file:
        crc = zip_file.getinfo("archive/data/0").CRC
    assert crc == zlib.crc32(struct.pack("<6f", *range(6)))
    with pytest.raises(ModelFileError):
        read_torch_file(edited(path, crc=crc ^ 1))["w"].load()
