"""The library libgptx_cuda: what it is made of, and what is said where it cannot be used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gptx
from gptx import _core, cuda
from models import generate, make_config, make_engine, random_tensors, submit, write_model

NATIVE = Path(__file__).parents[1] / "native" / "cuda"


@pytest.fixture(scope="module")
def built_library():
    """The library of this installation."""
    if not cuda.library_path().exists():
        pytest.skip(f"gptx was built {_core.cuda_build}")
    return cuda.library_path()


@pytest.fixture(scope="module")
def fake_driver(tmp_path_factory):
    """A folder with a libcuda.so.1 that says what the environment tells it."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    source = NATIVE / "fake_driver.c"
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.gptx"
    write_model(path)
    return path


def run_python(code, **environment):
    """What a new interpreter prints; torch of the tests would bring a driver of its own."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


ASK = "import gptx\ntry: gptx.load(device='cuda')\nexcept gptx.DeviceError as e: print(e)"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (dict(FAKE_CUDA_VERSION="12040"), r"driver is too old: it supports CUDA 12\.4.*needs 13\."),
        (dict(FAKE_CUDA_INIT="100"), r"finds no GPU.*CUDA_VISIBLE_DEVICES"),
        (dict(FAKE_CUDA_INIT="0"), r"not a whole driver"),
        (dict(FAKE_CUDA_INIT="999"), r"driver does not start"),
    ],
    ids=str,
)
def test_every_state_of_the_driver_has_its_message(
    built_library, fake_driver, environment, message
):
    said = run_python(ASK, LD_LIBRARY_PATH=str(fake_driver), **environment)
    assert said.startswith("device 'cuda': ")
    assert re.search(message, said), said


def test_a_machine_without_a_driver_is_told_so(built_library):
    if "libcuda.so.1" in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout:
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver: libcuda.so.1 was not found" in run_python(ASK)


def test_a_build_without_cuda_says_why_and_what_to_do(tmp_path):
    said = run_python(ASK, GPTX_CUDA_LIB=str(tmp_path / "none.so"))
    assert f"built {_core.cuda_build}" in said
    assert 'use device="cpu"' in said


def test_a_library_of_another_version_is_refused(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    other = tmp_path / "other.so"
    source = "const void* gptx_cuda_get_api(unsigned abi) { (void)abi; return 0; }"
    command = ["cc", "-shared", "-fPIC", "-xc", "-", "-o", str(other)]
    subprocess.run(command, input=source, text=True, check=True)
    assert "got that of another version; reinstall gptx" in run_python(
        ASK, GPTX_CUDA_LIB=str(other)
    )
    text = tmp_path / "text.so"
    text.write_text("not a library")
    assert "text.so" in run_python(ASK, GPTX_CUDA_LIB=str(text))


def test_auto_takes_the_cpu_and_says_why_once(tmp_path):
    said = run_python(
        "import gptx\n"
        "a, b = (gptx.load(device='auto') for _ in range(2))\n"
        "print(a.device, b.device, len(a.generate('x', max_new_tokens=3, seed=1).token_ids))",
        GPTX_CUDA_LIB=str(tmp_path / "none.so"),
    )
    assert said.startswith("cpu cpu 3\n")
    assert said.count("device='auto' is the CPU here: device 'cuda': ") == 1


def test_the_command_line_shows_the_devices_or_why_there_are_none(tmp_path, emulated_library):
    command = "from gptx import cli; cli.main(['info', '--devices'])"
    assert "usable   no: device 'cuda': " in run_python(
        command, GPTX_CUDA_LIB=str(tmp_path / "none.so")
    )
    shown = run_python(command, GPTX_CUDA_LIB=emulated_library)
    assert "usable   yes" in shown
    assert "cuda:0   emulated, compute capability 9.0, 8.0 of 8.0 GiB free" in shown


def test_the_cpu_never_touches_the_library(emulated_library):
    said = run_python(
        "import gptx\n"
        "gptx.load(device='cpu').generate('x', max_new_tokens=2)\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('gptx_cuda' in maps, 'libcuda' in maps)",
        GPTX_CUDA_LIB=emulated_library,
    )
    assert said == "False False\n"


def test_python_and_the_command_line_generate_on_a_device(path, library, monkeypatch, capsys):
    from gptx import cli

    monkeypatch.setenv("GPTX_CUDA_LIB", library)
    on_cpu = gptx.load(path)
    model = gptx.load(path, device="cuda", kv_cache_bytes=1 << 20)
    assert model.device == "cuda:0"
    assert model.isa.startswith("sm_")
    assert "cuda:0" in repr(model)
    params = dict(temperature=0, max_new_tokens=12, ignore_eos=True)
    expected = on_cpu.generate("ab", **params).token_ids
    assert model.generate("ab", **params).token_ids == expected
    assert model.generate(["ab"] * 3, **params)[2].token_ids == expected
    assert gptx.load(path, device="auto", kv_cache_bytes=1 << 20).device == "cuda:0"
    pieces = model.stream("ab", stop=["\x00never"], **params)
    assert "".join(pieces) == model.generate("ab", **params).text
    assert cli.main(["ab", "-m", str(path), "--device", "cuda", "-t", "0", "-n", "3"]) == 0
    assert capsys.readouterr().out.startswith("ab")


def test_a_gpu_computes_more_rows_at_once_unless_told_otherwise(path, library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", library)
    for device, rows in (("cpu", 512), ("cuda", 2048)):
        usual, told, few = (
            gptx.load(path, device=device, kv_cache_bytes=1 << 20, step_tokens=n).plan().workspace
            for n in (None, rows, 8)
        )
        assert usual == told > few


def test_a_text_ends_at_its_end_token_within_a_step_of_several(path, library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", library)
    cpu = gptx.load(path)
    model = gptx.load(path, device="cuda", kv_cache_bytes=1 << 20)
    tokens = cpu.generate("ab", temperature=0, max_new_tokens=20, ignore_eos=True).token_ids
    for n in (1, 2, 5, 11):
        params = dict(temperature=0, max_new_tokens=20, ignore_eos=True)
        got = model.generate("ab", stop_token_ids=[tokens[n]], **params)
        assert got.token_ids == tokens[: tokens.index(tokens[n])]
        assert got.finish_reason == "stop"
    for n in (1, 7, 8, 9, 20):
        got = model.generate("ab", temperature=0, max_new_tokens=n, ignore_eos=True)
        assert got.token_ids == tokens[:n]
        assert got.finish_reason == "length"


def test_a_stop_string_ends_a_text_within_a_step_of_several(path, library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", library)
    cpu = gptx.load(path)
    model = gptx.load(path, device="cuda", kv_cache_bytes=1 << 20)
    params = dict(temperature=0, max_new_tokens=20, ignore_eos=True, seed=1)
    whole = cpu.generate("ab", **params)
    for n in (1, 4, 9):
        stop = model.tokenizer.decode(whole.token_ids[n : n + 1])
        expected = cpu.generate("ab", stop=stop, **params)
        assert expected.finish_reason == "stop"
        assert model.generate("ab", stop=stop, **params) == expected
        assert model.generate(["ab", "ab"], stop=stop, **params) == [expected] * 2
        stream = model.stream("ab", stop=stop, **params)
        assert "".join(stream) == expected.text
        assert stream.result.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(device="cuda:7"), r"device 7"),
        (dict(device="cuda:x"), r"device: expected one of cpu, cuda, cuda:N, auto, got 'cuda:x'"),
        (dict(device="cuda", isa="avx2"), r"isa: expected None with device='cuda'.*got 'avx2'"),
        (dict(device="cuda", precision="int8"), r"precision: expected float32 for float32 weights"),
    ],
    ids=str,
)
def test_wrong_options_are_named(path, emulated_library, monkeypatch, options, message):
    monkeypatch.setenv("GPTX_CUDA_LIB", emulated_library)
    with pytest.raises(gptx.GptxError, match=message):
        gptx.load(path, **options)


def test_a_device_without_code_in_the_build_is_refused(path, emulated_library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", emulated_library)
    monkeypatch.setenv("GPTX_EMULATED_CAPABILITY", "75")
    with pytest.raises(gptx.DeviceError, match=r"capability 7\.5, and this build"):
        gptx.load(path, device="cuda")
    assert not cuda.status().usable
    assert gptx.load(path, device="auto").device == "cpu"


def test_too_little_memory_is_said_before_anything_is_copied(path, emulated_library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", emulated_library)
    monkeypatch.setenv("GPTX_EMULATED_BYTES", "100000")
    with pytest.raises(gptx.OutOfMemoryError) as caught:
        gptx.load(path, device="cuda")
    assert caught.value.have == 100_000
    assert caught.value.need > 200_000


def test_a_forked_child_is_refused_with_advice_and_the_parent_goes_on(path, library, monkeypatch):
    monkeypatch.setenv("GPTX_CUDA_LIB", library)
    model = gptx.load(path, device="cuda", kv_cache_bytes=1 << 20)
    params = dict(temperature=0, max_new_tokens=5)
    expected = model.generate("ab", **params).token_ids
    child = os.fork()
    if child == 0:
        try:
            model.generate("ab", **params)
        except gptx.DeviceError as error:
            os._exit(0 if "spawn" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert model.generate("ab", **params).token_ids == expected


def test_two_models_share_a_device(library):
    config = make_config()
    one, two = (random_tensors(config, seed=s) for s in (0, 1))
    options = dict(device="cuda", cuda_library=library, kv_cache_bytes=1 << 20)
    ids = np.arange(9, dtype=np.int32)
    alone = [generate(make_engine(config, t, **options), ids, 6) for t in (one, two)]
    engines = [make_engine(config, t, **options) for t in (one, two)]
    requests = [submit(e, ids, 6) for e in engines]
    tokens = [[], []]
    while any(len(t) < 6 for t in tokens):
        for i, engine in enumerate(engines):
            tokens[i] += [t for _, t, *_ in engine.advance([requests[i]])]
    assert tokens == alone


def test_the_library_needs_the_system_alone_and_is_small(built_library):
    assert built_library.stat().st_size < 20 << 20
    if not shutil.which("readelf"):
        pytest.skip("needs readelf")
    read = ["readelf", "--wide", "--dynamic", "--dyn-syms", str(built_library)]
    shown = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", shown))
    system = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"}
    assert needed <= system | {"ld-linux-aarch64.so.1"}
    exported = re.findall(r"(?:FUNC|OBJECT)\s+GLOBAL\s+DEFAULT\s+\d+\s+(\S+)", shown)
    assert exported == ["gptx_cuda_get_api"]
    for version in re.findall(r"GLIBC_(\d+\.\d+)", shown):
        assert tuple(map(int, version.split("."))) <= (2, 36)


@pytest.mark.parametrize(
    ("choice", "succeeds", "message"),
    [
        ("AUTO", True, r"without CUDA: \S+/nvcc with .* does not compile for 80.*: broken nvcc"),
        ("ON", False, r"GPTX_CUDA=ON, but gptx would be built without CUDA: .*/nvcc"),
        ("OFF", True, r"gptx: without CUDA: GPTX_CUDA=OFF"),
        ("MAYBE", False, r"GPTX_CUDA: expected AUTO, ON or OFF, got 'MAYBE'"),
    ],
)
def test_the_build_says_what_it_lacks_and_why(tmp_path, choice, succeeds, message):
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho broken nvcc >&2\nexit 1\n")
    nvcc.chmod(0o755)
    configure = ["cmake", f"-S{NATIVE.parents[2]}", f"-B{tmp_path / 'build'}"]
    done = subprocess.run(
        [*configure, "-DGPTX_EXTENSION=OFF", f"-DGPTX_CUDA={choice}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDACXX": str(nvcc)},
    )
    assert (done.returncode == 0) == succeeds
    assert re.search(message, (done.stdout + done.stderr).replace("\n", " "))


KERNELS = {  # file -> what its kernels must be made of
    "bfloat16": {
        "linear_many": ["mma.sync", "cp.async"],
        "linear_warpgroup": ["wgmma.mma_async", "wgmma.fence", "fence.proxy.async", "cp.async"],
        "attend_many": ["mma.sync"],
    },
    "int8": {"linear_warpgroup": ["wgmma.mma_async"]},
    "int8_fast": {
        "linear_few": ["mma.sync", "ld.global.nc"],
        "linear_warpgroup": ["m64n64k32.s32.s8.u8"],
    },
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_made_of_the_instructions_they_claim(name, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    root = NATIVE.parents[2]
    ptx = tmp_path / "kernels.ptx"
    command = [nvcc, "-std=c++20", "-arch=sm_90a", "--expt-relaxed-constexpr", "-fmad=false"]
    source = root / "csrc" / "cuda" / "kernels" / f"{name}.cu"
    subprocess.run([*command, "-ptx", f"-I{root}/csrc", "-o", str(ptx), str(source)], check=True)
    entries = re.split(r"\.visible \.entry ", ptx.read_text())[1:]
    for entry in entries:
        assert "griddepcontrol.launch_dependents" in entry
        # Nothing that another kernel writes may be read before it.
        before = entry.split("griddepcontrol.wait")[0]
        assert before != entry
        plain = [line for line in before.splitlines() if re.search(r"\b(ld|st)\.global", line)]
        assert all("ld.global.nc" in line for line in plain), plain
    for kernel, instructions in KERNELS[name].items():
        matching = [e for e in entries if kernel in e.split("(")[0]]
        assert matching
        assert all(i in entry for entry in matching for i in instructions)
