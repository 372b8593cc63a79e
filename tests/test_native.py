"""The core under the sanitizers, built without Python and driven by several threads."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_core_is_clean_under(sanitizer, tmp_path):
    pybind11 = pytest.importorskip("pybind11", reason="the build needs pybind11")
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -O1 -g1"
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{tmp_path}",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=None",
        "-DGPTX_NATIVE_TESTS=ON",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]
    build = ["cmake", "--build", str(tmp_path), "--target", "core_test", "--parallel", "2"]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Fixed addresses: some kernels place mappings where the thread sanitizer does not expect them.
    runner = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*runner, str(tmp_path / "core_test")], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr[-5000:]
