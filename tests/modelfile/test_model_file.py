"""Model files written and read: what comes back, and that others can read it too."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from modelfile_samples import AWKWARD, MANY_HEADS, TINY, header_of, rebuild, weights

from gptx import modelfile
from gptx.config import GPTConfig
from gptx.errors import ConvertError, ModelFileError, ParameterError
from gptx.quantize import dequantize_rows, expand_bfloat16, quantize_rows, round_bfloat16
from gptx.tokenizer import TokenizerSpec
from xxh64 import tree, xxh64

CONFIGS = [TINY, AWKWARD, MANY_HEADS]
each_dtype = pytest.mark.parametrize("dtype", modelfile.DTYPES)


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if array.ndim == 1 or name == "wpe.weight" or dtype == "float32":
        return array
    if dtype == "bfloat16":
        return expand_bfloat16(round_bfloat16(array))
    return dequantize_rows(*quantize_rows(array)[:2])


@pytest.mark.parametrize("config", CONFIGS)
@each_dtype
def test_what_is_written_comes_back(tmp_path: Path, config: GPTConfig, dtype: str) -> None:
    source = weights(config)
    generation = {"eos_token_id": [3, 4], "temperature": 0.8, "do_sample": True}
    modelfile.write(
        tmp_path / "m.gptx",
        config,
        source,
        dtype=dtype,
        generation=generation,
        source="a tést\n",
        license="CC0",
    )
    model = modelfile.verify(tmp_path / "m.gptx")
    assert (model.config, model.dtype, model.generation) == (config, dtype, generation)
    assert (model.source, model.license, model.parity) == ("a tést\n", "CC0", None)
    assert model.tokenizer is None
    for name, array in source.items():
        np.testing.assert_array_equal(model.weight(name), _rounded(name, array, dtype))


@each_dtype
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, dtype: str) -> None:
    for name in ("a.gptx", "b.gptx"):
        modelfile.write(tmp_path / name, AWKWARD, weights(AWKWARD), dtype=dtype)
    assert (tmp_path / "a.gptx").read_bytes() == (tmp_path / "b.gptx").read_bytes()


@each_dtype
def test_the_safetensors_package_lists_the_file(tmp_path: Path, dtype: str) -> None:
    safetensors = pytest.importorskip("safetensors")
    path = tmp_path / "m.gptx"
    modelfile.write(path, AWKWARD, weights(AWKWARD), dtype=dtype)
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == {t.name for t in modelfile.stored_tensors(AWKWARD, dtype)}
        assert file.metadata()["format"] == "gptx"
        bias = modelfile.read(path).tensors["h.1.attn.c_attn.bias"]
        np.testing.assert_array_equal(file.get_tensor("h.1.attn.c_attn.bias"), bias)


@each_dtype
def test_checksums_follow_the_specification(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY), dtype=dtype, license="é")
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = header_of(data)
    metadata = entries.pop("__metadata__")
    found = json.loads(metadata["checksums"])
    expected = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        expected[name] = tree(data[start + begin : start + end])
    for name in set(metadata) - {"checksums", "config", "header_checksum"}:
        expected[f"__metadata__.{name}"] = xxh64(metadata[name].encode())
    for name, value in json.loads(metadata["config"]).items():
        expected[f"__metadata__.config.{name}"] = xxh64(json.dumps(value).encode())
    assert found == {name: f"{value:016x}" for name, value in expected.items()}
    seal = metadata["header_checksum"]
    unsealed = data[:start].replace(seal.encode(), b"0" * 16)
    assert seal == f"{xxh64(unsealed):016x}"


@each_dtype
def test_every_tensor_is_aligned_and_nothing_lies_between(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, AWKWARD, weights(AWKWARD), dtype=dtype)
    model = modelfile.read(path)
    assert model.data_start % 64 == 0
    end = 0
    for tensor in modelfile.stored_tensors(AWKWARD, dtype):
        assert tensor.begin == end
        assert tensor.begin % 64 == 0
        end = tensor.end
    assert model.size == model.data_start + end


def test_tensors_are_read_only_views_of_the_mapping(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY))
    model = modelfile.read(path)
    first = model.tensors["wpe.weight"].__array_interface__["data"][0]
    assert (first - model.data_start) % 4096 == 0
    for tensor in modelfile.stored_tensors(TINY, "float32"):
        array = model.tensors[tensor.name]
        assert array.__array_interface__["data"][0] == first + tensor.begin
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_views_outlive_the_model_file(tmp_path: Path) -> None:
    modelfile.write(tmp_path / "m.gptx", TINY, weights(TINY))
    wte = modelfile.read(tmp_path / "m.gptx").tensors["wte.weight"]
    (tmp_path / "m.gptx").unlink()
    assert np.isfinite(wte).all()


def test_the_order_of_the_file_is_that_of_the_computation() -> None:
    names = [tensor.name for tensor in modelfile.stored_tensors(TINY, "int8")]
    assert names[:5] == [
        "wpe.weight",
        "h.0.ln_1.weight",
        "h.0.ln_1.bias",
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_attn.scale",
    ]
    assert names[-5:] == ["ln_f.weight", "ln_f.bias", "wte.weight", "wte.scale", "wte.colsum"]


def test_tensors_are_asked_for_once_and_in_order(tmp_path: Path) -> None:
    class Recorder(dict):
        def __init__(self, values: dict) -> None:
            super().__init__(values)
            self.asked: list[str] = []

        def __getitem__(self, name: str) -> np.ndarray:
            self.asked.append(name)
            return super().__getitem__(name)

    source = Recorder(weights(AWKWARD))
    steps: list[tuple[str, int, int]] = []
    modelfile.write(tmp_path / "m.gptx", AWKWARD, source, progress=lambda *step: steps.append(step))
    assert source.asked == list(modelfile.canonical_shapes(AWKWARD))
    assert [name for name, _, _ in steps] == source.asked
    size = (tmp_path / "m.gptx").stat().st_size
    assert steps[-1][1:] == (size, size)


def test_writing_holds_only_a_few_tensors_in_memory(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=2000, block_size=8, n_layer=8, n_head=4, n_embd=256, n_inner=1024)

    class Lazy(dict):
        def __getitem__(self, name: str) -> np.ndarray:
            return np.ones(super().__getitem__(name), np.float32)

    tensors = Lazy(modelfile.canonical_shapes(config))
    largest = 4 * config.vocab_size * config.n_embd
    for dtype in modelfile.DTYPES:
        tracemalloc.start()
        modelfile.write(tmp_path / f"{dtype}.gptx", config, tensors, dtype=dtype)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 4 * largest
        assert largest * 8 < 4 * config.n_params


def test_fortran_ordered_tensors_give_the_same_file(tmp_path: Path) -> None:
    source = weights(AWKWARD)
    modelfile.write(tmp_path / "a.gptx", AWKWARD, source)
    turned = {name: np.asfortranarray(array) for name, array in source.items()}
    modelfile.write(tmp_path / "b.gptx", AWKWARD, turned)
    assert (tmp_path / "a.gptx").read_bytes() == (tmp_path / "b.gptx").read_bytes()


def test_canonical_tensors_are_all_the_weights_of_the_model() -> None:
    for config in CONFIGS:
        shapes = modelfile.canonical_shapes(config)
        assert sum(math.prod(shape) for shape in shapes.values()) == config.n_params


def test_a_model_file_is_known_by_its_name_or_its_bytes(tmp_path: Path) -> None:
    modelfile.write(tmp_path / "odd.name", TINY, weights(TINY))
    (tmp_path / "damaged.gptx").write_bytes(b"")
    (tmp_path / "other.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert modelfile.is_model_file(tmp_path / "odd.name")
    assert modelfile.is_model_file(str(tmp_path / "damaged.gptx"))
    assert not modelfile.is_model_file(tmp_path / "other.safetensors")


def test_a_parity_report_is_added_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY), dtype="int8", license="MIT")
    path.chmod(0o640)
    before = path.read_bytes()
    report = {"max_difference": 1.5e-6, "prompts": 4, "torch": {"version": "2"}}
    modelfile.update(path, parity=report)
    model = modelfile.verify(path)
    assert model.parity == report
    assert model.license == "MIT"
    assert path.stat().st_mode & 0o777 == 0o640
    modelfile.update(path, parity=None)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gptx"]


def test_a_parity_report_does_not_hide_damaged_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    modelfile.update(path, parity={"ok": True})
    with pytest.raises(ModelFileError, match="checksum of wte"):
        modelfile.read(path)


@pytest.mark.parametrize("report", [{"a": math.nan}, {"a": object()}, {"a": b""}])
def test_a_parity_report_that_is_not_json_is_refused(tmp_path: Path, report: dict) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY))
    with pytest.raises(ParameterError, match="parity"):
        modelfile.update(path, parity=report)
    assert modelfile.read(path).parity is None


def test_a_description_names_everything_and_no_control_characters(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(
        path, TINY, weights(TINY), dtype="int8", source="evil \x1b[2J", generation={"top_k": 40}
    )
    modelfile.update(path, parity={"kl": 0.25})
    rows = dict(modelfile.describe(modelfile.read(path)))
    assert rows["dtype"] == "int8"
    assert rows["n_layer"] == "1"
    assert rows["generation.top_k"] == "40"
    assert rows["parity.kl"] == "0.25"
    assert rows["source"] == "evil \\x1b[2J"
    assert rows["size"] == f"{path.stat().st_size:,} bytes"


def test_without_verify_only_the_tensors_go_unchecked(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    modelfile.read(path, verify=False)
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileError):
        modelfile.read(path, verify=False)


def _patched(data: bytes, name: str, index: int, value: float) -> bytes:
    array = modelfile.read_buffer(data).tensors[name].copy()
    array.reshape(-1)[index] = value
    return rebuild(data, tensors={name: array.tobytes()})


@pytest.mark.parametrize(
    ("dtype", "name", "index", "value", "allowed"),
    [
        ("float32", "wte.weight", 0, math.nan, "finite"),
        ("float32", "ln_f.bias", 59, math.inf, "finite"),
        ("bfloat16", "wte.weight", 1, 0x7F80, "finite"),
        ("float32", "ln_f.bias", 60, 1.0, "padding"),
        ("float32", "wpe.weight", 63, -0.0, "padding"),
        ("float32", "lm_head.weight", -1, 1.0, "padding"),
        ("float32", "h.0.attn.c_attn.bias", 20, 1.0, "padding"),
        ("int8", "h.1.mlp.c_proj.weight", -1, 1, "padding"),
        ("int8", "wte.scale", 0, -1.0, "at least 0"),
        ("int8", "wte.scale", 0, math.nan, "finite"),
        ("int8", "wte.scale", 37, 1.0, "padding"),
        ("int8", "wte.colsum", 3, 10**6, "sum of the row"),
        ("int8", "wte.colsum", 37, 1, "sum of the row"),
    ],
)
def test_verify_finds_values_that_no_writer_writes(
    tmp_path: Path, dtype: str, name: str, index: int, value: float, allowed: str
) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, AWKWARD, weights(AWKWARD), dtype=dtype)
    modelfile.verify(path)
    data = _patched(path.read_bytes(), name, index, value)
    path.write_bytes(data)
    modelfile.read(path)
    with pytest.raises(ModelFileError, match=allowed) as caught:
        modelfile.verify(path)
    assert caught.value.field == name
    array = modelfile.read_buffer(data).tensors[name].reshape(-1)
    at = caught.value.offset
    stored = data[at : at + array.itemsize]
    assert stored == array[index : index + 1 or None].tobytes()


def _characters(n: int) -> TokenizerSpec:
    tokens = tuple(bytes([97 + i]) for i in range(n))
    return TokenizerSpec(kind="chars", tokens=tokens, pattern="", special_tokens={})


def test_a_tokenizer_is_embedded_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    modelfile.write(path, TINY, weights(TINY), tokenizer=_characters(20))
    model = modelfile.verify(path)
    assert model.tokenizer == _characters(20)
    assert dict(modelfile.describe(model))["tokenizer"] == "chars, 20 tokens"
    with pytest.raises(ConvertError, match="21"):
        modelfile.write(tmp_path / "n.gptx", TINY, weights(TINY), tokenizer=_characters(21))
    for text, found in ((_characters(21).to_json(), "20 token ids"), ("{}", "a tokenizer")):
        path.write_bytes(rebuild(path.read_bytes(), {"tokenizer": text}))
        with pytest.raises(ModelFileError, match=found) as caught:
            modelfile.verify(path)
        assert caught.value.field == "__metadata__.tokenizer"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("dtype", "float16"),
        ("dtype", None),
        ("source", "x" * 70_000),
        ("source", "\ud800"),
        ("license", 5),
        ("generation", {"a": math.nan}),
        ("generation", {"a": {}}),
        ("generation", {"A b": 1}),
        ("generation", {"a": [1.5]}),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path: Path, param: str, value: object) -> None:
    with pytest.raises(ParameterError, match=param):
        modelfile.write(tmp_path / "m.gptx", TINY, weights(TINY), **{param: value})
    assert list(tmp_path.iterdir()) == []


def test_wrong_thread_counts_are_refused(tmp_path: Path) -> None:
    for threads in (0, -1, True, 1.0):
        with pytest.raises(ParameterError, match="threads"):
            modelfile.read(tmp_path / "m.gptx", threads=threads)


def _without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in weights(TINY).items() if key != name}


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("wte.weight", None, "missing"),
        ("h.1.ln_1.weight", np.zeros(16, np.float32), "not part"),
        ("ln_f.bias", np.zeros(15, np.float32), "float32 .16., got float32 .15."),
        ("ln_f.bias", np.zeros(16), "got float64"),
        ("ln_f.bias", np.full(16, np.nan, np.float32), "finite"),
        ("wte.weight", np.full((20, 16), np.inf, np.float32), r"inf at \[0, 0\]"),
    ],
)
def test_tensors_that_do_not_make_the_model_are_named(
    tmp_path: Path, name: str, array: np.ndarray | None, message: str
) -> None:
    source = _without(name) | ({} if array is None else {name: array})
    with pytest.raises(ConvertError, match=message) as caught:
        modelfile.write(tmp_path / "m.gptx", TINY, source)
    assert caught.value.tensor == name
    assert list(tmp_path.iterdir()) == []


def test_a_weight_too_large_for_bfloat16_is_named(tmp_path: Path) -> None:
    source = weights(TINY)
    source["wte.weight"][2, 3] = 3.4e38
    with pytest.raises(ConvertError, match=r"wte\.weight.*bfloat16"):
        modelfile.write(tmp_path / "m.gptx", TINY, source, dtype="bfloat16")


def test_more_layers_than_a_header_may_list_are_refused(tmp_path: Path) -> None:
    config = GPTConfig(vocab_size=2, block_size=1, n_layer=10_000, n_head=1, n_embd=1, n_inner=1)
    with pytest.raises(ParameterError, match="n_layer"):
        modelfile.write(tmp_path / "m.gptx", config, {})
