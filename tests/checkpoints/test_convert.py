"""gptx-convert: the file it writes, what it prints, and how it refuses."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_samples import assert_canonical, hf_folder, meta_pickle, named, nanogpt, small

from gptx import convert as command
from gptx import modelfile, parity
from gptx.checkpoints import read_checkpoint, tokenizer_files
from gptx.convert import convert, convert_in_memory, main
from gptx.errors import ConvertError, ParameterError, TokenizeError, UnsafeCheckpointError
from gptx.loading import load
from gptx.tokenizer import TokenizerSpec

CHARACTERS = sorted("\n !,.床前明月光abcdefghijklmnopqrstuvwxyz")


def folder(path, **changes):
    config, tensors = small(**changes)
    return hf_folder(path, config, named(tensors, conv1d=True))


def written(path):
    """The canonical tensors of a float32 model file."""
    model = modelfile.read(path)
    return {name: model.weight(name) for name in modelfile.canonical_shapes(model.config)}


@pytest.mark.parametrize("kind", ["hf", "nanogpt", "state_dict"])
def test_a_checkpoint_becomes_a_file_of_the_same_weights(tmp_path, kind):
    config, tensors = small(vocab_size=len(CHARACTERS), activation="gelu")
    if kind == "hf":
        source = hf_folder(
            tmp_path / "m", config, named(tensors, conv1d=True), activation_function="gelu"
        )
    elif kind == "nanogpt":
        source = nanogpt(tmp_path / "m.pt", config, tensors)
    else:
        source = tmp_path / "m.bin"
        torch.save(named(tensors), source)
    meta_pickle(tmp_path / "meta.pkl", CHARACTERS)
    path = convert(source, n_head=2, activation="gelu", verify=False)
    assert path == tmp_path / "m.gptx"
    model = modelfile.verify(path)
    assert model.config == config
    assert model.dtype == "float32"
    assert model.source == read_checkpoint(source, n_head=2).source
    assert_canonical(written(path), tensors)
    assert (model.tokenizer is None) == (kind == "hf")


@pytest.mark.parametrize("dtype", modelfile.DTYPES)
def test_every_dtype_is_written_with_a_parity_report(tmp_path, dtype):
    path = convert(folder(tmp_path / "m"), dtype=dtype)
    model = modelfile.read(path)
    assert model.dtype == dtype
    report = model.parity
    assert set(report) == {
        "max_logit_difference", "max_logit", "mean_kl", "top1_agreement", "tokens", "reference",
    }  # fmt: skip
    assert report["tokens"] == 1 + 17 + 24 + 24
    assert report["reference"] == f"torch {torch.__version__}"
    assert (
        0 < report["max_logit_difference"] < {"float32": 1e-5, "bfloat16": 0.1, "int8": 0.1}[dtype]
    )
    assert abs(report["mean_kl"]) < {"float32": 1e-9, "bfloat16": 1e-3, "int8": 1e-3}[dtype]
    assert 0.8 <= report["top1_agreement"] <= 1
    assert report["max_logit"] > 0
    assert "parity with torch" in parity.describe(report)


def test_a_wrong_file_shows_in_its_parity_report(tmp_path):
    path = convert(folder(tmp_path / "m"), verify=False)
    config, tensors = small()
    tensors["h.0.attn.c_proj.weight"] = tensors["h.0.attn.c_proj.weight"].T.copy()
    report = parity.measure(path, config, tensors)
    assert report["max_logit_difference"] > 1e-3


def test_the_prompts_of_the_report_are_fixed_and_in_the_vocabulary():
    config, _ = small(block_size=200, vocab_size=50_257)
    prompts = parity.prompts(config)
    assert [len(ids) for ids in prompts] == [1, 17, 64, 128]
    ids = [i for prompt in prompts for i in prompt]
    assert min(ids) >= 0
    assert 40_000 < max(ids) < 50_257
    assert len(set(ids)) > 200
    assert prompts == parity.prompts(config)


def test_a_model_without_the_memory_for_torch_is_not_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parity, "_available_memory", lambda: 1000)
    assert main([str(folder(tmp_path / "m"))]) == 0
    assert "parity with torch: skipped, the comparison needs" in capsys.readouterr().out
    assert modelfile.read(tmp_path / "m.gptx").parity is None


def test_a_checkpoint_loads_directly_with_the_logits_of_its_file(tmp_path):
    source = folder(tmp_path / "m")
    ids = [1, 5, 9, 2]
    direct, converted = load(source), load(convert(source, verify=False))
    assert direct.config == converted.config
    np.testing.assert_array_equal(direct.logits(ids), converted.logits(ids))
    for dtype in modelfile.DTYPES:
        found = convert_in_memory(source, dtype=dtype)
        expected = modelfile.read(convert(source, dtype=dtype, force=True, verify=False))
        assert list(found.tensors) == list(expected.tensors)
        for name, array in expected.tensors.items():
            np.testing.assert_array_equal(found.tensors[name], array)
            assert not found.tensors[name].flags.writeable
            assert found.tensors[name].ctypes.data % 64 == 0


def test_a_value_too_large_for_bfloat16_is_refused(tmp_path):
    config, tensors = small()
    tensors["wte.weight"][1, 2] = np.finfo(np.float32).max
    source = hf_folder(tmp_path / "m", config, named(tensors, conv1d=True))
    for run in (convert, convert_in_memory):
        with pytest.raises(ConvertError, match=r"tensor wte\.weight: .*; use float32"):
            run(source, dtype="bfloat16")


# -- where the file goes


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("gpt2", "gpt2.gptx"),
        ("gpt2/", "gpt2.gptx"),
        ("gpt2-1.5B", "gpt2-1.5B.gptx"),
        ("gpt2/model.safetensors", "gpt2/model.gptx"),
        ("x.y.pt", "x.y.gptx"),
        ("pytorch_model.bin.index.json", "pytorch_model.gptx"),
        (".", "work.gptx"),
        ("..", None),
    ],
)
def test_the_output_lies_beside_the_source(tmp_path, monkeypatch, source, expected):
    work = tmp_path / "work"
    for name in ("gpt2", "gpt2-1.5B"):
        (work / name).mkdir(parents=True)
    monkeypatch.chdir(work)
    found = command._output(Path(source), None, False)
    if source in (".", ".."):
        assert found.resolve().name == f"{Path(source).resolve().name}.gptx"
        assert found.parent == Path(source).resolve().parent
    else:
        assert found == Path(expected)


def test_an_existing_output_is_refused_before_any_work(tmp_path, monkeypatch):
    source = folder(tmp_path / "m")
    (tmp_path / "m.gptx").write_bytes(b"mine")

    def no_work(*args, **kwargs):
        raise AssertionError("work was done")

    with monkeypatch.context() as patch:
        patch.setattr(command, "read_checkpoint", no_work)
        with pytest.raises(ParameterError, match=r"output: expected a name not in use.*--force"):
            convert(source)
        with pytest.raises(ParameterError, match="dtype: expected one of float32, bfloat16, int8"):
            convert(source, dtype="fp16")
    assert (tmp_path / "m.gptx").read_bytes() == b"mine"
    convert(source, force=True, verify=False)
    modelfile.verify(tmp_path / "m.gptx")


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch):
    source = folder(tmp_path / "m")
    with pytest.raises(ParameterError, match="the name of a file"):
        convert(source, tmp_path)
    with pytest.raises(ConvertError, match="there is no folder"):
        convert(source, tmp_path / "no" / "x.gptx")
    weights = source / "model.safetensors"
    with pytest.raises(ParameterError, match="another name than the source"):
        convert(weights, weights, force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConvertError, match="no permission"):
        convert(source)


def test_a_gptx_file_is_not_converted_again(tmp_path):
    path = convert(folder(tmp_path / "m"), verify=False)
    for output in (None, tmp_path / "other.gptx"):
        with pytest.raises(ConvertError, match=r"already a \.gptx file; load it with gptx\.load"):
            convert(path, output)


def test_a_weight_that_is_not_finite_leaves_the_old_file(tmp_path):
    source = folder(tmp_path / "m")
    path = convert(source, verify=False)
    old = path.read_bytes()
    config, tensors = small()
    tensors["ln_f.bias"][3] = np.inf
    hf_folder(source, config, named(tensors, conv1d=True))
    with pytest.raises(ConvertError, match=r"tensor ln_f\.bias: .*inf at index \[3\]"):
        convert(source, force=True)
    assert path.read_bytes() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.gptx"]


# -- tokenizers


GPT2_SIZED = TokenizerSpec(
    "bpe", tuple(f"{i} ".encode() for i in range(50_256)), "x", {"<e>": 50_256}
)


def big(tmp_path):
    config, tensors = small(vocab_size=50_304, n_embd=2, n_layer=1, n_head=1)
    return nanogpt(tmp_path / "ckpt.pt", config, tensors)


def test_a_gpt2_vocabulary_without_files_gets_tiktokens(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "gpt2_spec", lambda: GPT2_SIZED)
    model = modelfile.read(convert(big(tmp_path), verify=False))
    assert model.config.vocab_size == 50_257
    assert model.tokenizer == GPT2_SIZED


def test_without_a_network_the_way_out_is_said(tmp_path, monkeypatch):
    def fail():
        raise TokenizeError("no network")

    monkeypatch.setattr(tokenizer_files, "gpt2_spec", fail)
    with pytest.raises(TokenizeError, match="no tokenizer beside .*: no network.*--tokenizer none"):
        convert(big(tmp_path))
    path = convert(tmp_path / "ckpt.pt", tokenizer="none", verify=False)
    assert modelfile.read(path).tokenizer is None
    assert convert_in_memory(tmp_path / "ckpt.pt").tokenizer is None


def test_a_tokenizer_may_be_given(tmp_path):
    source = folder(tmp_path / "m")
    meta = meta_pickle(tmp_path / "other" / "meta.pkl", CHARACTERS)
    model = modelfile.read(convert(source, tokenizer=meta, verify=False))
    assert model.tokenizer.kind == "chars"
    assert model.config.vocab_size == len(CHARACTERS)
    spec = TokenizerSpec("chars", (b"a", b"b"), "", {})
    model = modelfile.read(convert(source, tokenizer=spec, force=True, verify=False))
    assert model.tokenizer == spec
    with pytest.raises(FileNotFoundError):
        convert(source, tokenizer=tmp_path / "nothing", force=True)


def test_named_tokens_past_the_vocabulary_are_left_out(tmp_path):
    source = folder(tmp_path / "m", vocab_size=4)
    spec = TokenizerSpec("chars", (b"a", b"b", b"c"), "", {"<e>": 3, "<pad>": 4}, {"<x>": 5})
    found = read_checkpoint(source, tokenizer=spec)
    assert found.tokenizer.special_tokens == {"<e>": 3}
    assert found.tokenizer.added_tokens == {}
    assert found.config.vocab_size == 4
    assert "added tokens past the vocabulary left out: '<pad>', '<x>'" in found.notes
    longer = TokenizerSpec("chars", tuple(bytes([97 + i]) for i in range(5)), "", {})
    with pytest.raises(ConvertError, match="tokenizer: expected at most 4 tokens, got 5"):
        read_checkpoint(source, tokenizer=longer)


# -- the command


def test_the_command_prints_a_summary_and_no_progress_into_a_pipe(tmp_path, capsys):
    config, tensors = small(vocab_size=len(CHARACTERS))
    meta_pickle(tmp_path / "meta.pkl", CHARACTERS)
    source = nanogpt(tmp_path / "ckpt.pt", config, tensors)
    assert main([str(source), "--dtype", "int8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith(f"{source}: nanoGPT, ckpt.pt, iteration 5000, val loss 1.47, ")
    assert "2 layers, 2 heads, 12 wide, context 24, gelu, head tied" in lines[1]
    assert lines[2] == f"  tokenizer: chars, {len(CHARACTERS)} tokens"
    assert any(line.startswith("  note: activation gelu") for line in lines)
    assert lines[-3].startswith("  parity with torch ")
    path = tmp_path / "ckpt.gptx"
    assert lines[-2].startswith(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB int8, ")
    assert lines[-1] == f'next: gptx -m {path} "Once upon a time"'


def test_the_command_fails_in_one_line(tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    bad = str(tmp_path / "model.pt")
    for arguments, message in (
        ([bad], "torch.save(model.state_dict()"),
        ([str(tmp_path / "nothing.pt")], "no such file or folder"),
        (["openai-community/gpt2"], "hf download openai-community/gpt2 --local-dir gpt2"),
        ([bad, "--n-head", "0"], "n_head: expected a positive integer, got 0"),
    ):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("gptx-convert: error: ")
        assert message in err
    assert main([bad, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main([bad, "--dtype", "float16"])
    assert caught.value.code == 2


def test_an_interrupted_command_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    source = folder(tmp_path / "m")

    def interrupt(name, done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.ProgressBar, "__call__", lambda self, *args: interrupt(*args))
    assert main([str(source)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_progress_bar_draws_one_line_on_a_terminal_and_removes_it():
    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        bar = command.ProgressBar(stream)
        bar.clear()
        bar("wte.weight", 50_000_000, 200_000_000)
        bar("wpe.weight", 60_000_000, 200_000_000)  # too soon to draw again
        bar("ln_f.bias", 200_000_000, 200_000_000)
        bar.clear()
    assert pipe.getvalue() == ""
    text = terminal.getvalue()
    assert "\n" not in text
    assert "[#######-----------------------] 50 of 200 MB  wte.weight" in text
    assert "wpe.weight" not in text
    assert "[" + "#" * 30 + "] 200 of 200 MB  ln_f.bias" in text
    assert text.endswith("\r\x1b[K")


def test_progress_is_reported_to_the_caller(tmp_path):
    calls = []
    convert(folder(tmp_path / "m"), verify=False, progress=lambda *call: calls.append(call))
    assert [name for name, _, _ in calls] == list(modelfile.canonical_shapes(small()[0]))
    assert calls[-1][1] == calls[-1][2] == (tmp_path / "m.gptx").stat().st_size


NO_TORCH = """
import sys
if sys.argv[2] == "absent":
    sys.modules["torch"] = None
from gptx.convert import main
assert main([sys.argv[1], "--force", *sys.argv[3:]]) == 0
assert sys.modules.get("torch") is None
assert not {"transformers", "safetensors", "tokenizers"} & set(sys.modules)
"""


@pytest.mark.parametrize(
    ("state", "options", "expected"),
    [
        ("absent", [], "parity with torch: skipped, torch is not installed"),
        ("present", ["--no-parity"], "parity with torch: skipped, not asked for"),
    ],
)
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_conversion_needs_no_torch_and_imports_none(tmp_path, state, options, expected, weights):
    config, tensors = small()
    source = hf_folder(tmp_path / "m", config, named(tensors, conv1d=True), weights)
    result = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(source), state, *options],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout
    modelfile.verify(tmp_path / "m.gptx")


def test_a_hostile_checkpoint_writes_nothing(tmp_path):
    (tmp_path / "x").mkdir()
    source = tmp_path / "x" / "model.pt"
    torch.save(torch.nn.Linear(2, 2), source)
    with pytest.raises(UnsafeCheckpointError):
        convert(source)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["model.pt"]


def test_a_trained_checkpoint_converts_and_agrees_with_torch(shared_dir, tmp_path):
    path = convert(shared_dir / "demo", tmp_path / "demo.gptx")
    model = modelfile.read(path)
    assert model.parity["max_logit_difference"] < 1e-4
    assert model.parity["top1_agreement"] == 1
    assert model.parity["tokens"] == 210
    assert model.tokenizer.n_vocab == model.config.vocab_size == 8192
    assert model.generation == {"bos_token_id": 0, "eos_token_id": 0}
