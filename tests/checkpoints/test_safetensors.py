"""safetensors files: equal to what was saved, and strict where the format says must."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gptx.checkpoints.safetensors import looks_like_safetensors, read_safetensors
from gptx.checkpoints.source import SourceFile
from gptx.errors import ConvertError, GptxError, ModelFileError


def write(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin=0, end=8, dtype="F32", shape=(2,), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_read_as_float32(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {name: torch.randn(7, 5).to(dtype) for name in ("a", "b")} | {"s": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == str(tensor.dtype).removeprefix("torch.")
        array = found[name].read()
        assert array.dtype == np.float32
        assert array.flags.writeable
        np.testing.assert_array_equal(array, tensor.float().numpy())


def test_every_bfloat16_is_exact(tmp_path):
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = bits[torch.isfinite(bits.float())]
    save_file({"x": finite}, tmp_path / "x")
    found = read_safetensors(tmp_path / "x")[0]["x"].read()
    np.testing.assert_array_equal(found.view(np.uint32), finite.float().numpy().view(np.uint32))


def test_integers_load_and_are_refused_as_weights(tmp_path):
    save_file({"x": torch.arange(5), "m": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "x")
    found = read_safetensors(tmp_path / "x")[0]
    np.testing.assert_array_equal(found["x"].load(), np.arange(5))
    np.testing.assert_array_equal(found["m"].load(), np.ones((2, 2), bool))
    with pytest.raises(ConvertError, match=r"tensor x: expected float64, .* got int64"):
        found["x"].read()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.float16),
        (float("-inf"), torch.bfloat16),
        (1e300, torch.float64),
    ],
)
def test_a_weight_that_is_not_finite_is_named_with_its_index(tmp_path, value, dtype):
    tensor = torch.zeros(4, 5, dtype=dtype)
    tensor[2, 3] = value
    save_file({"h.0.w": tensor}, tmp_path / "x")
    with pytest.raises(ConvertError, match=r"tensor h\.0\.w: .* at index \[2, 3\]") as caught:
        read_safetensors(tmp_path / "x")[0]["h.0.w"].read()
    assert caught.value.tensor == "h.0.w"
    assert f"{value}" in str(caught.value)


TWO = {"a": entry(0, 8), "b": entry(8, 16)}
DATA = bytes(16)
BAD = {
    "no data": ({"a": entry()}, b""),
    "data too long": ({"a": entry()}, bytes(9)),
    "a hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)),
    "an overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "a gap before": ({"a": entry(4, 12)}, bytes(12)),
    "the same bytes twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "offsets backwards": ({"a": entry(8, 0)}, bytes(8)),
    "offsets past the end": ({"a": entry(0, 2**62, shape=[2**60])}, bytes(8)),
    "negative offsets": ({"a": entry(-8, 0)}, bytes(8)),
    "fractional offsets": ({"a": entry(0.0, 8.0)}, bytes(8)),
    "boolean offsets": ({"a": entry(False, 8)}, bytes(8)),
    "three offsets": ({"a": {**entry(), "data_offsets": [0, 4, 8]}}, bytes(8)),
    "shape and size differ": ({"a": entry(shape=[3])}, bytes(8)),
    "a huge shape": ({"a": entry(shape=[2**31])}, bytes(8)),
    "a shape that wraps": ({"a": entry(shape=[2**31 - 1] * 8)}, bytes(8)),
    "nine dimensions": ({"a": entry(shape=[1] * 8 + [2])}, bytes(8)),
    "a negative shape": ({"a": entry(shape=[-1, -2])}, bytes(8)),
    "a shape of text": ({"a": {**entry(), "shape": "2"}}, bytes(8)),
    "an unknown dtype": ({"a": entry(dtype="F31")}, bytes(8)),
    "a dtype of number": ({"a": entry(dtype=32)}, bytes(8)),
    "an unknown field": ({"a": entry(more=1)}, bytes(8)),
    "a field missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "a list for a tensor": ({"a": [1]}, bytes(8)),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
    "metadata of text": ({"__metadata__": "x", "a": entry()}, bytes(8)),
    "a key twice": (b'{"a":1,"a":2}', b""),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b""),
    "a field twice": (
        b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
    ),
    "leading space": (b' {"a":1}', b""),
    "a list": (b"[1]", b""),
    "not JSON": (b"{a:1}", b""),
    "text after": (b"{} x", b""),
    "NaN": (b'{"a":NaN}', b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "nested deeply": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "nested": (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b""),
    "a long number": (b'{"a":' + b"9" * 5000 + b"}", b""),
    "many tensors": ({f"t{i}": entry(0, 0, shape=[0]) for i in range(65_537)}, b""),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_a_header_that_breaks_a_rule_is_refused(tmp_path, case):
    with pytest.raises(ModelFileError) as caught:
        read_safetensors(write(tmp_path / "x", *BAD[case]))
    assert caught.value.path == str(tmp_path / "x")
    assert len(str(caught.value)) < 600


def test_the_header_is_right_without_a_fault(tmp_path):
    assert list(read_safetensors(write(tmp_path / "x", TWO, DATA))[0]) == ["a", "b"]


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1, 10_000])
def test_a_wrong_header_length_is_refused(tmp_path, length):
    with pytest.raises(ModelFileError):
        read_safetensors(write(tmp_path / "x", TWO, DATA, length))


def test_a_truncated_file_is_an_error_at_every_length(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(3)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for length in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            read_safetensors(tmp_path / "cut")


def test_mutated_headers_give_an_error_or_tensors(tmp_path):
    save_file({"a": torch.arange(6.0), "b": torch.ones(3)}, tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    rng = random.Random(0)
    for _ in range(500):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            mutated[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "y").write_bytes(mutated)
        try:
            for tensor in read_safetensors(tmp_path / "y")[0].values():
                tensor.load()
        except GptxError:
            pass


def test_a_path_that_is_no_regular_file_is_refused(tmp_path):
    for path in (tmp_path, "/dev/zero"):
        with pytest.raises(ConvertError, match="expected a regular file"):
            SourceFile(path)
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "nothing")


def test_the_format_is_known_by_its_first_bytes(tmp_path):
    assert looks_like_safetensors(SourceFile(write(tmp_path / "x", TWO, DATA)))
    (tmp_path / "y").write_bytes(b"PK\3\4" + bytes(20))
    assert not looks_like_safetensors(SourceFile(tmp_path / "y"))
