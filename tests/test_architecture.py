"""The folder tree is the architecture: what may depend on what, and what a build may contain."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "gptx"

# Folder -> folders it may include from.
CPP_LAYERS = {
    "core": {"core"},
    "cpu": {"cpu", "core"},
    "cuda": {"cuda", "core"},
    "model": {"model", "cpu", "cuda", "core"},
    "engine": {"engine", "model", "core"},
    "bindings": {"bindings", "engine", "model", "cpu", "core"},
}

# The headers of SIMD and of CUDA: only the vocabularies and the device include them.
INTRINSICS = {"immintrin.h", "arm_neon.h"}
CUDA_RUNTIME = {"kernels/vocabulary.h", "device.cu", "probe.cu"}

# Modules of gptx from the bottom up; each may import those before it, and its own package.
PYTHON_LAYERS = [
    ["errors"],
    ["config", "_core"],
    ["cuda", "packing", "quantize", "sampling"],
    ["tokenizer"],
    ["generation", "modelfile"],
    ["checkpoints"],
    ["convert"],
    ["requests"],
    ["branch", "guided", "jobs", "scoring"],
    ["classification"],
    ["background", "drafting", "session", "steered"],
    ["beams", "contrastive"],
    ["model"],
    ["loading"],
    ["hf", "parity", "tasks"],
    ["integrations"],
    ["evaluation"],
    ["commands"],
    ["training"],
    ["cli"],
]


def cpp_files(suffixes=(".h", ".cpp", ".cu")):
    return [p for p in sorted(CSRC.rglob("*")) if p.suffix in suffixes]


def includes(path):
    return re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", cpp_files(), ids=lambda p: str(p.relative_to(CSRC)))
def test_cpp_includes_point_downwards(path):
    layer = path.relative_to(CSRC).parts[0]
    for include in includes(path):
        folder = include.split("/")[0]
        if folder in CPP_LAYERS:
            assert folder in CPP_LAYERS[layer], f"{path.name} includes {include}"
        assert ("pybind11" not in include) or layer == "bindings"
        assert include not in INTRINSICS or path.name.startswith("vec_")
        name = path.relative_to(CSRC / layer).as_posix()
        assert include != "cuda_runtime.h" or (layer == "cuda" and name in CUDA_RUNTIME)


@pytest.mark.parametrize("path", sorted((CSRC / "cpu" / "kernels").iterdir()), ids=lambda p: p.name)
def test_kernels_use_no_standard_library(path):
    allowed = {"bit", "cstddef", "cstdint", "cpu/kernel_table.h", *INTRINSICS}
    for include in includes(path):
        assert include in allowed or include.startswith("cpu/kernels/"), include


def test_nothing_in_the_core_can_end_the_process():
    forbidden = re.compile(r"\b(assert|abort|exit|_exit|terminate|quick_exit)\s*\(")
    for path in cpp_files():
        code = re.sub(r"//.*|static_assert", "", path.read_text())
        assert not forbidden.search(code), path


def test_an_isa_object_exports_its_table_and_nothing_else():
    if not shutil.which("nm"):
        pytest.skip("needs nm")
    objects = sorted(ROOT.glob("build/*/CMakeFiles/gptx_isa_*.dir/**/isa_*.cpp.o"))
    if not objects:
        pytest.skip("no build tree under build/")
    for path in objects:
        isa = path.name.removeprefix("isa_").removesuffix(".cpp.o")
        symbols = subprocess.run(
            ["nm", "--defined-only", "-C", str(path)], capture_output=True, text=True, check=True
        ).stdout
        exported = [s.split(" ", 2)[2] for s in symbols.splitlines() if s[17] in "TDRBVWu"]
        assert exported == [f"gptx::cpu::k_{isa}_kernels"], path


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports_of(path):
    """(module, at top level) of every import, `if TYPE_CHECKING` left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name, id(node) in top) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"gptx.{name.name}" for name in node.names] if node.module == "gptx" else []
            yield from ((name, id(node) in top) for name in names or [node.module])


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_python_imports_point_downwards(path):
    level = {name: i for i, layer in enumerate(PYTHON_LAYERS) for name in layer}
    own = module_of(path)
    if own in ("__init__", "__main__", "demo"):
        return
    for name, at_top in imports_of(path):
        parts = name.split(".")
        if parts[0] != "gptx" or not at_top or len(parts) < 2:
            continue
        assert parts[1] == own or level[parts[1]] < level[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_numpy_is_imported_with_the_package(path):
    if module_of(path) in ("integrations", "training"):
        return
    for name, at_top in imports_of(path):
        package = name.split(".")[0]
        if at_top and package not in sys.stdlib_module_names:
            assert package in ("gptx", "numpy", "__future__"), f"{path.name} imports {name}"


def run_python(code, env=None):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_gptx_starts_no_thread_and_opens_no_socket():
    run_python(
        "import os, sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(e) if e.startswith('socket.') else None)\n"
        "import numpy\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import gptx\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
        "assert not opened, opened\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )


def test_importing_gptx_costs_at_most_what_numpy_and_tiktoken_cost_and_a_third(tmp_path):
    # As in an installation: from compiled bytecode.
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    clock = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"

    def best(modules):
        return min(float(run_python(clock.format(modules), env)) for _ in range(8))

    assert best("gptx") <= 1.3 * best("numpy, tiktoken")


def test_importing_gptx_leaves_subnormal_numbers_alone():
    run_python("import gptx, numpy as np; assert np.float32(1e-40) * np.float32(0.5) > 0")
